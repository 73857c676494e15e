"""Speed of the experts alone, for few rows against what the memory allows, for many against the arithmetic.

`python benchmarks/moe.py` runs the router and the experts of `GrokConfig.bench_1b()` in int8 on 1, 8, 128 and 512 rows,
in turn, layer after layer, so that no weight is in a cache from the time before. It prints a card of what they must
read and compute, then medians for one layer, and last one JSON line with the keys `config`, `rows`, `dtype`,
`quantized`, `mesh`, `layer_seconds`, `layer_bytes`, `operations`, `read_bandwidth`, `matmul_rate`,
`percent_of_bandwidth`, `percent_of_matmul_rate` and the environment; where there is a list, it is by rows.
"""

import argparse

import card
import jax
import jax.numpy as jnp
import numpy as np
from options import make_parser, read_config, read_mesh

from grokjax import Grok, init
from grokjax.planning import step_cost


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", default="1,8,128,512", help="tokens evaluated together (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of all layers")
    return parser.parse_args()


@jax.jit
def run_layer(model: Grok, x: jax.Array, layer: jax.Array) -> jax.Array:
    return model.layers.feed_forward(x, jnp.ones(x.shape[:2], bool), layer=layer)


def layer_seconds(model: Grok, rows: int) -> list[float]:
    """Time of each layer in turn, on the same random rows."""
    x = jax.random.normal(jax.random.key(rows), (1, rows, model.config.model_dim), model.dtype)
    return [card.seconds(lambda i=i: run_layer(model, x, jnp.int32(i))) for i in range(model.config.num_layers)]


def layer_bytes(model: Grok, rows: int) -> float:
    """Bytes of the experts that so many tokens choose in one layer, on all devices."""
    cost = step_cost(model, batch_size=1, num_new=rows, filled=rows, cache_dtype=jnp.float32)
    return cost.experts * model.partitioner.mesh.size / model.config.num_layers


def layer_operations(model: Grok, rows: int) -> int:
    config = model.config
    return 6 * rows * config.experts_per_token * config.model_dim * config.ffn_dim


def main() -> None:
    arguments = parse_arguments()
    all_rows = [int(rows) for rows in arguments.rows.split(",")]
    mesh = read_mesh(arguments)
    dtype = jnp.dtype(arguments.dtype)
    model = init(read_config(arguments), mesh=mesh, dtype=dtype, quantized=not arguments.plain)
    bandwidth, rate = card.read_bandwidth(mesh), card.matmul_rate(mesh, dtype)
    num_bytes = [layer_bytes(model, rows) for rows in all_rows]
    operations = [layer_operations(model, rows) for rows in all_rows]
    weights = "plain" if arguments.plain else "int8"
    card.print_rows(
        f"{arguments.config}, the experts of one layer, {weights} weights, {arguments.dtype}, mesh {arguments.mesh}",
        {
            f"{rows} rows": f"{size / 1e6:.1f} MB, {ops / 1e9:.2f} GFLOP"
            for rows, size, ops in zip(all_rows, num_bytes, operations, strict=True)
        }
        | {
            "measured read bandwidth": f"{bandwidth / 1e9:.1f} GB/s",
            "measured rate of square products": f"{rate / 1e9:.0f} GFLOP/s",
        },
    )
    for rows in all_rows:
        layer_seconds(model, rows)
    runs = [[layer_seconds(model, rows) for rows in all_rows] for _ in range(arguments.repeats)]
    times = np.median(runs, axis=(0, 2)).tolist()
    of_bandwidth = [100 * size / time / bandwidth for size, time in zip(num_bytes, times, strict=True)]
    of_rate = [100 * ops / time / rate for ops, time in zip(operations, times, strict=True)]
    card.print_rows(
        "medians",
        {
            f"{rows} rows": f"{1e3 * time:.2f} ms, {bytes_part:.0f} % of the bandwidth, {part:.0f} % of the arithmetic"
            for rows, time, bytes_part, part in zip(all_rows, times, of_bandwidth, of_rate, strict=True)
        },
    )
    card.print_json(
        {
            "benchmark": "moe",
            "config": arguments.config,
            "rows": all_rows,
            "dtype": arguments.dtype,
            "quantized": not arguments.plain,
            "mesh": arguments.mesh,
            "layer_seconds": [round(time, 6) for time in times],
            "layer_bytes": [int(size) for size in num_bytes],
            "operations": operations,
            "read_bandwidth": int(bandwidth),
            "matmul_rate": int(rate),
            "percent_of_bandwidth": [round(part, 1) for part in of_bandwidth],
            "percent_of_matmul_rate": [round(part, 1) for part in of_rate],
            **card.environment(),
        }
    )


if __name__ == "__main__":
    main()
