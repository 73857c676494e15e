"""Compiles a decode or prefill step for hardware that is not here, and reads what the compiler made of it.

`python benchmarks/compile_targets.py --target h200` compiles the real model from shapes alone, on any machine. The
target `cpu` needs nothing more; `v5p` needs the package libtpu of jax's own date, and `h200` the packages
jax-cuda13-plugin and jax-cuda13-pjrt of jax's own version, without any CUDA libraries. It prints the compile time, the
memory and the collectives per device, the largest matrices that the step writes (a copied, converted or gathered weight
would stand there), and last one JSON line.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import card
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from grokjax import GrokConfig, KVCache, ShardingRules, decode, make_mesh, prefill
from grokjax.model import abstract_model
from grokjax.program import Program, Value, read_program
from grokjax.sharding import Partitioner

# An H200 as XLA's compiler wants it described. Source: NVIDIA, H200 data sheet and CUDA programming guide, tables of
# compute capability 9.0.
H200 = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 }
"""


def target_devices(target: str) -> list[jax.Device]:
    """Eight devices of the target, none of which need exist."""
    if target == "cpu":
        return jax.devices()
    if target == "v5p":
        return list(topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices)
    description = topologies.get_topology_desc("", platform="cuda", target_config=H200, topology="1x1x8")
    return list(description.devices)


def compile_step(arguments: argparse.Namespace) -> tuple[float, Program, tuple[int, ...]]:
    """Seconds of compilation, the program, and the cache's shape on one device."""
    config = GrokConfig.grok_1().replace(num_layers=arguments.layers)
    rules = ShardingRules.expert_parallel() if arguments.rules == "expert" else ShardingRules.tensor_parallel()
    data, model_axis = (int(size) for size in arguments.mesh.split(","))
    devices = np.array(target_devices(arguments.target))
    mesh = make_mesh((data, model_axis), devices=devices.tolist()) if arguments.target == "cpu" else grid(devices, data)
    model = abstract_model(config, Partitioner.create(config, mesh, rules), dtype=jnp.bfloat16, quantized=True)
    cache = KVCache.abstract(config, arguments.batch, mesh=mesh, rules=rules)
    rows = jax.ShapeDtypeStruct((arguments.batch,), jnp.int32)
    start = time.perf_counter()
    if arguments.prefill:
        tokens = jax.ShapeDtypeStruct((arguments.batch, arguments.prefill), jnp.int32)
        lowered = jax.jit(prefill, donate_argnums=3).lower(model, tokens, rows, cache)
    else:
        lowered = jax.jit(decode, donate_argnums=2).lower(model, rows, cache)
    program = read_program(lowered.compile())
    return time.perf_counter() - start, program, cache.keys.sharding.shard_shape(cache.keys.shape)


def grid(devices: np.ndarray, data: int) -> jax.sharding.Mesh:
    """A mesh of described devices, in the order of the description."""
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.sharding.Mesh(devices.reshape(data, -1), ("data", "model"), axis_types=axis_types)


def large_matrices(program: Program, cache: tuple[int, ...]) -> list[Value]:
    """Matrices of 64 x 64 and more that the step writes, largest first, but for the cache, updated in place."""
    return [
        value
        for value in program.values
        if len(value.shape) > 1 and min(value.shape[-2:]) >= 64 and value.shape[-3:] != cache[-3:]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("cpu", "h200", "v5p"), default="cpu", help="eight devices of it")
    parser.add_argument("--mesh", default="1,8", help="DATA,MODEL devices, eight in all")
    parser.add_argument("--rules", choices=("tensor", "expert"), default="tensor", help="parallelism")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prefill; 0 compiles the decode step")
    arguments = parser.parse_args()
    seconds, program, cache = compile_step(arguments)
    largest = large_matrices(program, cache)[:3]
    card.print_rows(
        f"{arguments.target}, mesh {arguments.mesh}, batch {arguments.batch}, {arguments.layers} layers",
        {
            "lowering and compilation": f"{seconds:.1f} s",
            "arguments a device": f"{program.argument_bytes / 2**30:.2f} GiB",
            "of them reused by outputs": f"{program.aliased_bytes / 2**30:.2f} GiB",
            "temporaries a device": f"{program.temporary_bytes / 2**20:.1f} MiB",
            "collectives (bodies once)": str({kind: n for kind, n in program.collectives.items() if n}),
            "largest matrices written": ", ".join(f"{v.dtype}{list(v.shape)} by {v.operation}" for v in largest)
            or "none",
        },
    )
    card.print_json(
        {
            "benchmark": "compile_targets",
            **vars(arguments),
            "compile_seconds": round(seconds, 2),
            "argument_bytes": program.argument_bytes,
            "temporary_bytes": program.temporary_bytes,
            "collectives": dict(program.collectives),
            "largest_matrix_bytes": largest[0].num_bytes if largest else 0,
            "jax": jax.__version__,
        }
    )


if __name__ == "__main__":
    main()
