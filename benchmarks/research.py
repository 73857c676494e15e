"""What it costs to look into a model: scores, a tap and the router's statistics, beside a prefill of the same prompt.

`python benchmarks/research.py` runs a prompt of 512 tokens through `GrokConfig.bench_1b()` in int8 with random weights,
in turn: prefill; forward, which is prefill and all logits; score; prefill with a tap on every layer's stream at the
last token; and the statistics of every layer's router. It prints the sizes, then medians, and last one JSON
line with the keys `config`, `layers`, `lengths`, `dtype`, `quantized`, `mesh`, `prefill_seconds`, `forward_seconds`,
`score_seconds`, `tap_seconds`, `statistics_seconds`, `score_to_forward`, `score_to_prefill`, `tap_to_prefill`,
`statistics_to_prefill` and the environment; where there is a list, it is by length.
"""

import argparse

import card
import jax
import jax.numpy as jnp
import numpy as np
from options import make_parser, read_config, read_mesh
from prefill import make_prompt, run_prefill, time_in_turn

from grokjax import Grok, KVCache, Scores, forward, init, score
from grokjax.research import RouterStats, Tap, observe_routing, observe_step

TAP = {"x": Tap("stream.out", at="last")}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", default="512", help="tokens of the prompts (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each length")
    return parser.parse_args()


def run_forward(model: Grok, length: int) -> jax.Array:
    return forward(model, make_prompt(model, length))


def run_score(model: Grok, length: int) -> Scores:
    return score(model, make_prompt(model, length), np.array([length]))


def run_tap(model: Grok, length: int) -> object:
    cache = KVCache.create(model.config, 1, length, mesh=model.partitioner.mesh)
    return observe_step(model, make_prompt(model, length), np.array([length]), cache, TAP)[:2]


def run_statistics(model: Grok, length: int) -> RouterStats:
    return observe_routing(model, make_prompt(model, length), np.array([length]))


WAYS = {
    "prefill": run_prefill,
    "forward": run_forward,
    "score": run_score,
    "tap": run_tap,
    "statistics": run_statistics,
}
RATIOS = (("score", "forward"), ("score", "prefill"), ("tap", "prefill"), ("statistics", "prefill"))


def main() -> None:
    arguments = parse_arguments()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    config, mesh = read_config(arguments, longest=max(lengths)), read_mesh(arguments)
    weights = "plain" if arguments.plain else "int8"
    card.print_rows(
        f"{arguments.config}, {weights} weights, {arguments.dtype}, mesh {arguments.mesh}",
        {f"all logits of {n} tokens": f"{n * config.vocab_size * 4 / 2**20:.0f} MiB" for n in lengths},
    )
    model = init(config, mesh=mesh, dtype=jnp.dtype(arguments.dtype), quantized=not arguments.plain)
    ways = [lambda n, run=run: run(model, n) for run in WAYS.values()]
    time_in_turn(ways, lengths, 1)  # compiles
    times = dict(zip(WAYS, time_in_turn(ways, lengths, arguments.repeats), strict=True))
    record = {
        "benchmark": "research",
        "config": arguments.config,
        "layers": config.num_layers,
        "lengths": lengths,
        "dtype": arguments.dtype,
        "quantized": not arguments.plain,
        "mesh": arguments.mesh,
        **{f"{name}_seconds": [round(time, 5) for time in of_lengths] for name, of_lengths in times.items()},
        **{
            f"{one}_to_{other}": [round(a / b, 3) for a, b in zip(times[one], times[other], strict=True)]
            for one, other in RATIOS
        },
        **card.environment(),
    }
    rows = {
        f"{name}, {n} tokens": f"{1e3 * time:.0f} ms"
        for name in WAYS
        for n, time in zip(lengths, times[name], strict=True)
    }
    card.print_rows("medians", rows | {f"{a} / {b}": str(record[f"{a}_to_{b}"]) for a, b in RATIOS})
    card.print_json(record)


if __name__ == "__main__":
    main()
