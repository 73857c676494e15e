"""Speed of prefill with random weights, against what the machine's arithmetic allows.

`python benchmarks/prefill.py` measures prompts of 128, 512 and 2048 tokens with `GrokConfig.bench_1b()` in int8, in
turn, on whatever device there is. It prints a card of what they must compute, then medians, and last one JSON line.
`--peer llama.cpp` runs the same prompts through it, in turn too, and adds `peer_tokens_per_second`, `peer_ratio` (our
speed over its) and `peer_difference` (of the logits, as part of their own size). The line is one with the keys
`config`, `layers`, `lengths`, `dtype`, `quantized`, `mesh`, `compile_seconds`, `prefill_seconds`, `tokens_per_second`,
`operations`, `matmul_rate`, `percent_of_matmul_rate` and the environment; where there is a list, it is by length.
"""

import argparse
from collections.abc import Callable

import card
import jax
import jax.numpy as jnp
import numpy as np
import peer
from options import make_parser, read_config, read_mesh

from grokjax import Grok, KVCache, init, prefill
from grokjax.planning import step_cost


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", default="128,512,2048", help="tokens of the prompts (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each length")
    peer.add_argument(parser)
    return parser.parse_args()


def make_prompt(model: Grok, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, model.config.vocab_size, (1, length))


def run_prefill(model: Grok, length: int) -> jax.Array:
    prompt = make_prompt(model, length)
    cache = KVCache.create(model.config, 1, length, mesh=model.partitioner.mesh)
    return prefill(model, prompt, np.array([length]), cache)[0]


def time_in_turn(ways: list[Callable[[int], object]], lengths: list[int], repeats: int) -> list[list[float]]:
    """Median seconds of each way and, within it, of each length."""
    runs = [[[card.seconds(lambda w=w, n=n: w(n)) for n in lengths] for w in ways] for _ in range(repeats)]
    return np.median(runs, axis=0).tolist()


def compare(lengths: list[int], ours: list[float], theirs: list[float]) -> dict[str, list[float]]:
    """The peer's speeds, and ours over them, by length, for the record."""
    return {
        "peer_tokens_per_second": [round(n / time, 1) for n, time in zip(lengths, theirs, strict=True)],
        "peer_ratio": [round(their / our, 3) for their, our in zip(theirs, ours, strict=True)],
    }


def main() -> None:
    arguments = parse_arguments()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    mesh = read_mesh(arguments)
    dtype = jnp.dtype(arguments.dtype)
    model = init(read_config(arguments, longest=max(lengths)), mesh=mesh, dtype=dtype, quantized=not arguments.plain)
    operations = [count_operations(model, n) for n in lengths]
    rate = card.matmul_rate(mesh, dtype)
    print_card(arguments, lengths, operations, rate)

    compile_seconds = [card.seconds(lambda n=n: run_prefill(model, n)) for n in lengths]
    ways = [lambda n: run_prefill(model, n)]
    if arguments.peer:
        other = peer.LlamaCpp(model, rows=1, max_len=max(lengths))
        difference = peer.difference(model, other)
        ways.append(lambda n: other.prefill(make_prompt(model, n)))
    times, *peer_times = time_in_turn(ways, lengths, arguments.repeats)
    record = {
        "benchmark": "prefill",
        "config": arguments.config,
        "layers": model.config.num_layers,
        "lengths": lengths,
        "dtype": arguments.dtype,
        "quantized": not arguments.plain,
        "mesh": arguments.mesh,
        "compile_seconds": [round(time, 2) for time in compile_seconds],
        "prefill_seconds": [round(time, 5) for time in times],
        "tokens_per_second": [round(n / time, 1) for n, time in zip(lengths, times, strict=True)],
        "operations": [int(ops) for ops in operations],
        "matmul_rate": int(rate),
        "percent_of_matmul_rate": [
            round(100 * ops / time / rate, 1) for ops, time in zip(operations, times, strict=True)
        ],
        **card.environment(),
    }
    for theirs in peer_times:
        record |= compare(lengths, times, theirs) | {"peer_difference": round(difference, 4)}
    print_results(record)
    card.print_json(record)


def count_operations(model: Grok, length: int) -> float:
    """Operations of all devices together in a prefill of one prompt."""
    cost = step_cost(model, batch_size=1, num_new=length, filled=length, cache_dtype=jnp.float32)
    return cost.operations * model.partitioner.mesh.size


def print_card(arguments: argparse.Namespace, lengths: list[int], operations: list[float], rate: float) -> None:
    weights = "plain" if arguments.plain else "int8"
    ceilings = [f"{n * rate / ops:.0f}" for n, ops in zip(lengths, operations, strict=True)]
    card.print_rows(
        f"{arguments.config}, {weights} weights, {arguments.dtype}, mesh {arguments.mesh}",
        {f"{n} tokens": f"{ops / 1e9:.1f} GFLOP" for n, ops in zip(lengths, operations, strict=True)}
        | {
            "measured rate of square products": f"{rate / 1e9:.0f} GFLOP/s",
            "ceiling": ", ".join(ceilings) + " tokens/s",
        },
    )


def print_results(record: dict) -> None:
    rows = zip(
        record["lengths"],
        record["prefill_seconds"],
        record["tokens_per_second"],
        record["percent_of_matmul_rate"],
        strict=True,
    )
    card.print_rows(
        "medians",
        {
            f"{n} tokens": f"{1e3 * time:.0f} ms, {speed:.0f} tokens/s, {percent:.0f} % of the ceiling"
            for n, time, speed, percent in rows
        },
    )
    if "peer_ratio" in record:
        rows = zip(record["lengths"], record["peer_tokens_per_second"], record["peer_ratio"], strict=True)
        card.print_rows(
            f"llama.cpp on the same weights, in turn; logits differ by {record['peer_difference']:.3f} of their size",
            {f"{n} tokens": f"{speed:.0f} tokens/s, ours {ratio:.2f} x" for n, speed, ratio in rows},
        )


if __name__ == "__main__":
    main()
