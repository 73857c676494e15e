"""What no kernel holds at once, made of what taps have read: attention patterns, and each expert by itself."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from grokjax.config import GrokConfig
from grokjax.model import Grok, in_any_context
from grokjax.printing import describe_fields

_REMEDY = 'A tap at="last" leaves the axis of tokens away: read at=[5], one position.'


@in_any_context
def attention_pattern(model: Grok, query: ArrayLike, key: ArrayLike, positions: ArrayLike | None = None) -> jax.Array:
    """How much each head attends from some tokens to all those up to them.

    Args:
      model: whose cap and multiplier are used.
      query: [..., k, N, H] of k tokens, as a tap of `attention.query` has read them.
      key: [..., T, K, H] of all tokens, as a tap of `attention.key` has read them, with the same axes in front.
      positions: integers [k], or [..., k], where the k tokens stand; by default they are the first k.

    Returns:
      float32 [..., N, k, T]; each row sums to 1, and those of padding mean nothing.

    Raises:
      ValueError: The shapes do not fit each other, or the model.
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    *lead, num_queries = query.shape[:-2]
    positions = jnp.arange(num_queries, dtype=jnp.int32) if positions is None else jnp.asarray(positions, jnp.int32)
    config = model.config
    is_fitting = query.shape[-2:] == (config.num_heads, config.head_dim) and key.shape[-2:] == (
        config.num_kv_heads,
        config.head_dim,
    )
    if not is_fitting or key.shape[:-3] != (*lead,) or positions.shape[-1:] != (num_queries,):
        raise ValueError(
            f"queries of shape {query.shape}, keys of shape {key.shape} and positions of shape {positions.shape} do "
            f"not fit: give [..., k, {config.num_heads}, {config.head_dim}], [..., T, {config.num_kv_heads}, "
            f"{config.head_dim}] and [k] or [..., k]. {_REMEDY}"
        )
    return _pattern(query, key, jnp.broadcast_to(positions, (*lead, num_queries)), config=config)


@functools.partial(jax.jit, static_argnames="config")
def _pattern(query: jax.Array, key: jax.Array, positions: jax.Array, *, config: GrokConfig) -> jax.Array:
    grouped = query.astype(jnp.float32).reshape(*query.shape[:-2], config.num_kv_heads, -1, config.head_dim)
    product = functools.partial(jnp.einsum, "...qkgh,...tkh->...kgqt", precision=lax.Precision.HIGHEST)
    scores = product(grouped, key.astype(jnp.float32)) * config.attention_multiplier
    capped = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    numbers = jnp.arange(key.shape[-3], dtype=jnp.int32).reshape((1,) * positions.ndim + (-1,))
    is_seen = numbers <= positions[..., None]  # [..., k, T]
    pattern = jax.nn.softmax(jnp.where(is_seen[..., None, None, :, :], capped, -jnp.inf), axis=-1)
    return pattern.reshape(*query.shape[:-3], config.num_heads, *is_seen.shape[-2:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExpertOutputs:
    """What some experts of each token make of it, one by one.

    Attributes:
      hidden: float32 [P, T, X, F], hidden units, after the activation and the gate.
      output: float32 [P, T, X, D]; the sum of those of a token's experts, each times its share, is what the layer's
        last norm makes `feed_forward.out` of.
    """

    hidden: jax.Array
    output: jax.Array

    __repr__ = describe_fields


@in_any_context
def expert_outputs(model: Grok, stream: ArrayLike, experts: ArrayLike, layer: int) -> ExpertOutputs:
    """Evaluates experts of one layer for some tokens, one expert's weights at a time.

    Args:
      model: the model; it is not run.
      stream: [P, T, D] of some tokens in that layer, as a tap of `stream.mid` has read it.
      experts: integers [P, T, X], which experts each token is given to, as a tap of `router.experts` has read them; or
        any others.
      layer: its number.

    Raises:
      ValueError: The shapes do not fit each other, or the model; or there is no such layer or expert.
    """
    stream = jnp.asarray(stream)
    numbers = experts if isinstance(experts, jax.Array) else np.asarray(experts)
    config = model.config
    if numbers.ndim != 3 or numbers.dtype.kind not in "iu" or stream.shape != (*numbers.shape[:2], config.model_dim):
        raise ValueError(
            f"a stream of shape {stream.shape} and experts {numbers.dtype} {numbers.shape} do not fit: give "
            f"[P, T, {config.model_dim}], and integers [P, T, X] for the same tokens. {_REMEDY}"
        )
    if not 0 <= operator.index(layer) < config.num_layers:
        raise ValueError(f"layer={layer}: the model has layers 0 to {config.num_layers - 1}.")
    if not isinstance(numbers, jax.core.Tracer) and not ((numbers >= 0) & (numbers < config.num_experts)).all():
        raise ValueError(f"experts are from 0 to {config.num_experts - 1}, and others were named: {numbers}.")
    return _evaluate(model, stream.astype(model.dtype), jnp.asarray(numbers, jnp.int32), jnp.int32(layer))


@jax.jit
def _evaluate(model: Grok, stream: jax.Array, experts: jax.Array, layer: jax.Array) -> ExpertOutputs:
    layers = model.layers
    x = layers.pre_feed_forward_norm(stream, layer)
    return ExpertOutputs(*layers.feed_forward.evaluate_each(x, experts, layer=layer))
