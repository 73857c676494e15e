"""Sampling: per-row settings, the filters (top-k, min-p, top-p) and one draw per row with that row's own key.

Every filter is a threshold on the logits: values below it become -1e10, ties with it stay. Arithmetic is float32
whatever the logits' dtype.
"""

import dataclasses
import functools
import reprlib
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from grokjax.context import in_own_context, own_context

# The logit of a token that must not be drawn. Source: the release's `runners.py`, `top_p_filter` and `sample_token`.
EXCLUDED = -1e10
# The generator of all keys that this package makes, whatever JAX's own default is.
_GENERATOR = "threefry2x32"
# Below this a division overflows or the hardware flushes the divisor to zero, so such a temperature is greedy too.
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How each of B rows is sampled; a pytree, so settings may change between steps without a recompilation.

    `create` fills in the defaults and checks the values. `sample_token` only checks shapes.

    Attributes:
      temperature: divisor of the logits [B] float32, finite and 0 or more; 0 is greedy.
      top_p: probability mass kept [B] float32 in [0, 1]; 1 keeps all.
      top_k: number of tokens kept [B] int32, 0 or more; 0 keeps all.
      min_p: least probability kept, as a fraction of the largest [B] float32 in [0, 1]; 0 keeps all.
      mask: allowed tokens [B, V] bool, at least one a row; None allows all (and is a different pytree structure,
        so going from None to an array recompiles).
      active: rows that are sampled at all [B] bool.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    mask: jax.Array | None
    active: jax.Array

    @classmethod
    @own_context()
    def create(
        cls,
        batch_size: int,
        *,
        temperature: ArrayLike = 1.0,
        top_p: ArrayLike = 1.0,
        top_k: ArrayLike = 0,
        min_p: ArrayLike = 0.0,
        mask: ArrayLike | None = None,
        active: ArrayLike = True,
    ) -> Self:
        """Settings for `batch_size` rows from concrete values, each one for all rows or one per row.

        Args:
          batch_size: B, 1 or more.
          temperature: scalar or [B], finite, 0 (greedy) or more.
          top_p: scalar or [B], from 0 to 1.
          top_k: scalar or [B], integers, 0 (off) or more.
          min_p: scalar or [B], from 0 (off) to 1.
          mask: [V] or [B, V], bool or 0 and 1; true where a token is allowed.
          active: scalar or [B] bool.

        Raises:
          ValueError: A value is out of range or of the wrong shape, or a row of the mask allows no token.
        """
        if batch_size < 1:
            raise ValueError(
                f"batch_size={reprlib.repr(batch_size)} must be 1 or more: settings describe the rows of a batch."
            )
        return cls(
            temperature=_real_rows("temperature", temperature, batch_size, high=_LARGEST),
            top_p=_real_rows("top_p", top_p, batch_size, high=1.0),
            top_k=_count_rows("top_k", top_k, batch_size),
            min_p=_real_rows("min_p", min_p, batch_size, high=1.0),
            mask=None if mask is None else _mask_rows(mask, batch_size),
            active=jnp.asarray(_rows("active", active, batch_size).astype(np.bool_)),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOutput:
    """What one step sampled, for B rows. Every field of an inactive row is 0.

    Attributes:
      token_id: the sampled token [B] int32.
      prob: its probability in the distribution it was drawn from: after temperature, mask and filters [B] float32.
        A greedy row reports temperature 1 here and in `top_k_probs`: its own distribution, a one-hot, says nothing.
      logprob: its natural log-probability under the model itself [B] float32: temperature 1, no mask, no filter.
      top_k_token_ids: the `num_top` most probable tokens, best first [B, num_top] int32; None when `num_top` is 0.
        Where fewer tokens survive the filters, the rest are fillers of probability 0.
      top_k_probs: their probabilities, as in `prob` [B, num_top] float32; None when `num_top` is 0.
    """

    token_id: jax.Array
    prob: jax.Array
    logprob: jax.Array
    top_k_token_ids: jax.Array | None
    top_k_probs: jax.Array | None


def seed_key(seed: ArrayLike) -> jax.Array:
    """The key of a seed, uint32 []: of threefry, so that a seed draws the same whatever `jax_default_prng_impl` is."""
    return jax.random.key(seed, impl=_GENERATOR)


@in_own_context
def row_keys(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Each row's key for one position: `fold_in(key, position)`, so a request draws the same in any slot and batch.

    Args:
      keys: the requests' keys, typed [B] of any generator, or raw uint32 [B, 2] of threefry.
      positions: of the tokens to draw, each counted from the beginning of its row's prompt [B] int32.

    Returns:
      Keys of the same kind and shape as `keys`.

    Raises:
      ValueError: The keys are raw and of another generator.
    """
    typed = typed_keys(keys)
    folded = _each_key(jax.random.fold_in, typed, positions)
    return folded if typed is keys else jax.random.key_data(folded)


def _each_key(function: Callable[..., jax.Array], keys: jax.Array, *rows: jax.Array) -> jax.Array:
    """`function(key, *row)` of each row; of typed keys that are not threefry's, `vmap` would use the first for all."""
    if jax.random.key_impl(keys) == _GENERATOR:
        return jax.vmap(function)(keys, *rows)
    return lax.map(lambda row: function(*row), (keys, *rows))


def typed_keys(keys: jax.Array) -> jax.Array:
    """Keys [B] that name their generator: typed ones as they are, raw uint32 [B, 2] as those of threefry.

    Raises:
      ValueError: The keys are raw and of another generator.
    """
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return keys
    if keys.dtype != jnp.uint32 or keys.ndim != 2 or keys.shape[1] != 2:
        raise ValueError(
            f"raw keys of {keys.dtype} {keys.shape} are not those of threefry, uint32 [B, 2]: pass typed keys, which "
            "name their generator, as jax.random.key makes them."
        )
    return jax.random.wrap_key_data(keys, impl=_GENERATOR)


@in_own_context
def sample_token(
    keys: jax.Array,
    logits: jax.Array,
    settings: SampleSettings,
    *,
    num_top: int = 0,
    whole: jax.sharding.Sharding | None = None,
) -> SampleOutput:
    """Draws one token per row: temperature, mask, top-k, min-p, top-p, then one categorical draw in float32.

    The same keys give the same tokens as the release, which ran with `jax_threefry_partitionable=False`. The nucleus of
    top-p is taken of what top-k and min-p leave. A row's result does not depend on the other rows: together they only
    decide whether to look for ranks in the vocabulary (for top-k and top-p) and whether to draw V random numbers a row
    (not if all are greedy).

    Args:
      keys: one key per row, typed [B] of any generator, or raw uint32 [B, 2] of threefry.
      logits: [B, V] of any float dtype.
      settings: for the same B rows.
      num_top: how many of the most probable tokens to report as well, at most V; static.
      whole: where logits whose vocabulary lies on several devices are brought together before ranks are looked for,
        which else takes an exchange for each step of the search; static.

    Raises:
      ValueError: Shapes disagree, raw keys are of another generator, or `num_top` is outside 0 to V.
    """
    _check_shapes(keys, logits, settings, num_top)
    return _sample_token(keys, logits, settings, num_top, whole)


# Outside a caller's `jax.jit` each call of `lax.cond` would be compiled anew.
@functools.partial(jax.jit, static_argnames=("num_top", "whole"), inline=True)
def _sample_token(
    keys: jax.Array, logits: jax.Array, settings: SampleSettings, num_top: int, whole: jax.sharding.Sharding | None
) -> SampleOutput:
    logits = logits.astype(jnp.float32)
    greedy = settings.temperature < _SMALLEST_TEMPERATURE
    with jax.named_scope("filter"):
        scaled = _scale(logits, settings.mask, jnp.where(greedy, 1.0, settings.temperature))
        filtered = _filter(scaled, settings, whole)
    with jax.named_scope("draw"):
        token_id = _draw(keys, filtered, greedy, needs_draw=jnp.any(settings.active & ~greedy))
    top_k_token_ids, top_k_probs = _top(filtered, num_top)
    output = SampleOutput(
        token_id=token_id,
        prob=jnp.exp(log_probs_of(filtered, token_id)),
        logprob=log_probs_of(logits, token_id),
        top_k_token_ids=top_k_token_ids,
        top_k_probs=top_k_probs,
    )
    zeroed: SampleOutput = jax.tree.map(lambda field: _zero_inactive(field, settings.active), output)
    return zeroed


@in_own_context
def log_probs_of(logits: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Natural log-probabilities of given tokens under softmax(logits), for scoring a text.

    Args:
      logits: [..., V] of any float dtype.
      token_ids: [...] integers in [0, V); not checked.

    Returns:
      [...] float32.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, token_ids[..., None], axis=-1)[..., 0]  # [...]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


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


def _scale(logits: jax.Array, mask: jax.Array | None, temperature: jax.Array) -> jax.Array:
    """Logits over temperature with the best allowed one at 0, so that no temperature overflows into NaN."""
    allowed = logits if mask is None else jnp.where(mask, logits, EXCLUDED)
    scaled = (allowed - allowed.max(axis=-1, keepdims=True)) / temperature[:, None]  # [B, V]
    # However high the temperature, what is excluded stays so.
    return jnp.where(allowed <= EXCLUDED, EXCLUDED, scaled)


def _filter(scaled: jax.Array, settings: SampleSettings, whole: jax.sharding.Sharding | None) -> jax.Array:
    """All filters on [B, V] float32; looks for ranks, or for a nucleus, only if an active row asks for one."""
    needs_rank = jnp.any(settings.active & (settings.top_k > 0))
    needs_nucleus = jnp.any(settings.active & (settings.top_p < 1.0))

    def raised(least: jax.Array) -> jax.Array:
        gathered = scaled if whole is None else lax.with_sharding_constraint(scaled, whole)

        def search(kind: jax.Array, threshold: jax.Array) -> jax.Array:
            kept = _keep_from(gathered, threshold)
            limits = _rank_limit(kept, settings.top_k), _nucleus_limit(kept, settings.top_p)
            weights, limit = (jnp.where(kind == 0, rank, nucleus) for rank, nucleus in zip(*limits, strict=True))
            return jnp.maximum(threshold, find_threshold(kept, weights, limit))

        # One search after the other in a loop, so that there is but one to compile.
        return lax.fori_loop(jnp.where(needs_rank, 0, 1), jnp.where(needs_nucleus, 2, 1), search, least)

    least = _min_p_threshold(scaled, settings.min_p)
    return _keep_from(scaled, lax.cond(needs_rank | needs_nucleus, raised, lambda threshold: threshold, least))


def _draw(keys: jax.Array, filtered: jax.Array, greedy: jax.Array, needs_draw: jax.Array) -> jax.Array:
    """One token per row [B] int32: the best one if greedy, else drawn; no random numbers if no row needs them."""
    noise_of = functools.partial(jax.random.gumbel, shape=filtered.shape[1:], dtype=filtered.dtype)
    draw = functools.partial(_each_key, noise_of)
    noise = lax.cond(needs_draw, draw, lambda keys: jnp.zeros_like(filtered), typed_keys(keys))
    return jnp.argmax(jnp.where(greedy[:, None], 0.0, noise) + filtered, axis=-1).astype(jnp.int32)


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


def _top(filtered: jax.Array, num_top: int) -> tuple[jax.Array | None, jax.Array | None]:
    """The most probable tokens and their probabilities, both [B, num_top]; None for none."""
    if not num_top:
        return None, None
    values, token_ids = lax.top_k(filtered, num_top)  # [B, num_top]
    probs = jnp.exp(values - jax.nn.logsumexp(filtered, axis=-1, keepdims=True))
    return token_ids.astype(jnp.int32), probs


def _zero_inactive(field: jax.Array, active: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(active, tuple(range(1, field.ndim))), field, jnp.zeros_like(field))


def _per_row(value: ArrayLike, logits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, dtype), logits.shape[:-1])


def _check_shapes(keys: jax.Array, logits: jax.Array, settings: SampleSettings, num_top: int) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {logits.shape}: give [B, V], the logits of one position per row.")
    batch_size, vocab_size = logits.shape
    if len(keys) != batch_size or settings.temperature.shape != (batch_size,):
        raise ValueError(
            f"logits have {batch_size} rows, but there are {len(keys)} keys and settings of shape "
            f"{settings.temperature.shape}: give one key and one setting per row."
        )
    if settings.mask is not None and settings.mask.shape != logits.shape:
        raise ValueError(
            f"mask has shape {settings.mask.shape}, logits have {logits.shape}: a mask says for every token of every "
            "row whether it is allowed."
        )
    if not 0 <= num_top <= vocab_size:
        raise ValueError(
            f"num_top={reprlib.repr(num_top)} must be from 0 to the {vocab_size} tokens of the vocabulary."
        )


def _rows(name: str, value: ArrayLike, batch_size: int) -> np.ndarray:
    array = np.asarray(value)
    if array.shape not in ((), (batch_size,)):
        raise ValueError(f"{name} has shape {array.shape}: give one value, or one for each of the {batch_size} rows.")
    return np.broadcast_to(array, (batch_size,))


def _real_rows(name: str, value: ArrayLike, batch_size: int, *, high: float) -> jax.Array:
    array = _rows(name, value, batch_size).astype(np.float64)
    wrong = ~((array >= 0) & (array <= high))  # also true for NaN
    if wrong.any():
        limits = "a finite number, 0 (greedy) or more" if high == _LARGEST else f"a number from 0 to {high:g}"
        raise ValueError(f"{name}={array[wrong][0]:g} in row {wrong.argmax()} must be {limits}.")
    return jnp.asarray(array.astype(np.float32))


def _count_rows(name: str, value: ArrayLike, batch_size: int) -> jax.Array:
    array = _rows(name, value, batch_size)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has dtype {array.dtype}: give integers, 0 for no limit.")
    if (array < 0).any():
        raise ValueError(f"{name}={array[array < 0][0]} in row {(array < 0).argmax()} must be 0 (no limit) or more.")
    return jnp.asarray(np.minimum(array, np.iinfo(np.int32).max).astype(np.int32))


def _mask_rows(mask: ArrayLike, batch_size: int) -> jax.Array:
    allowed = np.asarray(mask) != 0
    if allowed.ndim not in (1, 2) or (allowed.ndim == 2 and len(allowed) != batch_size):
        raise ValueError(f"mask has shape {allowed.shape}: give [V], or [B, V] for {batch_size} rows.")
    allowed = np.broadcast_to(allowed, (batch_size, allowed.shape[-1]))
    empty = ~allowed.any(axis=-1)
    if empty.any():
        raise ValueError(f"mask allows no token in row {empty.argmax()}: at least one must remain to be drawn.")
    return jnp.asarray(allowed)
