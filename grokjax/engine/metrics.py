"""What an engine measures of itself: counters and windows of recent times, and the snapshot that they give."""

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np

# Recent values that percentiles are taken of: enough for the 99th, and bounded.
_WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """How long something took lately: 50, 90 and 99 percent of the recent values are at most so many seconds.

    Attributes:
      p50: the median; None where there were no values, as are the others.
      p90: the 90th percentile.
      p99: the 99th percentile.
    """

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles":
        """The percentiles of some values in seconds."""
        array = np.fromiter(values, float)
        if not array.size:
            return cls(None, None, None)
        return cls(*(float(value) for value in np.percentile(array, (50, 90, 99))))


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
      busy_seconds: spent inside `step`.
      tokens_per_second: new tokens over busy seconds.
      prefill_share: part of the busy time that prefill took. A step that prefills and decodes counts as prefill what it
        takes beyond the mean step that only decodes.
      decode_share: the rest of it.
      first_token: seconds from submission to first token, of the last 4096 requests.
      between_tokens: seconds between two tokens of a sample, of the last 4096.
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
    busy_seconds: float
    tokens_per_second: float
    prefill_share: float
    decode_share: float
    first_token: Percentiles
    between_tokens: Percentiles


class Meter:
    """Counts what `Metrics` tells; its memory does not grow."""

    def __init__(self) -> None:
        self.steps = self.prompts = self.prompt_tokens = self.reused_tokens = self.prefix_hits = self.new_tokens = 0
        self.finished: collections.Counter[str] = collections.Counter()
        self._busy = self._prefill = self._decode = 0.0
        self._decode_steps = 0
        self._first_token: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._between: collections.deque[float] = collections.deque(maxlen=_WINDOW)

    def note_prompt(self, length: int, reused: int) -> None:
        """Counts a prompt that got a slot, and how many of its tokens were taken from another request's row."""
        self.prompts += 1
        self.prompt_tokens += length
        self.reused_tokens += reused
        self.prefix_hits += reused > 0

    def note_token(self, seconds: float, *, is_first: bool) -> None:
        """Counts a token that was given out.

        Args:
          seconds: after the submission, for the first token of a sample; for others, after the token before.
          is_first: whether it is the first of its sample.
        """
        self.new_tokens += 1
        (self._first_token if is_first else self._between).append(seconds)

    def note_step(self, seconds: float, *, prefilled: bool, decoded: bool) -> None:
        """Counts a step, its time, and whether it dispatched a prefill and a decode step."""
        self.steps += 1
        self._busy += seconds
        if decoded and not prefilled:
            self._decode += seconds
            self._decode_steps += 1
        elif prefilled:
            usual = self._decode / self._decode_steps if decoded and self._decode_steps else 0.0
            self._prefill += max(0.0, seconds - usual)

    def snapshot(self, *, queue_length: int, active_slots: int, cache_occupancy: float) -> Metrics:
        """What was counted so far, with what the engine does now."""
        busy = self._busy or 1.0
        return Metrics(
            queue_length=queue_length,
            active_slots=active_slots,
            cache_occupancy=cache_occupancy,
            steps=self.steps,
            finished=dict(self.finished),
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            prefix_hits=self.prefix_hits,
            prefix_hit_rate=self.prefix_hits / max(1, self.prompts),
            new_tokens=self.new_tokens,
            busy_seconds=self._busy,
            tokens_per_second=self.new_tokens / busy,
            prefill_share=self._prefill / busy,
            decode_share=(self._busy - self._prefill) / busy,
            first_token=Percentiles.of(self._first_token),
            between_tokens=Percentiles.of(self._between),
        )
