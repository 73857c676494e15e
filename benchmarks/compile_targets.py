"""Compiles a decode or prefill step for hardware that is not here, and reads what the compiler made of it.

`python benchmarks/compile_targets.py --target h200:8` compiles the real model from shapes alone, on any machine. GPUs
and TPUs need the extras `plan-gpu` and `tpu`, without them the compiler for CPUs stands in. It prints the compile
time, the memory and the collectives per device, the largest matrices that the step writes (a copied, converted or
gathered weight would stand there), and last one JSON line. What a machine needs in all is told by `grokjax plan`.
`--check` compiles 8 layers for every target of `CHECKS` instead, and fails where a step takes more memory than stated.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import card
import jax
import jax.numpy as jnp
from options import CACHE_DTYPES

from grokjax import GrokConfig, KVCache, decode, prefill
from grokjax.cli import read_extents
from grokjax.model import abstract_model
from grokjax.planning import Program, Target, Value, read_program
from grokjax.sharding import RULES, Partitioner

# Options of a step, and MiB of temporaries that it may take on a device. A copied cache of keys or values has 128, in
# int8 64, a weight 24, or 192 where a device holds whole experts, and all scales of the experts 3.5.
# On 2 x 4 devices of a GPU's kind 8 layers of experts would be a stack that no kernel takes (`has_safe_offsets`).
CHECKS = (
    ("--target h200:8 --batch 8", 8),
    ("--target h200:8 --mesh 2,4 --batch 8 --cache-dtype int8 --layers 16", 8),
    ("--target h200:8 --batch 8 --prefill 1024 --prompts 1", 180),
    ("--target v5p:2x2x2 --batch 8", 5),
    ("--target v5p:2x2x2 --mesh 2,4 --batch 8", 5),
    ("--target v5p:2x2x2 --mesh 2,4 --batch 8 --cache-dtype int8", 5),
    ("--target v5p:2x2x2 --mesh 8,1 --batch 8", 5),
    ("--target v5p:2x2x2 --rules expert --batch 8", 8),
    ("--target v5p:2x2x2 --batch 8 --prefill 1024 --prompts 1", 120),
    ("--target v5p:2x2x2 --mesh 2,4 --batch 8 --prefill 1024 --prompts 4", 250),
    ("--target v5p:2x2x2 --rules expert --batch 8 --prefill 1024 --prompts 1", 190),
    ("--target v6e:2x4 --batch 8", 5),
    ("--target v6e:2x4 --batch 8 --prefill 1024 --prompts 1", 60),
)


def compile_step(arguments: argparse.Namespace) -> tuple[float, Program, tuple[int, ...]]:
    """Seconds of compilation, the program, and the cache's shape on one device."""
    config = GrokConfig.grok_1().replace(num_layers=arguments.layers)
    rules = RULES[arguments.rules]
    mesh = Target.parse(arguments.target).mesh(read_extents(arguments.mesh))
    model = abstract_model(config, Partitioner.create(config, mesh, rules), dtype=jnp.bfloat16, quantized=True)
    cache = KVCache.abstract(config, arguments.batch, dtype=arguments.cache_dtype, mesh=mesh, rules=rules)
    num_rows = arguments.prompts or arguments.batch
    rows = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells kernels the device
        if arguments.prefill:
            tokens = jax.ShapeDtypeStruct((num_rows, arguments.prefill), jnp.int32)
            lowered = jax.jit(prefill, donate_argnums=3).lower(
                model, tokens, rows, cache, rows=rows if arguments.prompts else None
            )
        else:
            lowered = jax.jit(decode, donate_argnums=2).lower(model, rows, cache)
    program = read_program(lowered.compile())
    keys = jax.tree.leaves(cache.keys)[0]
    return time.perf_counter() - start, program, keys.sharding.shard_shape(keys.shape)


def large_matrices(program: Program, cache: tuple[int, ...]) -> list[Value]:
    """Matrices of 64 x 64 and more that the step writes, largest first, but for the cache, updated in place."""
    return [
        value
        for value in program.values
        if len(value.shape) > 1 and min(value.shape[-2:]) >= 64 and value.shape[-3:] != cache[-3:]
    ]


def check(parser: argparse.ArgumentParser) -> None:
    """Compiles all of `CHECKS` and ends with an error if one takes more memory than it may."""
    failed = 0
    for options, most in CHECKS:
        seconds, program, _ = compile_step(parser.parse_args(["--layers", "8", *options.split()]))
        used = program.temporary_bytes / 2**20
        failed += used > most
        print(f"{options:60} {used:7.1f} MiB of at most {most:4} {'TOO MUCH' if used > most else ''} {seconds:.0f} s")
    parser.exit(bool(failed), f"{failed} of {len(CHECKS)} steps take too much memory\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu:8", help="such as h200:8 or v5p:2x2x2 (default: cpu:8)")
    parser.add_argument("--mesh", default="1,8", help="DATA,MODEL devices, all of the target")
    parser.add_argument("--rules", choices=tuple(RULES), default="tensor", help="parallelism")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prefill; 0 compiles the decode step")
    parser.add_argument("--prompts", type=int, default=0, help="prompts that the prefill puts into rows; 0 for all")
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="default: bfloat16, for CPUs float32")
    parser.add_argument("--check", action="store_true", help="compile for all known targets and compare their memory")
    arguments = parser.parse_args()
    if arguments.check:
        check(parser)
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
