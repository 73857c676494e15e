"""What an engine measures of itself: counters and histograms, and the snapshot that they give."""

import bisect
import collections
import dataclasses
import itertools
from typing import Any

from grokjax.engine.scheduler import Scheduler

# Upper bounds in seconds, from a millisecond to a quarter of an hour, three for each power of ten.
_BOUNDS = (*(digits * 10.0**power for power in range(-3, 3) for digits in (1, 2.5, 5)), 1000.0)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many of some times were how long, since the engine was made.

    Attributes:
      bounds: seconds, ascending.
      counts: for each bound, the times that are at most that long and longer than the bound before; then those that are
        longer than all bounds.
      total: their sum, in seconds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many times there are."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """The mean of the times, in seconds; None where there are none."""
        return self.total / self.count if self.count else None

    def quantile(self, part: float) -> float | None:
        """About the time that this part of all, from 0 to 1, does not exceed, in seconds; None where there are none.

        It is estimated as Prometheus does: between two bounds the times count as spread evenly, and a time that is
        longer than the last bound counts as that bound.

        Raises:
          ValueError: The part is not between 0 and 1.
        """
        if not 0 <= part <= 1:
            raise ValueError(f"the part {part!r} must be from 0 to 1, such as 0.99.")
        if not self.count:
            return None
        rank, ends = part * self.count, list(itertools.accumulate(self.counts))
        found = next(i for i, end in enumerate(ends) if end >= rank and self.counts[i])
        start, end = (0.0, *self.bounds, self.bounds[-1])[found : found + 2]
        return end - (end - start) * (ends[found] - rank) / self.counts[found]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """What an engine does at one moment, and what it did since it was made.

    Attributes:
      queue_length: requests that wait for a slot.
      active_slots: slots that hold a running request.
      cache_occupancy: filled entries of running requests, as a fraction of all entries.
      steps: made so far.
      finished: samples that ended, by finish reason.
      prompt_tokens: tokens of the prompts that got a slot.
      reused_tokens: how many of them were taken from another request's row.
      prefix_hits: prompts that began from another request's row.
      prefix_hit_rate: these, as a fraction of all prompts that got a slot.
      new_tokens: tokens drawn and given out.
      guessed_tokens: tokens that steps guessed and the model ran over.
      accepted_tokens: how many of them were drawn: tokens that took no step of their own.
      busy_seconds: spent inside `step`.
      prefill_seconds: how many of them prefill took. A step that prefills and decodes counts as prefill what it takes
        beyond the mean step that only decodes.
      tokens_per_second: new tokens over busy seconds.
      prefill_share: prefill seconds over busy seconds.
      decode_share: the rest of it.
      queue: seconds from submission to a slot, of the samples that got one.
      first_token: seconds from submission to first token, of the samples that have one.
      between_tokens: seconds between two tokens of a sample.
      total: seconds from submission to the end, of the samples that ended.
    """

    queue_length: int
    active_slots: int
    cache_occupancy: float
    steps: int
    finished: dict[str, int]
    prompt_tokens: int
    reused_tokens: int
    prefix_hits: int
    prefix_hit_rate: float
    new_tokens: int
    guessed_tokens: int
    accepted_tokens: int
    busy_seconds: float
    prefill_seconds: float
    tokens_per_second: float
    prefill_share: float
    decode_share: float
    queue: Histogram
    first_token: Histogram
    between_tokens: Histogram
    total: Histogram


class _Times:
    """A histogram that grows."""

    def __init__(self) -> None:
        self._counts, self._total = [0] * (len(_BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        self._total += seconds

    def snapshot(self) -> Histogram:
        return Histogram(_BOUNDS, tuple(self._counts), self._total)


class Meter:
    """Counts what `Metrics` tells; its memory does not grow, and any thread may take a snapshot.

    Args:
      scheduler: of the same engine: who waits and who runs.
    """

    def __init__(self, scheduler: Scheduler[Any]) -> None:
        self._scheduler = scheduler
        self.steps = self.prompts = self.prompt_tokens = self.reused_tokens = self.prefix_hits = self.new_tokens = 0
        self.guessed_tokens = self.accepted_tokens = 0
        self._finished: collections.Counter[str] = collections.Counter()
        self._busy = self._prefill = self._decode = 0.0
        self._decode_steps = 0
        self._queue, self._first_token, self._between, self._total = _Times(), _Times(), _Times(), _Times()

    def note_prompt(self, length: int, reused: int, waited: float) -> None:
        """Counts a prompt that got a slot, how many of its tokens another row gave, and how many seconds it waited."""
        self.prompts += 1
        self.prompt_tokens += length
        self.reused_tokens += reused
        self.prefix_hits += reused > 0
        self._queue.add(waited)

    def note_token(self, seconds: float, *, is_first: bool) -> None:
        """Counts a token that was given out.

        Args:
          seconds: after the submission, for the first token of a sample; for others, after the token before.
          is_first: whether it is the first of its sample.
        """
        self.new_tokens += 1
        (self._first_token if is_first else self._between).add(seconds)

    def note_guesses(self, tried: int, right: int) -> None:
        """Counts guesses that a row tried in a step, and how many of them were right."""
        self.guessed_tokens += tried
        self.accepted_tokens += right

    def note_end(self, reason: str, seconds: float) -> None:
        """Counts a sample that has ended, and its time since the submission."""
        self._finished[reason] += 1
        self._total.add(seconds)

    def note_step(self, seconds: float, *, prefilled: bool, decoded: bool, is_first: bool = False) -> None:
        """Counts a step, its time, and whether it dispatched a prefill and a decode step.

        The first decode step of all may have been compiled, so the others are not measured by it.
        """
        self.steps += 1
        self._busy += seconds
        if decoded and not prefilled and not is_first:
            self._decode += seconds
            self._decode_steps += 1
        elif prefilled:
            usual = self._decode / self._decode_steps if decoded and self._decode_steps else 0.0
            self._prefill += max(0.0, seconds - usual)

    def snapshot(self) -> Metrics:
        """What was counted so far, with what the engine does now."""
        busy, scheduler = self._busy or 1.0, self._scheduler
        return Metrics(
            queue_length=scheduler.num_waiting,
            active_slots=scheduler.num_running,
            cache_occupancy=scheduler.occupancy,
            steps=self.steps,
            finished=dict(self._finished),
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            prefix_hits=self.prefix_hits,
            prefix_hit_rate=self.prefix_hits / max(1, self.prompts),
            new_tokens=self.new_tokens,
            guessed_tokens=self.guessed_tokens,
            accepted_tokens=self.accepted_tokens,
            busy_seconds=self._busy,
            prefill_seconds=self._prefill,
            tokens_per_second=self.new_tokens / busy,
            prefill_share=self._prefill / busy,
            decode_share=(self._busy - self._prefill) / busy,
            queue=self._queue.snapshot(),
            first_token=self._first_token.snapshot(),
            between_tokens=self._between.snapshot(),
            total=self._total.snapshot(),
        )
