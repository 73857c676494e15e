"""Speed of prefill and decode with random weights, against what the machine's memory allows.

`python benchmarks/decode.py` measures `GrokConfig.bench_1b()` in int8 on whatever device there is. It prints a card of
what one step must read, then medians, and last one JSON line. With `--peer llama.cpp` prefill and decode of both are
timed in turn, and the line also has `peer_prefill_tokens_per_second`, `peer_decode_tokens_per_second`, the ratios of
our speed to the peer's, `prefill_ratio` and `decode_ratio`, and `peer_difference`, that of the logits as part of their
own size. The line is one with the keys `config`, `layers`, `batch_size`, `prompt`, `new`, `dtype`, `quantized`,
`quantized_table`, `cache_dtype`, `mesh`, `compile_seconds`, `prefill_tokens_per_second`, `decode_tokens_per_second`,
`decode_step_seconds`, `step_bytes`, `read_bandwidth`, `percent_of_bandwidth`, `weights_bytes`, `peak_memory_bytes` and
the environment.
"""

import argparse
import functools
import statistics
import time

import card
import jax
import jax.numpy as jnp
import numpy as np
import peer
from flax import nnx
from options import CACHE_DTYPES, make_parser, read_config, read_mesh

from grokjax import Grok, KVCache, decode, init, prefill
from grokjax.planning import StepCost, step_cost

# Steps that a device is given before the host waits for the last.
_QUEUED = 8


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each row's prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded after it")
    parser.add_argument("--max-len", type=int, help="entries allocated in the cache (default: prompt + new)")
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="(default: float32 on CPUs, else bfloat16)")
    parser.add_argument("--quantized-table", action="store_true", help="the embedding table in int8 too")
    parser.add_argument("--repeats", type=int, default=3, help="of prefill and of the whole decode")
    peer.add_argument(parser)
    return parser.parse_args()


@functools.partial(jax.jit, donate_argnums=2)
def greedy_step(model: Grok, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    logits, cache = decode(model, tokens, cache)
    return logits.argmax(axis=-1).astype(jnp.int32), cache


class Runner:
    """The two things that are timed, on fresh caches."""

    def __init__(self, model: Grok, arguments: argparse.Namespace):
        self.model, self.new, self.cache_dtype = model, arguments.new, arguments.cache_dtype
        shape = (arguments.batch, arguments.prompt)
        self.prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, shape)
        self.lengths = np.full(arguments.batch, arguments.prompt)
        self.max_len = arguments.max_len or arguments.prompt + arguments.new + 1

    def new_cache(self) -> KVCache:
        return self.model.new_cache(len(self.lengths), self.max_len, dtype=self.cache_dtype)

    def prefill(self) -> tuple[jax.Array, KVCache]:
        logits, cache = prefill(self.model, self.prompts, self.lengths, self.new_cache())
        return logits.argmax(axis=-1).astype(jnp.int32), cache

    def decode_steps(self) -> list[float]:
        """Seconds of a step after a prefill, each the mean of some that the device was given together."""
        tokens, cache = jax.block_until_ready(self.prefill())
        times = []
        for done in range(0, self.new, _QUEUED):
            number = min(_QUEUED, self.new - done)
            start = time.perf_counter()
            for _ in range(number):
                tokens, cache = greedy_step(self.model, tokens, cache)
            jax.block_until_ready(tokens)
            times.append((time.perf_counter() - start) / number)
        return times


class PeerRunner:
    """The same two things of the peer."""

    def __init__(self, runner: Runner):
        self.prompts, self.new = runner.prompts, runner.new
        self.peer = peer.LlamaCpp(runner.model, rows=len(runner.prompts), max_len=runner.max_len)
        self.difference = peer.difference(runner.model, self.peer)

    def prefill(self) -> np.ndarray:
        return self.peer.prefill(self.prompts).argmax(axis=-1)

    def decode_steps(self) -> list[float]:
        tokens = self.prefill()
        times = []
        for i in range(self.new):
            start = time.perf_counter()
            tokens = self.peer.decode(tokens, self.prompts.shape[1] + i).argmax(axis=-1)
            times.append(time.perf_counter() - start)
        return times


def time_in_turn(runners: list[Runner | PeerRunner], repeats: int) -> list[tuple[float, float]]:
    """Median seconds of a prefill and of a step of each, which are timed in turn."""
    prefills, steps = [[] for _ in runners], [[] for _ in runners]
    for _ in range(repeats):
        for i, runner in enumerate(runners):
            prefills[i].append(card.seconds(runner.prefill))
            steps[i] += runner.decode_steps()
    return [(statistics.median(p), statistics.median(s)) for p, s in zip(prefills, steps, strict=True)]


def main() -> None:
    arguments = parse_arguments()
    config = read_config(arguments, longest=arguments.max_len or arguments.prompt + arguments.new + 1)
    mesh = read_mesh(arguments)
    dtype = jnp.dtype(arguments.dtype)
    bandwidth = card.read_bandwidth(mesh)  # first: what it reads is not beside the model when memory is highest
    table = arguments.quantized_table
    model = init(config, mesh=mesh, dtype=dtype, quantized=not arguments.plain, quantized_table=table)
    runner = Runner(model, arguments)
    filled = arguments.prompt + arguments.new // 2
    cache_dtype = runner.new_cache().keys.dtype
    needed = step_cost(model, batch_size=arguments.batch, filled=filled, cache_dtype=cache_dtype)
    print_card(arguments, needed, bandwidth / mesh.size)

    compile_seconds = card.seconds(runner.prefill) + card.seconds(lambda: greedy_step(model, *runner.prefill())[0])
    runners = [runner, PeerRunner(runner)] if arguments.peer else [runner]
    (prefill_seconds, step_seconds), *others = time_in_turn(runners, arguments.repeats)
    record = {
        "benchmark": "decode",
        "config": arguments.config,
        "layers": config.num_layers,
        "batch_size": arguments.batch,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "dtype": arguments.dtype,
        "quantized": not arguments.plain,
        "quantized_table": arguments.quantized_table,
        "cache_dtype": cache_dtype.name,
        "mesh": arguments.mesh,
        "compile_seconds": round(compile_seconds, 2),
        "prefill_tokens_per_second": round(arguments.batch * arguments.prompt / prefill_seconds, 2),
        "decode_tokens_per_second": round(arguments.batch / step_seconds, 2),
        "decode_step_seconds": round(step_seconds, 6),
        "step_bytes": int(needed.num_bytes * mesh.size),
        "read_bandwidth": int(bandwidth),
        "percent_of_bandwidth": round(100 * needed.num_bytes * mesh.size / step_seconds / bandwidth, 1),
        "weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))),
        "peak_memory_bytes": card.peak_memory(mesh),
        **card.environment(),
    }
    for peer_prefill, peer_step in others:
        record |= {
            "peer_prefill_tokens_per_second": round(arguments.batch * arguments.prompt / peer_prefill, 2),
            "peer_decode_tokens_per_second": round(arguments.batch / peer_step, 2),
            "prefill_ratio": round(peer_prefill / prefill_seconds, 3),
            "decode_ratio": round(peer_step / step_seconds, 3),
            "peer_difference": round(runners[1].difference, 4),
        }
    print_results(record)
    card.print_json(record)


def print_card(arguments: argparse.Namespace, needed: StepCost, bandwidth: float) -> None:
    weights = "plain" if arguments.plain else "int8"
    card.print_rows(
        f"{arguments.config}, {weights} weights, {arguments.dtype}, batch {arguments.batch}, mesh {arguments.mesh}",
        {
            "attention weights read a step": f"{needed.attention / 1e6:.1f} MB a device",
            "expert weights read a step": f"{needed.experts / 1e6:.1f} MB",
            "unembedding read a step": f"{needed.unembedding / 1e6:.1f} MB",
            "cache read a step": f"{needed.cache / 1e6:.1f} MB",
            "operations a step": f"{needed.operations / 1e9:.2f} GFLOP",
            "measured read bandwidth": f"{bandwidth / 1e9:.1f} GB/s a device",
            "ceiling": f"{arguments.batch * bandwidth / needed.num_bytes:.1f} tokens/s decoded",
        },
    )


def print_results(record: dict) -> None:
    if "decode_ratio" in record:
        card.print_rows(
            "llama.cpp on the same weights, in turn",
            {
                "prefill": f"{record['peer_prefill_tokens_per_second']} tokens/s, ours {record['prefill_ratio']} x",
                "decode": f"{record['peer_decode_tokens_per_second']} tokens/s, ours {record['decode_ratio']} x",
                "difference of the logits": f"{record['peer_difference']} of their size",
            },
        )
    card.print_rows(
        "medians",
        {
            "compilation": f"{record['compile_seconds']} s, the first prefill and step included",
            "prefill": f"{record['prefill_tokens_per_second']} tokens/s",
            "decode": f"{record['decode_tokens_per_second']} tokens/s",
            "decode step": f"{1e3 * record['decode_step_seconds']:.2f} ms",
            "of the bandwidth ceiling": f"{record['percent_of_bandwidth']} %",
            "peak memory": f"{record['peak_memory_bytes'] / 2**30:.2f} GiB",
            "of it beyond the weights": f"{(record['peak_memory_bytes'] - record['weights_bytes']) / 2**30:.2f} GiB",
        },
    )


if __name__ == "__main__":
    main()
