"""The filters: top-k, min-p, top-p, by themselves and all in one.

Every filter is a threshold on the logits: values below it become -1e10, ties with it stay.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from grokjax.context import in_own_context
from grokjax.sampling.settings import SampleSettings

# The logit of a token that must not be drawn. Source: the release's `runners.py`, `top_p_filter` and `sample_token`.
EXCLUDED = -1e10


@in_own_context
def top_p_filter(logits: jax.Array, top_p: ArrayLike) -> jax.Array:
    """Keeps the most probable tokens whose mass reaches top-p; the others become -1e10.

    In ascending order, the first token whose cumulative probability reaches 1 - top_p is the threshold; ties with it
    stay. The top token always survives: the release keeps every token when rounding leaves the sum short of 1 - top_p.

    Args:
      logits: [..., V].
      top_p: scalar or [...]; 0 keeps the top token (and its ties) only, 1 keeps all.

    Source: the release's `runners.py`, `top_p_filter`.
    """
    return _keep_from(logits, find_threshold(logits, *_nucleus_limit(logits, _per_row(top_p, logits, jnp.float32))))


@in_own_context
def top_k_filter(logits: jax.Array, top_k: ArrayLike) -> jax.Array:
    """Keeps the `top_k` largest logits and ties with the last of them; the others become -1e10.

    Args:
      logits: [..., V].
      top_k: integers, scalar or [...]; 0, V and more keep all.
    """
    return _keep_from(logits, find_threshold(logits, *_rank_limit(logits, _per_row(top_k, logits, jnp.int32))))


@in_own_context
def min_p_filter(logits: jax.Array, min_p: ArrayLike) -> jax.Array:
    """Keeps tokens at least `min_p` times as probable as the top token; the others become -1e10.

    Args:
      logits: [..., V].
      min_p: scalar or [...] in [0, 1]; 0 keeps all, 1 keeps the top token and its ties.

    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling", arXiv 2407.01082.
    """
    return _keep_from(logits, _min_p_threshold(logits, _per_row(min_p, logits, jnp.float32)))


@dataclasses.dataclass(frozen=True)
class LogitsPlaces:
    """Where logits [B, V] lie whose vocabulary is on several devices; None for logits on one device.

    Each step and each branch says it anew. Else XLA takes the branch that brings logits together as a wish for all.

    Attributes:
      divided: each device has a part of the vocabulary.
      whole: each device has all of it.
    """

    divided: jax.sharding.Sharding | None = None
    whole: jax.sharding.Sharding | None = None

    def divide(self, logits: jax.Array) -> jax.Array:
        """Logits of which each device keeps its own part."""
        return logits if self.divided is None else lax.with_sharding_constraint(logits, self.divided)

    def gather(self, logits: jax.Array) -> jax.Array:
        """Logits of which each device has all."""
        divided = self.divide(logits)
        return divided if self.whole is None else lax.with_sharding_constraint(divided, self.whole)


def filter_logits(scaled: jax.Array, settings: SampleSettings, places: LogitsPlaces) -> jax.Array:
    """All filters on [B, V] float32; looks for ranks, or for a nucleus, only if an active row asks for one."""
    needs_rank = jnp.any(settings.active & (settings.top_k > 0))
    needs_nucleus = jnp.any(settings.active & (settings.top_p < 1.0))

    def raised(least: jax.Array) -> jax.Array:
        gathered = places.gather(scaled)

        def search(kind: jax.Array, threshold: jax.Array) -> jax.Array:
            kept = _keep_from(gathered, threshold)
            limits = _rank_limit(kept, settings.top_k), _nucleus_limit(kept, settings.top_p)
            weights, limit = (jnp.where(kind == 0, rank, nucleus) for rank, nucleus in zip(*limits, strict=True))
            return jnp.maximum(threshold, find_threshold(kept, weights, limit))

        # One search after the other in a loop, so that there is but one to compile.
        return lax.fori_loop(jnp.where(needs_rank, 0, 1), jnp.where(needs_nucleus, 2, 1), search, least)

    least = _min_p_threshold(scaled, settings.min_p)
    return _keep_from(scaled, lax.cond(needs_rank | needs_nucleus, raised, lambda threshold: threshold, least))


def _keep_from(logits: jax.Array, threshold: jax.Array) -> jax.Array:
    """`logits` [..., V] where they reach `threshold` [..., 1] float32, -1e10 elsewhere."""
    return jnp.where(logits.astype(jnp.float32) >= threshold, logits, EXCLUDED)


def _nucleus_limit(logits: jax.Array, top_p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [..., V] and limit [..., 1] for `find_threshold` of [..., V] to leave the nucleus of [...] float32."""
    weights = jnp.exp(logits.astype(jnp.float32) - logits.max(axis=-1, keepdims=True).astype(jnp.float32))
    limit = (1.0 - top_p[..., None]) * weights.sum(axis=-1, keepdims=True)
    # At top_p = 0 the tokens below the best may round to the whole mass.
    return weights, jnp.where(top_p[..., None] > 0, limit, jnp.inf)


def _rank_limit(logits: jax.Array, top_k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and limit as of `_nucleus_limit`, to leave the best `top_k` [...] int32; 0, V and more leave all."""
    vocab_size = logits.shape[-1]
    others = vocab_size - jnp.where(top_k == 0, vocab_size, jnp.clip(top_k, 1, vocab_size))
    return jnp.ones(logits.shape, jnp.float32), others[..., None].astype(jnp.float32) + 1  # exact: V < 2^24


@functools.partial(jax.jit, inline=True)  # one program also outside a caller's `jax.jit`
def find_threshold(logits: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """The largest logit below which all together weigh less than a limit; the smallest logit if there is none.

    It is found bit by bit: to sort a vocabulary takes longer, and the compiler for TPUs 17 s for a program that might.

    Args:
      logits: [..., V].
      weights: float32 [..., V], not negative.
      limit: float32 [..., 1].

    Returns:
      float32 [..., 1]; the logits that reach it are those that top-k or top-p keeps.
    """
    order = _ordered(lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32))

    def try_bit(i: jax.Array, best: jax.Array) -> jax.Array:
        higher = best | jnp.uint32(1 << 31) >> jnp.asarray(i, jnp.uint32)
        weight = jnp.where(order < higher, weights, 0).sum(axis=-1, keepdims=True)
        return jnp.where(weight < limit, higher, best)

    best = lax.fori_loop(0, 32, try_bit, jnp.zeros((*logits.shape[:-1], 1), jnp.uint32))
    best = jnp.clip(best, order.min(axis=-1, keepdims=True), order.max(axis=-1, keepdims=True))
    is_positive = best >> 31 == 1
    return lax.bitcast_convert_type(jnp.where(is_positive, best ^ jnp.uint32(1 << 31), ~best), jnp.float32)


def _ordered(bits: jax.Array) -> jax.Array:
    """Bits of float32 numbers as uint32 numbers of the same order."""
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _min_p_threshold(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """The smallest logit kept [..., 1] float32: a ratio of probabilities is a difference of logits, without a sum."""
    return logits.max(axis=-1, keepdims=True).astype(jnp.float32) + jnp.log(min_p)[..., None]


def _per_row(value: ArrayLike, logits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, dtype), logits.shape[:-1])
