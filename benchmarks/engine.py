"""The engine against the bare decode loop, in one run: throughput, host overhead, waiting times.

`python benchmarks/engine.py` serves `GrokConfig.bench_1b()` in int8 with 8 slots. It prints a card of what one step
must read, then medians, and last one JSON line with the keys `config`, `layers`, `slots`, `requests`, `prompt`,
`new`, `chunk`, `dtype`, `quantized`, `mesh`, `warm_up_seconds`, `bare_tokens_per_second`, `full_tokens_per_second`,
`fraction_of_bare`,
`host_seconds_per_step`, `host_percent_of_step`, `all_at_once_new_tokens_per_second`,
`all_at_once_total_tokens_per_second`, `poisson_rate`, `poisson_new_tokens_per_second`, `first_token_p50`,
`first_token_p99`, `between_tokens_p50`, `between_tokens_p99`, `first_token_idle`, `chunk_seconds`, `chunks_later`,
`chunks_later_beside_decoding` and the environment.

* `bare`: `decode_and_sample` in a loop over as many rows, each token read one step later.
* `full`: the engine with every slot busy and nothing to prefill; `fraction_of_bare` compares the two.
* `host`: time of a step of the engine in which it does not wait for the device.
* `all_at_once` and `poisson`: requests of mixed lengths, up to `prompt` and `new` tokens, all there at the start or
  arriving at random at 0.7 of the rate that all at once were served at; waiting times are those of the latter.
* `chunks_later`: how much later than on an idle engine the first token of a short request comes, one that arrives at a
  random moment while a long prompt is being prefilled in chunks of `chunk` tokens; in times of a chunk, the median and
  the most. `chunks_later_beside_decoding`: the same when another request runs, in times of a chunk and a decode step.
"""

import argparse
import statistics
import time

import card
import jax
import jax.numpy as jnp
import numpy as np
from options import make_parser, read_config, read_mesh

from grokjax import Grok, KVCache, SampleSettings, decode_and_sample, init, prefill
from grokjax.engine import Engine
from grokjax.model import ModelSteps, SlotOptions
from grokjax.planning import step_cost
from grokjax.request import Request


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--slots", type=int, default=8, help="requests that run at once")
    parser.add_argument("--requests", type=int, default=24, help="of mixed lengths")
    parser.add_argument("--prompt", type=int, default=128, help="longest prompt")
    parser.add_argument("--new", type=int, default=32, help="longest continuation")
    parser.add_argument("--chunk", type=int, default=64, help="largest chunk of a prompt")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    return parser.parse_args()


class TimedSteps(ModelSteps):
    """The model's steps; `waited` adds up the seconds in which the host waits for tokens."""

    waited = 0.0

    def begin(self, settings):
        return TimedTokens(self, super().begin(settings))

    def decode(self, settings):
        return TimedTokens(self, super().decode(settings))


class TimedTokens:
    def __init__(self, steps: TimedSteps, pending):
        self.steps, self.pending = steps, pending

    def read(self):
        start = time.perf_counter()
        drawn = self.pending.read()
        self.steps.waited += time.perf_counter() - start
        return drawn


class Bench:
    """One engine and the random requests that it is measured with."""

    def __init__(self, model: Grok, arguments: argparse.Namespace):
        self.model, self.slots, self.new, self.chunk = model, arguments.slots, arguments.new, arguments.chunk
        self.prompt, self.count = arguments.prompt, arguments.requests
        self.max_len = min(model.config.max_seq_len, 4 * self.chunk + self.prompt + self.new)
        self.random = np.random.default_rng(0)
        buckets = sorted({bucket for bucket in (16, 64, 256) if bucket < self.chunk} | {self.chunk})
        self.engine = Engine(
            model, slots=self.slots, max_len=self.max_len, prefill_buckets=buckets, make_steps=self.make_steps
        )

    def make_steps(self, model: Grok, options: SlotOptions) -> TimedSteps:
        self.steps = TimedSteps(model, options)
        return self.steps

    def request(self, prompt: int, new: int) -> Request:
        tokens = self.random.integers(3, self.model.config.vocab_size, prompt).tolist()
        return Request(tokens, max_new_tokens=new, ignore_eos=True, seed=int(self.random.integers(0, 2**32)))

    def mixed(self) -> list[Request]:
        """Requests of every length from an eighth of the longest on."""
        lengths = self.random.integers([self.prompt // 8, self.new // 8], [self.prompt, self.new], (self.count, 2))
        return [self.request(max(1, prompt), max(1, new)) for prompt, new in (lengths + 1).tolist()]

    def bare_step(self) -> float:
        """Median seconds of a step of the bare loop."""
        tokens = self.random.integers(3, self.model.config.vocab_size, (self.slots, 16))
        cache = KVCache.create(
            self.model.config,
            self.slots,
            self.max_len,
            dtype=jnp.float32 if self.model.dtype == jnp.float32 else None,
            mesh=self.model.partitioner.mesh,
        )
        logits, cache = prefill(self.model, tokens, np.full(self.slots, 16), cache)
        last = logits.argmax(axis=-1).astype(jnp.int32)
        settings, keys = SampleSettings.create(self.slots), jax.random.split(jax.random.key(0), self.slots)
        times = []
        for _ in range(self.new):
            start = time.perf_counter()
            drawn, cache = decode_and_sample(self.model, last, cache, settings, keys)
            np.asarray(last)
            last = drawn.token_id
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def full_step(self) -> tuple[float, float]:
        """Median seconds of a step with every slot busy, and of its part that is not waiting."""
        handles = [self.engine.submit(self.request(16, self.new)) for _ in range(self.slots)]
        while not all(len(handle.pieces) for handle in handles):
            self.engine.step()
        whole, host = [], []
        for _ in range(self.new - self.slots - 3):
            waited, start = self.steps.waited, time.perf_counter()
            self.engine.step()
            whole.append(time.perf_counter() - start)
            host.append(whole[-1] - (self.steps.waited - waited))
        self.engine.run()
        return statistics.median(whole), statistics.median(host)

    def all_at_once(self) -> tuple[float, float, float]:
        """New tokens, all tokens and requests a second."""
        requests = self.mixed()
        start = time.perf_counter()
        handles = [self.engine.submit(request) for request in requests]
        self.engine.run()
        seconds = time.perf_counter() - start
        new = sum(len(handle.completion.token_ids) for handle in handles)
        total = new + sum(len(request.prompt) for request in requests)
        return new / seconds, total / seconds, len(requests) / seconds

    def poisson(self, rate: float) -> tuple[float, list[float], list[float]]:
        """New tokens a second, seconds to each first token, seconds between tokens, at `rate` requests a second."""
        requests = self.mixed()
        due = np.cumsum(self.random.exponential(1 / rate, len(requests))).tolist()
        handles, start = [], time.perf_counter()
        while len(handles) < len(requests) or self.engine.has_work:
            while len(handles) < len(requests) and time.perf_counter() - start >= due[len(handles)]:
                handles.append(self.engine.submit(requests[len(handles)]))
            if self.engine.has_work:
                self.engine.step()
            else:
                time.sleep(max(0.0, due[len(handles)] - (time.perf_counter() - start)))
        seconds = time.perf_counter() - start
        done = [handle.completion for handle in handles]
        first = [one.timings.first_token for one in done]
        between = [one.timings.decode / (len(one.token_ids) - 1) for one in done if len(one.token_ids) > 1]
        return sum(len(one.token_ids) for one in done) / seconds, first, between

    def first_token_idle(self) -> float:
        """Seconds until the first token of a short request, alone."""
        handle = self.engine.submit(self.request(8, 2))
        self.engine.run()
        return handle.completion.timings.first_token

    def first_token_behind(self, *, running: int, step_seconds: float) -> float:
        """Seconds from the arrival of a short request, during the prefill of a long prompt, until its first token.

        It arrives at a random moment of the first three of four steps, and is given to the engine after that step.
        """
        others = [self.engine.submit(self.request(8, self.new)) for _ in range(running)]
        while not all(other.pieces for other in others):
            self.engine.step()
        self.engine.submit(self.request(4 * self.chunk, 1))
        due = time.perf_counter() + self.random.uniform(0, 3 * step_seconds)
        while time.perf_counter() < due:
            self.engine.step()
        late = time.perf_counter() - due
        handle = self.engine.submit(self.request(8, 2))
        self.engine.run()
        return late + handle.completion.timings.first_token

    def chunk_seconds(self) -> float:
        """Seconds that one chunk of a long prompt takes."""
        handle = self.engine.submit(self.request(4 * self.chunk, 1))
        self.engine.run()
        return handle.completion.timings.prefill / 4


def measure(bench: Bench, repeats: int) -> dict[str, float | list[float]]:
    def median(run) -> float:
        return statistics.median(run() for _ in range(repeats))

    # In turns, so that a machine whose speed drifts is fair to both.
    pairs = [(bench.bare_step(), *bench.full_step()) for _ in range(repeats)]
    bare, full, host = (statistics.median(column) for column in zip(*pairs, strict=True))
    new, total, rate = (
        statistics.median(column) for column in zip(*(bench.all_at_once() for _ in range(repeats)), strict=True)
    )
    poisson, first, between = bench.poisson(0.7 * rate)
    idle, chunk = median(bench.first_token_idle), median(bench.chunk_seconds)

    def later(running: int) -> list[float]:
        step = chunk + running * full
        waits = [bench.first_token_behind(running=running, step_seconds=step) for _ in range(4 * repeats)]
        return [(wait - idle) / step for wait in (statistics.median(waits), max(waits))]

    return {
        "bare_tokens_per_second": bench.slots / bare,
        "full_tokens_per_second": bench.slots / full,
        "fraction_of_bare": bare / full,
        "host_seconds_per_step": host,
        "host_percent_of_step": 100 * host / full,
        "all_at_once_new_tokens_per_second": new,
        "all_at_once_total_tokens_per_second": total,
        "poisson_rate": 0.7 * rate,
        "poisson_new_tokens_per_second": poisson,
        "first_token_p50": float(np.percentile(first, 50)),
        "first_token_p99": float(np.percentile(first, 99)),
        "between_tokens_p50": float(np.percentile(between, 50)),
        "between_tokens_p99": float(np.percentile(between, 99)),
        "first_token_idle": idle,
        "chunk_seconds": chunk,
        "chunks_later": later(0),
        "chunks_later_beside_decoding": later(1),
    }


def main() -> None:
    arguments = parse_arguments()
    if arguments.new < arguments.slots + 6:
        raise SystemExit(
            f"--new {arguments.new} must be at least {arguments.slots + 6}: full steps are measured within it."
        )
    config = read_config(arguments)
    mesh = read_mesh(arguments)
    model = init(config, mesh=mesh, dtype=jnp.dtype(arguments.dtype), quantized=not arguments.plain)
    bench = Bench(model, arguments)
    print_card(arguments, bench, card.read_bandwidth(mesh) / mesh.size)
    warm_up = sum(step.seconds for step in bench.engine.warm_up())
    bench.bare_step()
    record = {
        "benchmark": "engine",
        "layers": config.num_layers,
        **{
            name: getattr(arguments, name)
            for name in ("config", "slots", "requests", "prompt", "new", "chunk", "dtype")
        },
        "quantized": not arguments.plain,
        "mesh": arguments.mesh,
        "warm_up_seconds": round(warm_up, 2),
        **{name: rounded(value) for name, value in measure(bench, arguments.repeats).items()},
        **card.environment(),
    }
    print_results(record)
    card.print_json(record)


def rounded(value: float | list[float]) -> float | list[float]:
    """To five digits."""
    return [rounded(one) for one in value] if isinstance(value, list) else float(f"{value:.5g}")


def print_card(arguments: argparse.Namespace, bench: Bench, bandwidth: float) -> None:
    dtype = bench.model.new_cache(1, 1).keys.dtype  # of the engine's cache, too: nothing else was asked for
    needed = step_cost(bench.model, batch_size=bench.slots, filled=16 + bench.new // 2, cache_dtype=dtype)
    weights = "plain" if arguments.plain else "int8"
    card.print_rows(
        f"{arguments.config}, {weights} weights, {arguments.dtype}, {bench.slots} slots, mesh {arguments.mesh}",
        {
            "read a step": f"{needed.num_bytes / 1e6:.1f} MB a device",
            "operations a step": f"{needed.operations / 1e9:.2f} GFLOP",
            "measured read bandwidth": f"{bandwidth / 1e9:.1f} GB/s a device",
            "ceiling": f"{bench.slots * bandwidth / needed.num_bytes:.1f} tokens/s decoded",
        },
    )


def times(median_and_most: list[float]) -> str:
    return "{:.2f} chunks, at most {:.2f},".format(*median_and_most)


def print_results(record: dict) -> None:
    card.print_rows(
        "medians",
        {
            "warm-up": f"{record['warm_up_seconds']} s, all compilations",
            "bare decode loop": f"{record['bare_tokens_per_second']} tokens/s",
            "engine, all slots busy": f"{record['full_tokens_per_second']} tokens/s",
            "of the bare loop": f"{100 * record['fraction_of_bare']:.1f} %",
            "host, a step": f"{1e3 * record['host_seconds_per_step']:.3f} ms, {record['host_percent_of_step']:.1f} %",
            "all at once": f"{record['all_at_once_new_tokens_per_second']} new tokens/s, "
            f"{record['all_at_once_total_tokens_per_second']} with prompts",
            "Poisson arrivals": f"{record['poisson_new_tokens_per_second']} new tokens/s at {record['poisson_rate']} "
            "requests/s",
            "first token": f"{record['first_token_p50']} s, 99 % within {record['first_token_p99']} s",
            "between tokens": f"{record['between_tokens_p50']} s, 99 % within {record['between_tokens_p99']} s",
            "short request behind a long prompt": f"{times(record['chunks_later'])} later than on an idle engine",
            "the same beside a running request": times(record["chunks_later_beside_decoding"]),
        },
    )


if __name__ == "__main__":
    main()
