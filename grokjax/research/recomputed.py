"""What no kernel holds at once, for one layer and a few positions: attention patterns, and each expert by itself."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from grokjax.config import GrokConfig
from grokjax.model import At, Grok, in_any_context
from grokjax.printing import describe_fields
from grokjax.research.tap import Tap, observe


@in_any_context
def attention_pattern(
    model: Grok, tokens: ArrayLike, lengths: ArrayLike, layer: int, at: ArrayLike | str | None = None
) -> jax.Array:
    """How much each head of a layer attends from some positions to those up to them.

    Args:
      model: the model, edited or not; it runs once.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T.
      layer: its number.
      at: from where, as in a `Tap`: "last", or Q positions, [Q] or [B, Q]; all T by default.

    Returns:
      float32 [B, N, Q, T], or [B, N, T] from the last position; a row sums to 1, or is 0 where a text has no such
      position.

    Raises:
      ValueError: As `observe` with a tap of that layer and those positions.
    """
    taps = {"from": Tap("attention.query", [layer], at, via=_with_place), "to": Tap("attention.key", [layer])}
    _, seen = observe(model, tokens, lengths, taps)
    (key,), is_last = seen["to"], isinstance(at, str)
    query, positions, is_real = (part[0][:, None] if is_last else part[0] for part in seen["from"])
    pattern = _pattern(query, key, positions, is_real, config=model.config)
    return pattern[:, :, 0] if is_last else pattern


def _with_place(x: jax.Array, at: At) -> tuple[jax.Array, jax.Array, jax.Array]:
    return x, at.positions, at.valid


@functools.partial(jax.jit, static_argnames="config")
def _pattern(
    query: jax.Array, key: jax.Array, positions: jax.Array, is_real: jax.Array, *, config: GrokConfig
) -> jax.Array:
    """The pattern [B, N, Q, T] of queries [B, Q, N, H], at positions [B, Q] of which some are real, and keys."""
    num_rows, num_queries, num_heads, size = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    grouped = query.astype(jnp.float32).reshape(num_rows, num_queries, num_kv_heads, -1, size)
    scores = jnp.einsum("bqkgh,btkh->bkgqt", grouped, key.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    capped = config.attention_softcap * jnp.tanh(scores * config.attention_multiplier / config.attention_softcap)
    is_seen = jnp.arange(num_keys, dtype=jnp.int32)[None, None] <= positions[:, :, None]  # [B, Q, T]
    shares = jax.nn.softmax(jnp.where(is_seen[:, None, None], capped, -jnp.inf), axis=-1)
    shares = jnp.where(is_real[:, None, None, :, None], shares, 0)
    return shares.reshape(num_rows, num_heads, num_queries, num_keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExpertOutputs:
    """What the chosen experts of some tokens make of them, one by one, best first.

    `feed_forward.out` is the layer's last norm of the sum of `output`, each times its share.

    Attributes:
      experts: int32 [B, k, X], their numbers.
      shares: float32 [B, k, X], the router's probabilities.
      hidden: float32 [B, k, X, F], its hidden units, after the activation and the gate.
      output: float32 [B, k, X, D].
    """

    experts: jax.Array
    shares: jax.Array
    hidden: jax.Array
    output: jax.Array

    __repr__ = describe_fields


@in_any_context
def expert_outputs(
    model: Grok, tokens: ArrayLike, lengths: ArrayLike, layer: int, at: ArrayLike | str = "last"
) -> ExpertOutputs:
    """Runs texts, and evaluates once more, one after the other, the experts that some tokens of a layer chose.

    Args:
      model: the model, edited or not.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T.
      layer: its number.
      at: of which tokens, as in a `Tap`: positions [k] or [B, k]; by default the last of each text, and then the
        results have no axis k. Where a text has no such position they mean nothing.

    Raises:
      ValueError: The model is dense; or as `observe` with a tap of that layer and those positions.
    """
    sites = {"experts": "router.experts", "shares": "router.probabilities", "x": "stream.mid"}
    _, seen = observe(model, tokens, lengths, {name: Tap(site, [layer], at) for name, site in sites.items()})
    lead = (slice(None), None) if isinstance(at, str) else ()
    (experts,), (x,), (shares,) = seen["experts"], seen["x"], seen["shares"]
    hidden, output = _evaluate(model, x[lead], experts[lead], jnp.int32(layer))
    if lead:
        hidden, output = hidden[:, 0], output[:, 0]
    return ExpertOutputs(experts, shares, hidden, output)


@jax.jit
def _evaluate(model: Grok, x: jax.Array, experts: jax.Array, layer: jax.Array) -> Any:
    layers = model.layers
    return layers.feed_forward.evaluate_each(layers.pre_feed_forward_norm(x, layer), experts, layer=layer)
