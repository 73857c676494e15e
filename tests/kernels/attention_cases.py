"""What the tests of every form of attention share: queries, a small cache, and the result by NumPy in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grokjax.kernels import CachePlace

MULTIPLIER, SOFTCAP = 0.125, 5.0
# Of the three rows of a cache, those that the two prompts are for.
ROWS = np.array([2, 0], np.int32)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """New tokens of two prompts over layer 1 of a cache [2, 3, 2, S, H].

    Attributes:
      num_heads: N, query heads.
      head_dim: H.
      start: of each prompt, the entries that its row held before.
    """

    num_heads: int
    head_dim: int
    start: tuple[int, int]

    def make(self, num_new: int, *, max_len: int, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [2, T, N, H] and the keys and values [2, 3, 2, S, H] of a cache."""
        random = np.random.default_rng(num_new)
        query = random.standard_normal((2, num_new, self.num_heads, self.head_dim)) * 3
        keys, values = random.standard_normal((2, 2, 3, 2, max_len, self.head_dim))
        return tuple(jnp.asarray(array, dtype) for array in (query, keys, values))

    def expected(self, query: jax.Array, keys: jax.Array, values: jax.Array, softcap: float = SOFTCAP) -> np.ndarray:
        """The definition's result, float64 [2, T, N * H]."""
        rows = zip(query, keys[1, ROWS], values[1, ROWS], self.start, strict=True)
        return np.stack(
            [attend_row(q, k, v, start=start, multiplier=MULTIPLIER, softcap=softcap) for q, k, v, start in rows]
        )

    def place(self, num_new: int) -> CachePlace:
        """Where the new tokens lie."""
        start, count = jnp.asarray(self.start, jnp.int32), jnp.full(2, num_new, jnp.int32)
        return CachePlace(layer=jnp.int32(1), rows=jnp.asarray(ROWS), start=start, count=count)


def attend_row(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, *, start: int, multiplier: float, softcap: float
) -> np.ndarray:
    """Causal attention of queries [T, N, H] from position `start` on over entries [K, S, H]: [T, N * H]."""
    group = query.shape[1] // len(keys)
    k, v = (np.repeat(np.asarray(entries, np.float64), group, axis=0) for entries in (keys, values))
    scores = softcap * np.tanh(np.einsum("tnh,nsh->nts", np.asarray(query, np.float64), k) * multiplier / softcap)
    entry, position = np.arange(k.shape[1])[None], start + np.arange(len(query))[:, None]
    weights = np.where(entry <= position, np.exp(scores), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("nts,nsh->tnh", weights, v).reshape(len(query), -1)


# Sizes that all forms take, with more entries than one block of keys has.
LONG = AttentionCase(num_heads=4, head_dim=128, start=(0, 900))
