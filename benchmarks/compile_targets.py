"""Compiles a decode or prefill step for hardware that is not here, and reads what the compiler made of it.

`python benchmarks/compile_targets.py --target h200:8` compiles the real model from shapes alone, on any machine. GPUs
and TPUs need the extras `plan-gpu` and `plan-tpu`, without them the compiler for CPUs stands in. It prints the compile
time, the memory and the collectives per device, the largest matrices that the step writes (a copied, converted or
gathered weight would stand there), and last one JSON line. What a machine needs in all is told by `grokjax plan`.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import card
import jax
import jax.numpy as jnp

from grokjax import GrokConfig, KVCache, decode, prefill
from grokjax.model import abstract_model
from grokjax.program import Program, Value, read_program
from grokjax.sharding import RULES, Partitioner
from grokjax.targets import Target


def compile_step(arguments: argparse.Namespace) -> tuple[float, Program, tuple[int, ...]]:
    """Seconds of compilation, the program, and the cache's shape on one device."""
    config = GrokConfig.grok_1().replace(num_layers=arguments.layers)
    rules = RULES[arguments.rules]
    data, model_axis = (int(size) for size in arguments.mesh.split(","))
    mesh = Target.parse(arguments.target).mesh((data, model_axis))
    model = abstract_model(config, Partitioner.create(config, mesh, rules), dtype=jnp.bfloat16, quantized=True)
    cache = KVCache.abstract(config, arguments.batch, mesh=mesh, rules=rules)
    rows = jax.ShapeDtypeStruct((arguments.batch,), jnp.int32)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells kernels the device
        if arguments.prefill:
            tokens = jax.ShapeDtypeStruct((arguments.batch, arguments.prefill), jnp.int32)
            lowered = jax.jit(prefill, donate_argnums=3).lower(model, tokens, rows, cache)
        else:
            lowered = jax.jit(decode, donate_argnums=2).lower(model, rows, cache)
    program = read_program(lowered.compile())
    return time.perf_counter() - start, program, cache.keys.sharding.shard_shape(cache.keys.shape)


def large_matrices(program: Program, cache: tuple[int, ...]) -> list[Value]:
    """Matrices of 64 x 64 and more that the step writes, largest first, but for the cache, updated in place."""
    return [
        value
        for value in program.values
        if len(value.shape) > 1 and min(value.shape[-2:]) >= 64 and value.shape[-3:] != cache[-3:]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu:8", help="such as h200:8 or v5p:2x2x2 (default: cpu:8)")
    parser.add_argument("--mesh", default="1,8", help="DATA,MODEL devices, all of the target")
    parser.add_argument("--rules", choices=tuple(RULES), default="tensor", help="parallelism")
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
