"""One draw for each row, with that row's own key: what is drawn, and how probable it was."""

import dataclasses
import functools
import reprlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grokjax.context import in_own_context
from grokjax.sampling.filters import EXCLUDED, LogitsPlaces, filter_logits
from grokjax.sampling.keys import each_key, typed_keys
from grokjax.sampling.settings import SampleSettings

# Below this a division overflows or the hardware flushes the divisor to zero, so such a temperature is greedy too.
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)


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


@in_own_context
def sample_token(
    keys: jax.Array,
    logits: jax.Array,
    settings: SampleSettings,
    *,
    num_top: int = 0,
    divided: jax.sharding.Sharding | None = None,
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
      divided: how the logits lie where their vocabulary is on several devices: each draws for its own part; static.
      whole: where such logits are brought together before ranks are looked for, which else takes an exchange for each
        step of the search; static.

    Raises:
      ValueError: Shapes disagree, raw keys are of another generator, or `num_top` is outside 0 to V.
    """
    _check_shapes(keys, logits, settings, num_top)
    return _sample_token(keys, logits, settings, num_top, LogitsPlaces(divided, whole))


# Outside a caller's `jax.jit` each call of `lax.cond` would be compiled anew.
@functools.partial(jax.jit, static_argnames=("num_top", "places"), inline=True)
def _sample_token(
    keys: jax.Array, logits: jax.Array, settings: SampleSettings, num_top: int, places: LogitsPlaces
) -> SampleOutput:
    logits = places.divide(logits.astype(jnp.float32))
    greedy = settings.temperature < _SMALLEST_TEMPERATURE
    with jax.named_scope("filter"):
        scaled = places.divide(_scale(logits, settings.mask, jnp.where(greedy, 1.0, settings.temperature)))
        filtered = filter_logits(scaled, settings, places)
    with jax.named_scope("draw"):
        token_id = _draw(keys, filtered, greedy, places, needs_draw=jnp.any(settings.active & ~greedy))
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


def _scale(logits: jax.Array, mask: jax.Array | None, temperature: jax.Array) -> jax.Array:
    """Logits over temperature with the best allowed one at 0, so that no temperature overflows into NaN."""
    allowed = logits if mask is None else jnp.where(mask, logits, EXCLUDED)
    scaled = (allowed - allowed.max(axis=-1, keepdims=True)) / temperature[:, None]  # [B, V]
    # However high the temperature, what is excluded stays so.
    return jnp.where(allowed <= EXCLUDED, EXCLUDED, scaled)


def _draw(
    keys: jax.Array, filtered: jax.Array, greedy: jax.Array, places: LogitsPlaces, needs_draw: jax.Array
) -> jax.Array:
    """One token per row [B] int32: the best one if greedy, else drawn; no random numbers if no row needs them."""
    noise_of = functools.partial(jax.random.gumbel, shape=filtered.shape[1:], dtype=filtered.dtype)

    def draw(keys: jax.Array) -> jax.Array:
        return places.divide(each_key(noise_of, keys))

    noise = lax.cond(needs_draw, draw, lambda keys: places.divide(jnp.zeros_like(filtered)), typed_keys(keys))
    return _best(jnp.where(greedy[:, None], 0.0, noise) + filtered)


def _best(scores: jax.Array) -> jax.Array:
    """The first of the largest scores [B, V] of each row, [B] int32; some token where a score is NaN."""

    def in_two_passes(scores: jax.Array) -> jax.Array:
        """XLA's CPU backend takes one number after the other for `argmax`, and many at once for either of these."""
        is_best = (scores >= scores.max(axis=-1, keepdims=True)) | jnp.isnan(scores)
        token_ids = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jnp.where(is_best, token_ids, scores.shape[1] - 1).min(axis=-1)

    return lax.platform_dependent(
        scores, cpu=in_two_passes, default=lambda scores: jnp.argmax(scores, axis=-1).astype(jnp.int32)
    )


def _top(filtered: jax.Array, num_top: int) -> tuple[jax.Array | None, jax.Array | None]:
    """The most probable tokens and their probabilities, both [B, num_top]; None for none."""
    if not num_top:
        return None, None
    values, token_ids = lax.top_k(filtered, num_top)  # [B, num_top]
    probs = jnp.exp(values - jax.nn.logsumexp(filtered, axis=-1, keepdims=True))
    return token_ids.astype(jnp.int32), probs


def _zero_inactive(field: jax.Array, active: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(active, tuple(range(1, field.ndim))), field, jnp.zeros_like(field))


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
