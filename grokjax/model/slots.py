"""Between an engine and the steps of its slots, as arrays: how rows are to draw, and what they drew."""

import dataclasses
from collections.abc import Iterable
from typing import Protocol, Self

import numpy as np

from grokjax.request import Request


class HasRequest(Protocol):
    """Something that was made for a request."""

    @property
    def request(self) -> Request:
        """The request."""


class RunningSample(Protocol):
    """A sample that runs in a slot, as far as its draws depend on it.

    Attributes:
      seed: of its draws.
      bias: what is added to its logits, float32 [V]; None for nothing.
    """

    seed: int
    bias: np.ndarray | None

    @property
    def handle(self) -> HasRequest:
        """Whose sample it is."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token as a step drew it: its log-probability, and the most probable tokens with theirs [K]."""

    token_id: int
    logprob: float
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class SlotSettings:
    """How the slots draw; one small array, so that a step takes one copy to the device.

    Attributes:
      packed: int32 [B, 8], bits of: temperature, top-p, min-p (float32), top-k, seed (uint32), and 0 or 1 for: active,
        biased, most probable tokens wanted.
    """

    packed: np.ndarray

    @classmethod
    def of(cls, samples: Iterable[tuple[int, RunningSample]], slots: int) -> Self:
        """Those of running samples in their slots; the other slots are inactive."""
        numbers, integers = np.zeros((slots, 3), np.float32), np.zeros((slots, 5), np.int64)
        for slot, sample in samples:
            request = sample.handle.request
            numbers[slot] = request.temperature, request.top_p, request.min_p
            switches = True, sample.bias is not None, bool(request.logprobs)
            integers[slot] = request.top_k, sample.seed, *switches
        bits = integers.astype(np.uint32).view(np.int32)
        return cls(np.concatenate([numbers.view(np.int32), bits], axis=1))


@dataclasses.dataclass(frozen=True)
class DrawnTokens:
    """What one step drew, on the host; rows that were not active mean nothing.

    Attributes:
      token_ids: int32 [B].
      logprobs: float32 [B], natural log-probabilities under the model itself.
      top_ids: int32 [B, K], the most probable tokens, best first, where a row wanted them.
      top_logprobs: float32 [B, K], theirs.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    def of(self, slot: int) -> Drawn:
        """That of one row."""
        return Drawn(int(self.token_ids[slot]), float(self.logprobs[slot]), self.top_ids[slot], self.top_logprobs[slot])
