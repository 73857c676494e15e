"""Speed of attention alone in a decode step, by entries filled and allocated in the cache.

`python benchmarks/attention.py` runs the attention of `GrokConfig.bench_1b()`, its projections in int8 and the writing
of the new keys and values included, layer after layer, in turn with 128 entries filled of 256 and of 8192 allocated,
and with more filled. It prints a card of what a layer must read, then medians for one layer, and last one JSON line
with the keys `config`, `batch_size`, `sizes`, `dtype`, `quantized`, `cache_dtype`, `mesh`, `layer_seconds`,
`layer_bytes`, `read_bandwidth`, `percent_of_bandwidth` and the environment; where there is a list, it is by size,
FILLED/ALLOCATED.
"""

import argparse
import functools

import card
import jax
import jax.numpy as jnp
import numpy as np
from options import CACHE_DTYPES, make_parser, read_config, read_mesh

from grokjax import Grok, init
from grokjax.kernels import CachePlace
from grokjax.planning import step_cost


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument(
        "--sizes", default="128/256,128/8192,2048/8192,8000/8192", help="FILLED/ALLOCATED (default: %(default)s)"
    )
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="(default: float32 on CPUs, else bfloat16)")
    parser.add_argument("--repeats", type=int, default=5, help="of all layers")
    return parser.parse_args()


@functools.partial(jax.jit, donate_argnums=(2, 3))
def run_layer(model: Grok, x: jax.Array, keys: jax.Array, values: jax.Array, layer: jax.Array, start: jax.Array):
    count = jnp.ones(len(x), jnp.int32)
    place = CachePlace(layer=layer, start=start, count=count)
    return model.layers.attention(x, keys, values, layer=layer, place=place)


def read_size(text: str) -> tuple[int, int]:
    filled, _, allocated = text.partition("/")
    if not (filled.isdecimal() and allocated.isdecimal() and 0 < int(filled) <= int(allocated)):
        raise SystemExit(f"--sizes {text} is not FILLED/ALLOCATED with 1 to ALLOCATED entries filled.")
    return int(filled), int(allocated)


class Case:
    """One size: its cache, kept from run to run."""

    def __init__(self, model: Grok, batch_size: int, filled: int, allocated: int, cache_dtype: str | None):
        self.model, self.start = model, jnp.full(batch_size, filled - 1, jnp.int32)
        cache = model.new_cache(batch_size, allocated, dtype=cache_dtype)
        self.keys, self.values = cache.keys, cache.values
        self.x = jax.random.normal(jax.random.key(0), (batch_size, 1, model.config.model_dim), model.dtype)
        cost = step_cost(model, batch_size=batch_size, filled=filled, cache_dtype=cache.keys.dtype)
        devices, layers = model.partitioner.mesh.size, model.config.num_layers
        self.num_bytes = (cost.attention + cost.cache) * devices / layers

    def layer_seconds(self) -> list[float]:
        return [card.seconds(lambda i=i: self._run(i)) for i in range(self.model.config.num_layers)]

    def _run(self, layer: int) -> jax.Array:
        out, self.keys, self.values = run_layer(
            self.model, self.x, self.keys, self.values, jnp.int32(layer), self.start
        )
        return out


def main() -> None:
    arguments = parse_arguments()
    sizes = arguments.sizes.split(",")
    numbers = [read_size(size) for size in sizes]
    config = read_config(arguments, longest=max(allocated for _, allocated in numbers))
    mesh = read_mesh(arguments)
    dtype = jnp.dtype(arguments.dtype)
    model = init(config, mesh=mesh, dtype=dtype, quantized=not arguments.plain)
    cases = [Case(model, arguments.batch, *pair, arguments.cache_dtype) for pair in numbers]
    bandwidth = card.read_bandwidth(mesh)
    weights = "plain" if arguments.plain else "int8"
    card.print_rows(
        f"{arguments.config}, the attention of one layer, {weights} weights, {arguments.dtype}, "
        f"batch {arguments.batch}, mesh {arguments.mesh}",
        {f"{size} entries": f"{case.num_bytes / 1e6:.2f} MB" for size, case in zip(sizes, cases, strict=True)}
        | {"measured read bandwidth": f"{bandwidth / 1e9:.1f} GB/s"},
    )
    for case in cases:
        case.layer_seconds()
    runs = [[case.layer_seconds() for case in cases] for _ in range(arguments.repeats)]
    times = np.median(runs, axis=(0, 2)).tolist()
    parts = [100 * case.num_bytes / time / bandwidth for case, time in zip(cases, times, strict=True)]
    card.print_rows(
        "medians",
        {
            f"{size} entries": f"{1e6 * time:.0f} us, {part:.0f} % of the bandwidth, {time / times[0]:.2f} x the first"
            for size, time, part in zip(sizes, times, parts, strict=True)
        },
    )
    card.print_json(
        {
            "benchmark": "attention",
            "config": arguments.config,
            "batch_size": arguments.batch,
            "sizes": sizes,
            "dtype": arguments.dtype,
            "quantized": not arguments.plain,
            "cache_dtype": cases[0].keys.dtype.name,
            "mesh": arguments.mesh,
            "layer_seconds": [round(time, 7) for time in times],
            "layer_bytes": [int(case.num_bytes) for case in cases],
            "read_bandwidth": int(bandwidth),
            "percent_of_bandwidth": [round(part, 1) for part in parts],
            **card.environment(),
        }
    )


if __name__ == "__main__":
    main()
