"""Tokens a second of an engine with and without guesses, on text that repeats and on text that does not.

`python benchmarks/guessing.py` serves `GrokConfig.bench_1b()` in int8. It prints medians, and last one JSON line
with the keys `config`, `layers`, `slots`, `prompt`, `new`, `guesses`, `dtype`, `quantized`, `mesh`,
`copied_plain_tokens_per_second`, `copied_guessing_tokens_per_second`, `copied_ratio`, `copied_accepted`,
`random_plain_tokens_per_second`, `random_guessing_tokens_per_second`, `random_ratio`, `random_accepted` and the
environment. What is accepted is the part of all tokens that were guessed.

* Copied: a document is the prompt, and the text is the same document with every 25th token another one.
* Random: every token is drawn at random.

A model with random weights copies nothing. So the text is written beforehand: everything is computed and drawn as ever,
and then the token of the written text is taken in place of the drawn one. Both engines serve the same texts in turn.
The prompts of a run are prefilled together, so that its texts begin and end together.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import card
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from options import make_parser, read_config, read_mesh

from grokjax import Grok, init
from grokjax.engine import Engine
from grokjax.request import Request
from grokjax.sampling import SampleOutput

# Of a copied document, every so many tokens one is another.
_CHANGED_EVERY = 25
# A row is told by its temperature, which is exact in float32: an engine gives a request any free slot.
_COOLEST, _WARMER = 1.0, 1 / 64


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--slots", type=int, default=1, help="requests that run at once, a power of two")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each document")
    parser.add_argument("--new", type=int, default=192, help="tokens of each text, at most as many")
    parser.add_argument("--guesses", type=int, default=15, help="tokens that a step may guess")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    return parser.parse_args()


class WritingGrok(Grok):
    """A model that draws, and then writes what is written in `text`, int32 [B, S], in the line of the temperature."""

    text: nnx.Variable[jax.Array]

    def sample(self, logits: jax.Array, settings: Any, *, positions: jax.Array, **options: Any) -> SampleOutput:
        drawn = super().sample(logits, settings, positions=positions, **options)
        lines = ((settings.temperature - _COOLEST) / _WARMER).astype(jnp.int32)
        written = self.text[...].at[lines, positions].get(mode="clip")
        # What is drawn is never negative, which the compiler does not know: else it would not draw.
        return dataclasses.replace(drawn, token_id=jnp.where(drawn.token_id < 0, drawn.token_id, written))


class Bench:
    """Two engines over one model, one of which guesses."""

    def __init__(self, model: Grok, arguments: argparse.Namespace):
        self.slots, self.prompt, self.new = arguments.slots, arguments.prompt, arguments.new
        self.random, self.vocab_size = np.random.default_rng(0), model.config.vocab_size
        self.max_len = self.prompt + self.new
        model.__class__ = WritingGrok
        model.text = nnx.Variable(jnp.zeros((self.slots, self.max_len), jnp.int32))
        self.model = model
        together = {"prefill_buckets": (self.prompt,), "prefill_rows": self.slots}
        options = {"slots": self.slots, "max_len": self.max_len, "reuse_prefixes": False, **together}
        self.engines = [Engine(model, max_guesses=guesses, **options) for guesses in (0, arguments.guesses)]

    def warm_up(self) -> None:
        """Compiles what a lone request needs, and by a first run what the requests need together."""
        for engine in self.engines:
            engine.warm_up(prompt_len=self.prompt)
            self.run(engine, self.texts("random"))

    def texts(self, name: str) -> np.ndarray:
        """Prompts and what follows them, int32 [B, S]."""
        texts = self.random.integers(3, self.vocab_size, (self.slots, self.max_len), dtype=np.int32)
        if name == "copied":
            changed = np.arange(self.new) % _CHANGED_EVERY == _CHANGED_EVERY - 1
            texts[:, self.prompt :] = np.where(changed, texts[:, self.prompt :], texts[:, : self.new])
        return texts

    def run(self, engine: Engine, texts: np.ndarray) -> tuple[float, float]:
        """Tokens a second after the first ones, and the part of them that was guessed."""
        self.model.text[...] = jnp.asarray(texts)
        before = engine.metrics()
        handles = [engine.submit(self.request(*line)) for line in enumerate(texts)]
        while not all(handle.pieces for handle in handles):
            engine.step()
        done, start = sum(len(handle.pieces) for handle in handles), time.perf_counter()
        engine.run()
        seconds = time.perf_counter() - start
        for handle, text in zip(handles, texts, strict=True):
            assert list(handle.completion.token_ids) == text[self.prompt :].tolist()
        number = self.slots * self.new
        return (number - done) / seconds, (engine.metrics().accepted_tokens - before.accepted_tokens) / number

    def request(self, line: int, text: np.ndarray) -> Request:
        temperature = _COOLEST + line * _WARMER
        return Request(text[: self.prompt].tolist(), max_new_tokens=self.new, temperature=temperature, ignore_eos=True)

    def measure(self, name: str, repeats: int) -> dict[str, float]:
        """In turns, so that a machine whose speed drifts is fair to both."""
        found: list[list[tuple[float, float]]] = [[], []]
        for _ in range(repeats):
            texts = self.texts(name)
            for engine, runs in zip(self.engines, found, strict=True):
                runs.append(self.run(engine, texts))
        plain, guessing = (statistics.median(speed for speed, _ in runs) for runs in found)
        return {
            f"{name}_plain_tokens_per_second": round(plain, 2),
            f"{name}_guessing_tokens_per_second": round(guessing, 2),
            f"{name}_ratio": round(guessing / plain, 3),
            f"{name}_accepted": round(statistics.median(part for _, part in found[1]), 3),
        }


def main() -> None:
    arguments = parse_arguments()
    if arguments.new > arguments.prompt:
        raise SystemExit(f"--new {arguments.new} must be at most --prompt {arguments.prompt}: the text copies it.")
    if arguments.slots & (arguments.slots - 1):
        raise SystemExit(f"--slots {arguments.slots} must be a power of two: so many prompts are prefilled together.")
    config = read_config(arguments, longest=arguments.prompt + arguments.new)
    model = init(config, mesh=read_mesh(arguments), dtype=jnp.dtype(arguments.dtype), quantized=not arguments.plain)
    bench = Bench(model, arguments)
    bench.warm_up()
    record = {
        "benchmark": "guessing",
        "layers": config.num_layers,
        **{name: getattr(arguments, name) for name in ("config", "slots", "prompt", "new", "guesses", "dtype", "mesh")},
        "quantized": not arguments.plain,
        **bench.measure("copied", arguments.repeats),
        **bench.measure("random", arguments.repeats),
        **card.environment(),
    }
    card.print_rows(
        f"{arguments.config}, {arguments.slots} slots, up to {arguments.guesses} guesses, medians",
        {
            name: f"{record[f'{name}_guessing_tokens_per_second']} tokens/s, {record[f'{name}_ratio']} x the "
            f"{record[f'{name}_plain_tokens_per_second']} without guesses, {record[f'{name}_accepted']:.0%} guessed"
            for name in ("copied", "random")
        },
    )
    card.print_json(record)


if __name__ == "__main__":
    main()
