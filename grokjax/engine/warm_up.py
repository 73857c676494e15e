"""Steps of an engine compiled side by side and run once, so that none has to be compiled while requests wait."""

import contextlib
import dataclasses
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from grokjax.engine.protocol import Steps
from grokjax.model import SlotSettings

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WarmedStep:
    """A step that is compiled.

    Attributes:
      name: of the step, as in `Steps`.
      shape: rows and tokens of what it prefills, with how many most probable tokens it finds for each if it does; slots
        for the steps over all of them, with the tokens of each where a step guesses; nothing for others.
      seconds: that it was waited for: until it was compiled, beside others, and had run once.
    """

    name: str
    shape: tuple[int, ...]
    seconds: float


def warm_up(
    steps: Steps,
    buckets: Sequence[int],
    row_counts: Sequence[int],
    guesses: Sequence[int],
    *,
    is_whole: bool,
    cache_dir: str | os.PathLike[str] | None,
    clock: Callable[[], float],
    progress: Callable[[WarmedStep, int, int], None] | None = None,
) -> tuple[WarmedStep, ...]:
    """Compiles steps in each shape, as many at once as there are processors, and runs each; what rows held is lost.

    Args:
      steps: those of an idle engine.
      buckets: padded lengths of chunks of prompts.
      row_counts: how many of them may be prefilled together.
      guesses: how many tokens a step may guess, 0 among them; nothing for steps that do not guess.
      is_whole: all steps, not only those that every request needs.
      cache_dir: directory of the persistent compilation cache; None leaves it to the user's setting.
      clock: seconds.
      progress: called with each step as soon as it is compiled, how many are, and how many there will be; without it
        the logger is told.
    """
    warmed: list[WarmedStep] = []
    runs = [run for run in _runs(steps, buckets, row_counts, guesses) if is_whole or run[0] in _ALWAYS]
    with _cache(cache_dir), _side_by_side() as threads:
        # Lowered by one thread: several would make another program of a step at each start, which no cache has.
        compilations = [threads.submit(steps.lower(name, shape)) for name, shape, _ in runs]
        for (name, shape, run), compilation in zip(runs, compilations, strict=True):
            start = clock()
            compilation.result()
            run()
            # The steps wait for each other, so what is read from this one comes after the one before.
            steps.begin(SlotSettings.of({}, steps.slots)).read()
            warmed.append(WarmedStep(name, shape, clock() - start))
            (progress or _log_step)(warmed[-1], len(warmed), len(runs))
    return tuple(warmed)


def _log_step(step: WarmedStep, done: int, total: int) -> None:
    shape = " x ".join(map(str, step.shape))
    _LOGGER.info("compiled %d of %d steps: %s%s in %.1f s", done, total, step.name, shape and f" {shape}", step.seconds)


@contextlib.contextmanager
def _side_by_side() -> Iterator[ThreadPoolExecutor]:
    """Threads that compile; where one fails, or the user interrupts, what has not begun is left."""
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cache(directory: str | os.PathLike[str] | None) -> Iterator[None]:
    """A persistent cache: of the directory, else the user's, else a passing one.

    Where a step finds the cache of keys and values placed by another than when it was lowered, JAX 0.10 finds what is
    compiled only in a persistent cache.
    """
    if directory is None and jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    with contextlib.ExitStack() as stack:
        folder = directory or stack.enter_context(tempfile.TemporaryDirectory(prefix="grokjax-"))
        stack.enter_context(persistent_cache(folder))
        yield


@contextlib.contextmanager
def persistent_cache(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Within it, JAX keeps everything that it compiles in a directory, and takes from there what it finds."""
    wanted = {
        "jax_compilation_cache_dir": os.fspath(directory),
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, object]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    # JAX decides once whether it has a cache, unless it is told to think again.
    compilation_cache.reset_cache()


# Steps that every request needs.
_ALWAYS = ("begin", "decode", "decode_guesses", "prefill")


def _runs(
    steps: Steps, buckets: Sequence[int], row_counts: Sequence[int], guesses: Sequence[int]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], object]]]:
    """Name, shape and a run of each step; `begin`, which ends each of them, is the first."""
    nothing = SlotSettings.of({}, steps.slots)
    yield "begin", (steps.slots,), lambda: None
    if not guesses:
        yield "decode", (steps.slots,), functools.partial(steps.decode, nothing)
    for number in guesses:
        limits = np.zeros((steps.slots, 2), np.int32)
        run = functools.partial(steps.decode_guesses, nothing, limits, number)
        yield "decode_guesses", (steps.slots, 1 + number), run
    yield "share", (), functools.partial(steps.share, 0, 0, 0)
    yield "set_bias", (), functools.partial(steps.set_bias, 0, np.zeros(steps.vocab_size, np.float32))
    for bucket in buckets:
        for count in row_counts:
            tokens, ones = np.zeros((count, bucket), np.int32), np.ones(count, np.int32)
            rows = np.arange(count, dtype=np.int32)
            yield "prefill", (count, bucket), functools.partial(steps.prefill, tokens, ones, 0 * ones, rows)
        line = np.zeros(bucket, np.int32)
        for num_top in sorted({0, steps.num_top}):
            score = functools.partial(steps.score, line, line, 1, 0, 0, wants_top=num_top > 0)
            yield "score", (1, bucket, *([num_top] if num_top else [])), score
