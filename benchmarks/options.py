"""What the benchmarks of a model share of their options: its configuration, mesh, dtype and kind of weights."""

import argparse
import math

from jax.sharding import Mesh

from grokjax import GrokConfig, make_mesh
from grokjax.cli import named_config, read_extents, use_every_core

CACHE_DTYPES = ("float32", "bfloat16", "int8")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the shared options, to which a benchmark adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="bench_1b", help="tiny, bench_1b, grok_1 or a JSON file")
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--mesh", default="1,1", help="DATA,MODEL devices")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of computation")
    parser.add_argument("--plain", action="store_true", help="plain weights instead of int8")
    return parser


def read_config(arguments: argparse.Namespace, *, longest: int = 1) -> GrokConfig:
    """The configuration that is asked for, with room for sequences of `longest` tokens."""
    config = named_config("--config", arguments.config)
    config = config.replace(max_seq_len=max(config.max_seq_len, longest))
    return config if arguments.layers is None else config.replace(num_layers=arguments.layers)


def read_mesh(arguments: argparse.Namespace) -> Mesh:
    """The mesh that is asked for, of the devices that are there; a CPU is as many as it takes."""
    extents = read_extents(arguments.mesh)
    use_every_core(math.prod(extents))
    return make_mesh(extents)
