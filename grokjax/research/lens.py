"""The logit lens: what the model would say if it ended after a layer."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.model import At, Grok


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The most probable tokens, best first.

    Attributes:
      ids: int32 [..., k].
      logprobs: float32 [..., k], natural.
    """

    ids: jax.Array
    logprobs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _TopTokensOf:
    model: Grok
    count: int = dataclasses.field(metadata={"static": True})

    def __call__(self, x: jax.Array, at: At) -> TopTokens:
        del at
        logits = self.model.logits(self.model.final_norm(x.astype(self.model.dtype)))
        values, ids = lax.top_k(logits, self.count)
        return TopTokens(ids.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def top_tokens(model: Grok, count: int) -> _TopTokensOf:
    """A `via` for taps of streams [..., D]: the tokens that the last norm and the table make of them, `TopTokens`.

    It computes the logits of every position that the tap reads, in each of its layers: name few positions for long
    texts, as by `at="last"`.

    Args:
      model: whose norm and table are used.
      count: k, how many tokens.

    Raises:
      ValueError: The count is not from 1 to the size of the vocabulary.
    """
    if not 1 <= count <= model.config.vocab_size:
        raise ValueError(f"count={count!r} tokens were asked for: ask for 1 to {model.config.vocab_size}.")
    return _TopTokensOf(model, count)
