"""Statistics of the router: how it loads the experts, how sure it is, and which experts go together."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grokjax.config import GrokConfig
from grokjax.model import At, Grok, check_texts, in_any_context
from grokjax.research.sums import Sums, is_real
from grokjax.research.tap import Tap, observe

# Bins of the margin's histogram, from 0 to 1.
_BINS = 10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RouterStats(Sums):
    """Sums over the real tokens of some texts, for each layer. Two of them add.

    Attributes:
      tokens: int32 [L], how many tokens there were.
      load: int32 [L, E], how many of them each expert evaluated.
      mass: float32 [L, E], the sum of the probabilities that each expert was given, chosen or not.
      entropy: float32 [L], the sum of the entropies of these probabilities, in nats.
      margin: float32 [L], the sum of the margins: the probability of the last expert that was chosen less that of the
        first that was left out.
      margins: int32 [L, 10], how many margins were in each tenth of 0 to 1.
      together: int32 [L, E, E], how many tokens chose both experts; the diagonal is `load`.
    """

    tokens: jax.Array
    load: jax.Array
    mass: jax.Array
    entropy: jax.Array
    margin: jax.Array
    margins: jax.Array
    together: jax.Array

    @classmethod
    def zero(cls, config: GrokConfig) -> Self:
        """The statistics of no text: where a sum begins."""
        layers, experts = config.num_layers, config.num_experts

        def zeros(*shape: int, dtype: Any = np.int32) -> Any:
            return np.zeros((layers, *shape), dtype)

        return cls(
            tokens=zeros(),
            load=zeros(experts),
            mass=zeros(experts, dtype=np.float32),
            entropy=zeros(dtype=np.float32),
            margin=zeros(dtype=np.float32),
            margins=zeros(_BINS),
            together=zeros(experts, experts),
        )


def observe_routing(model: Grok, tokens: ArrayLike, lengths: ArrayLike) -> RouterStats:
    """The router's statistics of whole texts; each layer leaves counts alone, and padding is left out.

    Args:
      model: the model, edited or not; what its edits choose is counted.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T.

    Raises:
      ValueError: The model is dense, or the texts are none, see `observe`.
    """
    stats: RouterStats = observe(model, tokens, lengths, {"stats": _STATS})[1]["stats"]
    return stats


@in_any_context
def count_tokens(model: Grok, tokens: ArrayLike, lengths: ArrayLike, experts: ArrayLike) -> jax.Array:
    """How often each token of the vocabulary chose each expert; padding is left out.

    Args:
      model: whose vocabulary and experts these are; it is not run.
      tokens: integers [B, T], right-padded.
      lengths: integers [B], tokens of each text, 1 to T.
      experts: int32 [n, B, T, X], which experts they chose in n layers, as a tap of `router.experts` has read them.

    Returns:
      int32 [n, E, V], which takes 4 MiB for a layer of Grok-1. Those of several batches add.

    Raises:
      ValueError: The shapes do not fit each other, or the texts are none, see `check_texts`.
    """
    tokens, lengths = check_texts(model, tokens, lengths)
    experts = jnp.asarray(experts, jnp.int32)
    if experts.ndim != 4 or experts.shape[1:3] != tokens.shape:
        raise ValueError(
            f"experts of shape {experts.shape} are not those of tokens of shape {tokens.shape}: give "
            f"[n, {tokens.shape[0]}, {tokens.shape[1]}, X], which a tap reads at all positions."
        )
    return _count_tokens(tokens, lengths, experts, config=model.config)


@functools.partial(jax.jit, static_argnames="config")
def _count_tokens(tokens: jax.Array, lengths: jax.Array, experts: jax.Array, *, config: GrokConfig) -> jax.Array:
    counted = is_real(tokens, lengths)
    counts = jnp.zeros((len(experts), config.num_experts, config.vocab_size), jnp.int32)
    layers = jnp.arange(len(experts), dtype=jnp.int32)[:, None, None, None]
    return counts.at[layers, experts, tokens[None, :, :, None]].add(counted[None, :, :, None].astype(jnp.int32))


def is_chosen(experts: jax.Array, num_experts: int) -> jax.Array:
    """Which of the experts each token chose, bool [P, T, E], from the numbers of those that it did, [P, T, X]."""
    return (experts[..., None] == jnp.arange(num_experts, dtype=jnp.int32)[None, None, None]).any(axis=2)


def _count(shares: jax.Array, at: At) -> RouterStats:
    """The statistics of one layer, without the axis of layers."""
    assert at.experts is not None
    assert at.router_logits is not None
    probabilities = jax.nn.softmax(at.router_logits, axis=-1)  # [P, T, E]
    num_experts = probabilities.shape[-1]
    valid = at.valid[..., None]
    chosen = is_chosen(at.experts, num_experts)
    chosen_int = (chosen & valid).astype(jnp.int32)
    least = jnp.where(chosen, probabilities, jnp.inf).min(axis=-1)
    most = jnp.where(chosen, -jnp.inf, probabilities).max(axis=-1, initial=0.0)
    margin = jnp.where(at.valid, least - most, 0)  # below 0 where an edit chose
    bins = jnp.clip((margin * _BINS).astype(jnp.int32), 0, _BINS - 1)[..., None]
    entropy = -jax.scipy.special.xlogy(probabilities, probabilities).sum(axis=-1)
    return RouterStats(
        tokens=at.valid.sum(dtype=jnp.int32),
        load=chosen_int.sum(axis=(0, 1)),
        mass=jnp.where(valid, probabilities, 0).sum(axis=(0, 1)),
        entropy=jnp.where(at.valid, entropy, 0).sum(),
        margin=margin.sum(),
        margins=((bins == jnp.arange(_BINS, dtype=jnp.int32)[None, None]) & valid).sum(axis=(0, 1), dtype=jnp.int32),
        together=jnp.einsum("pte,ptf->ef", chosen_int, chosen_int),
    )


_STATS = Tap("router.probabilities", via=_count)
