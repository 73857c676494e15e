"""Between an engine and the steps of its slots: what they are made for, how rows are to draw, and what they drew."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# What lies on the host, or on the devices.
A = TypeVar("A", np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class SlotOptions:
    """What the steps of an engine's slots are made for, beside their model.

    Attributes:
      slots: B, rows of the cache.
      max_len: S, tokens that each row holds.
      num_top: K, most probable tokens that a request may ask for.
      max_guesses: most tokens that a step may guess; 0 for steps that do not guess, and keep no texts for it.
      cache_dtype: as in `KVCache.create`; by default float32 for a float32 model.
      allow_oom: try it even where the devices have too little memory left.
    """

    slots: int
    max_len: int
    num_top: int
    max_guesses: int = 0
    cache_dtype: DTypeLike | None = None
    allow_oom: bool = False


class RowSettings(NamedTuple):
    """How one row draws; by default it does not.

    Attributes:
      temperature: finite, 0 or more; 0 is greedy.
      top_p: probability mass kept, 0 to 1.
      min_p: least probability kept, as a fraction of the largest, 0 to 1.
      top_k: tokens kept, 0 to 2**31 - 1; 0 keeps all.
      seed: of the draws, 0 to 2**32 - 1.
      active: whether the row draws at all.
      biased: whether the row's bias is added to its logits.
      wants_top: whether the most probable tokens are asked for.
    """

    temperature: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int = 0
    active: bool = False
    biased: bool = False
    wants_top: bool = False


# Column by column, the dtypes of the fields of `RowSettings`; each value has four bytes, or is 0 or 1.
_DTYPES = (np.float32, np.float32, np.float32, np.int32, np.uint32, np.bool_, np.bool_, np.bool_)


@dataclasses.dataclass(frozen=True)
class SlotSettings(Generic[A]):
    """How B rows draw: the fields of `RowSettings` as arrays, on the host or unpacked on the devices.

    Attributes:
      temperature: float32 [B].
      top_p: float32 [B].
      min_p: float32 [B].
      top_k: int32 [B].
      seed: uint32 [B].
      active: bool [B].
      biased: bool [B].
      wants_top: bool [B].
    """

    temperature: A
    top_p: A
    min_p: A
    top_k: A
    seed: A
    active: A
    biased: A
    wants_top: A

    @classmethod
    def of(cls, rows: Mapping[int, RowSettings], slots: int) -> "SlotSettings[np.ndarray]":
        """The settings of B slots, of which `rows` has some; the others are not active."""
        columns = zip(*(rows.get(slot, RowSettings()) for slot in range(slots)), strict=True)
        return SlotSettings(*(np.array(column, dtype) for column, dtype in zip(columns, _DTYPES, strict=True)))

    @functools.cached_property
    def packed(self) -> np.ndarray:
        """The columns side by side, int32 [B, 8]: one small array, so that a step takes one copy to the devices."""
        columns = [np.asarray(getattr(self, name)) for name in RowSettings._fields]
        as_bits = [column.astype(np.int32) if column.dtype == bool else column.view(np.int32) for column in columns]
        return np.stack(as_bits, axis=1)

    @classmethod
    def unpack(cls, packed: A) -> "SlotSettings[A]":
        """What `packed` holds, wherever it lies."""
        columns = [packed[:, number] for number in range(len(_DTYPES))]
        typed = zip(columns, _DTYPES, strict=True)
        return SlotSettings(*(column != 0 if dtype == np.bool_ else column.view(dtype) for column, dtype in typed))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token as a step drew it: its log-probability, and the most probable tokens with theirs [K]."""

    token_id: int
    logprob: float
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class DrawnTokens(Generic[A]):
    """What one step drew, on the devices or unpacked on the host; rows that were not active mean nothing.

    Attributes:
      token_ids: int32 [B].
      logprobs: float32 [B], natural log-probabilities under the model itself.
      top_ids: int32 [B, K], the most probable tokens, best first, where a row wanted them.
      top_logprobs: float32 [B, K], theirs.
    """

    token_ids: A
    logprobs: A
    top_ids: A
    top_logprobs: A

    def of(self: "DrawnTokens[np.ndarray]", slot: int) -> Drawn:
        """The token that one row drew, with its log-probability and the most probable ones."""
        return Drawn(int(self.token_ids[slot]), float(self.logprobs[slot]), self.top_ids[slot], self.top_logprobs[slot])

    def pack(self) -> jax.Array:
        """The arrays side by side, int32 [B, 2 + 2 K]: one array, so that a step takes one copy to the host."""
        columns = self.token_ids[:, None], self.logprobs[:, None], self.top_ids, self.top_logprobs
        return jnp.concatenate([column.view(np.int32) for column in columns], axis=1)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "DrawnTokens[np.ndarray]":
        """What `pack` holds, on the host."""
        token_ids, logprobs, rest = packed[:, 0], packed[:, 1], packed[:, 2:]
        top_ids, top_logprobs = np.split(rest, 2, axis=1)
        return DrawnTokens(token_ids, logprobs.view(np.float32), top_ids, top_logprobs.view(np.float32))


@dataclasses.dataclass(frozen=True)
class DrawnRun:
    """The tokens that one row drew in a step that guesses, in their order, and what came of its guesses.

    Attributes:
      tokens: one more than the guesses that were tried and right; none if the row had no room.
      tried: guesses that the model ran over.
      looked: guesses that were compared with what was drawn: those, or one more where there was one.
      right: how many of them, from the first on, were drawn.
    """

    tokens: tuple[Drawn, ...]
    tried: int
    looked: int
    right: int


@dataclasses.dataclass(frozen=True)
class DrawnRuns:
    """What a step that guesses drew, on the host; rows that were not active drew nothing.

    Attributes:
      tokens: the first token of each row, the second, up to 1 + G; of a row only as many as it made mean something.
      counts: int32 [B, 4], how many tokens each row made, and how many guesses it tried, looked at and had right.
    """

    tokens: tuple[DrawnTokens[np.ndarray], ...]
    counts: np.ndarray

    def of(self, slot: int) -> DrawnRun:
        """The tokens that one row drew."""
        made, tried, looked, right = self.counts[slot].tolist()
        return DrawnRun(tuple(drawn.of(slot) for drawn in self.tokens[:made]), tried, looked, right)

    @classmethod
    def unpack(cls, packed: np.ndarray, num_guesses: int) -> "DrawnRuns":
        """Made of the counts and, behind them, what `DrawnTokens.pack` gives of each place, int32 [B, ...]."""
        parts = np.split(packed[:, 4:], 1 + num_guesses, axis=1)
        return DrawnRuns(tuple(map(DrawnTokens.unpack, parts)), packed[:, :4])
