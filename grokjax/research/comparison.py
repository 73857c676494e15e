"""How far two models differ on the same texts: in the experts that they choose, and in what they go on with."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from grokjax.config import GrokConfig
from grokjax.model import At, Grok, check_texts, in_any_context
from grokjax.research.routing import is_chosen
from grokjax.research.sums import Sums, is_real
from grokjax.research.tap import Tap, observe

# Tokens whose logits are held at once: those of two models with Grok-1's vocabulary take 128 MiB.
_TOKENS_AT_ONCE = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison(Sums):
    """Sums over the real tokens of some texts, of two models. Two comparisons add.

    Attributes:
      tokens: int32 [], how many tokens there were.
      same_first: int32 [L], for how many of them both models chose the same expert first.
      same_experts: int32 [L], for how many they chose the same experts, in any order.
      router_divergence: float32 [L], the Kullback-Leibler divergence of the second router's probabilities from the
        first's, in nats; infinite where the second rules out an expert that the first does not.
      same_token: int32 [], after how many tokens both models find the same next token most probable.
      divergence: float32 [], the divergence of the second model's next-token probabilities from the first's, in nats.
    """

    tokens: jax.Array
    same_first: jax.Array
    same_experts: jax.Array
    router_divergence: jax.Array
    same_token: jax.Array
    divergence: jax.Array

    @classmethod
    def zero(cls, config: GrokConfig) -> Self:
        """The comparison of no text: where a sum begins."""
        layers = config.num_layers

        def zeros(*shape: int, dtype: Any = np.int32) -> Any:
            return np.zeros(shape, dtype)

        return cls(
            tokens=zeros(),
            same_first=zeros(layers),
            same_experts=zeros(layers),
            router_divergence=zeros(layers, dtype=np.float32),
            same_token=zeros(),
            divergence=zeros(dtype=np.float32),
        )


def compare(first: Grok, second: Grok, tokens: ArrayLike, lengths: ArrayLike) -> Comparison:
    """Runs two models on the same texts, such as one with int8 weights and one without, or one and its edited self.

    Only sums leave the device, and the logits of at most 128 tokens are held at once, or those of one of each text.

    Args:
      first: a model, edited or not.
      second: another of the same vocabulary, layers and experts, on the same mesh.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T.

    Raises:
      ValueError: The models have other sizes, or lie on different meshes; or the texts are none, see `check_texts`.
    """
    _check_alike(first, second)
    return _compare_checked(first, second, tokens, lengths)


def _check_alike(first: Grok, second: Grok) -> None:
    for model in (first, second):
        if not isinstance(model, Grok):
            raise ValueError(f"both models must be ones that init or load makes, and one is a {type(model).__name__}.")
    for name in ("vocab_size", "num_layers", "num_experts"):
        one, two = getattr(first.config, name), getattr(second.config, name)
        if one != two:
            raise ValueError(f"the models have {name}={one} and {name}={two}: compare two of the same {name}.")
    if first.mesh != second.mesh:
        raise ValueError(
            f"the models lie on meshes of {dict(first.mesh.shape)} and {dict(second.mesh.shape)}, or on different "
            "devices: make or load both on the same mesh."
        )


@in_any_context
def _compare_checked(first: Grok, second: Grok, tokens: ArrayLike, lengths: ArrayLike) -> Comparison:
    return _compare(first, second, *check_texts(first, tokens, lengths))


@jax.jit
def _compare(first: Grok, second: Grok, tokens: jax.Array, lengths: jax.Array) -> Comparison:
    counted = is_real(tokens, lengths)
    num_tokens, final = counted.sum(dtype=jnp.int32), {"final": Tap("final")}
    if first.config.num_experts > 1:
        choices = {"choices": Tap("router.probabilities", via=_choices)}
        _, of_first = observe(first, tokens, lengths, final | choices)
        against = {"same": Tap("router.probabilities", via=of_first["choices"])}
        _, of_second = observe(second, tokens, lengths, final | against)
        same_first, same_experts, router_divergence = of_second["same"]
    else:  # a dense model has one expert, which all tokens choose
        (_, of_first), (_, of_second) = (observe(model, tokens, lengths, final) for model in (first, second))
        same_first = same_experts = jnp.full((first.config.num_layers,), num_tokens)
        router_divergence = jnp.zeros((first.config.num_layers,), jnp.float32)
    same_token, divergence = _compare_next((first, second), (of_first["final"], of_second["final"]), counted)
    return Comparison(
        tokens=num_tokens,
        same_first=same_first,
        same_experts=same_experts,
        router_divergence=router_divergence,
        same_token=same_token,
        divergence=divergence,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Choices:
    """What a model's routers made of some texts; as a `via`, it compares another model's with it.

    Attributes:
      logits: float32 [L, P, T, E], or of one layer.
      experts: int32 [L, P, T, X], or of one layer.
    """

    logits: jax.Array
    experts: jax.Array

    def __call__(self, shares: jax.Array, at: At) -> tuple[jax.Array, jax.Array, jax.Array]:
        """For one layer: tokens with the same first expert, with the same experts, and the sum of the divergences."""
        other = _choices(shares, at)
        own = jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, at.layer, keepdims=False), self)
        same_first = own.experts[..., 0] == other.experts[..., 0]
        chosen = [is_chosen(choices.experts, choices.logits.shape[-1]) for choices in (own, other)]
        same_experts = (chosen[0] == chosen[1]).all(axis=-1)
        divergence = _divergence(own.logits, other.logits)
        counts = [jnp.sum(same & at.valid, dtype=jnp.int32) for same in (same_first, same_experts)]
        return counts[0], counts[1], jnp.where(at.valid, divergence, 0).sum()


def _choices(shares: jax.Array, at: At) -> _Choices:
    del shares
    assert at.router_logits is not None
    assert at.experts is not None
    return _Choices(at.router_logits, at.experts)


def _compare_next(
    models: tuple[Grok, Grok], hidden: tuple[jax.Array, jax.Array], counted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many tokens are followed by the same one, and the sum of divergences, of hidden states [P, T, D] of both."""
    num_rows, length = counted.shape
    size = max(1, min(length, _TOKENS_AT_ONCE // num_rows))

    def add_chunk(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = jnp.minimum(i * size, length - size)  # the last chunk slides left and leaves out what was seen
        is_new = (start + jnp.arange(size, dtype=jnp.int32) >= i * size)[None]

        def cut(whole: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(whole, start, size, axis=1)

        is_counted = cut(counted) & is_new
        one, two = (model.logits(cut(own)) for model, own in zip(models, hidden, strict=True))
        is_same = one.argmax(axis=-1) == two.argmax(axis=-1)
        divergence = jnp.where(is_counted, _divergence(one, two), 0).sum()
        return sums[0] + jnp.sum(is_same & is_counted, dtype=jnp.int32), sums[1] + divergence

    nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    sums: tuple[jax.Array, jax.Array] = lax.fori_loop(0, -(-length // size), add_chunk, nothing)
    return sums


def _divergence(one: jax.Array, two: jax.Array) -> jax.Array:
    """The divergence [...] of the softmax of logits [..., n] from that of others, which are the first."""
    log_p, log_q = jax.nn.log_softmax(one, axis=-1), jax.nn.log_softmax(two, axis=-1)
    p = jnp.exp(log_p)
    return jnp.where(p > 0, p * (log_p - log_q), 0).sum(axis=-1)
