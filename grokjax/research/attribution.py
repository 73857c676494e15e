"""Direct logit attribution: what each part of a model adds to a logit, or to the difference of two."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from grokjax.model import At, Grok, check_texts, in_any_context
from grokjax.research.tap import Tap, observe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LogitDifference:
    """A function of logits [B, V]: that of one token less that of another, summed over the rows.

    Attributes:
      target: integers [] or [B], the token of all rows, or of each.
      against: the same, of the other token; None to have the target's logit alone.
    """

    target: ArrayLike
    against: ArrayLike | None = None

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Float32 []."""
        return self.by_row(logits).sum()

    def by_row(self, logits: jax.Array) -> jax.Array:
        """The difference of each row, float32 [B]."""

        def pick(ids: ArrayLike) -> jax.Array:
            rows = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), logits.shape[:1])
            return jnp.take_along_axis(logits, rows[:, None], axis=1)[:, 0]

        return pick(self.target) if self.against is None else pick(self.target) - pick(self.against)

    def check(self, num_rows: int, vocab_size: int) -> None:
        """Checks that logits [B, V] have these tokens.

        Raises:
          ValueError: They have not, or the tokens are no integers for one row or for all.
        """
        for name, ids in vars(self).items():
            if ids is None or isinstance(ids, jax.core.Tracer):
                continue
            known = np.asarray(ids)
            if known.dtype.kind not in "iu" or known.shape not in ((), (num_rows,)):
                raise ValueError(f"{name} is {ids!r}: give one token's id, or one for each of {num_rows} rows.")
            if known.min() < 0 or known.max() >= vocab_size:
                raise ValueError(f"{name} is {ids!r}: ids of the vocabulary are from 0 to {vocab_size - 1}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LogitParts:
    """What the parts of a model add to a logit, or to a difference of two, after the last token of each text.

    The last norm divides the whole stream by its size; here it divides each part by that same size. So embedding,
    attention and feed-forward blocks of all layers sum to the total, but for what edits of the stream itself, or of
    `final`, put in.

    Attributes:
      embedding: float32 [B].
      attention: float32 [L, B].
      feed_forward: float32 [L, B].
      heads: float32 [L, B, N], the parts of `attention`, its own norm taken as the last one is.
      total: float32 [B], the logit or the difference itself.
    """

    embedding: jax.Array
    attention: jax.Array
    feed_forward: jax.Array
    heads: jax.Array
    total: jax.Array


@in_any_context
def attribute_logits(model: Grok, tokens: ArrayLike, lengths: ArrayLike, difference: LogitDifference) -> LogitParts:
    """Runs texts and splits a logit, or a difference of two, into what the parts of the model add to it.

    Args:
      model: the model, edited or not.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T; what is split follows the last of them.
      difference: which logits, such as `LogitDifference(5)` or `LogitDifference(5, 7)`.

    Raises:
      ValueError: It is no `LogitDifference`, its tokens are not in the vocabulary, or the texts are none, see
        `check_texts`.
    """
    tokens, lengths = check_texts(model, tokens, lengths)
    if not isinstance(difference, LogitDifference):
        raise ValueError(f"{difference!r} was given: give a LogitDifference, of which logits the parts are wanted.")
    difference.check(len(tokens), model.config.vocab_size)
    return _attribute(model, tokens, lengths, difference)


@jax.jit
def _attribute(model: Grok, tokens: jax.Array, lengths: jax.Array, difference: LogitDifference) -> LogitParts:
    def of_hidden(hidden: jax.Array) -> jax.Array:
        return difference(model.logits(hidden))

    hidden = jnp.zeros((len(tokens), model.config.model_dim), jnp.float32)
    direction = jax.grad(of_hidden)(hidden) * model.final_norm.scale[...][None]  # [B, D]: logits are linear
    along, last = _Along(direction), "last"
    taps = {
        "embedding": Tap("embedding", at=last, via=along),
        "attention": Tap("attention.out", at=last, via=along),
        "heads": Tap("attention.heads", at=last, via=_HeadsAlong(model, direction)),
        "feed_forward": Tap("feed_forward.out", at=last, via=along),
        "size": Tap("stream.out", [model.config.num_layers - 1], at=last, via=_Shrinking(model.final_norm.epsilon)),
    }
    logits, seen = observe(model, tokens, lengths, taps)
    (factor,) = seen.pop("size")  # [B]
    parts = {
        name: part * factor[(None,) * (part.ndim > 1) + (...,) + (None,) * (part.ndim > 2)]
        for name, part in seen.items()
    }
    return LogitParts(**parts, total=difference.by_row(logits))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Along:
    """What values [B, D] have along directions [B, D], float32 [B]."""

    direction: jax.Array

    def __call__(self, x: jax.Array, at: At) -> jax.Array:
        del at
        return (x.astype(jnp.float32) * self.direction).sum(axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _HeadsAlong:
    """What each head of values [B, N, H] adds to the stream along directions [B, D], float32 [B, N]."""

    model: Grok
    direction: jax.Array

    def __call__(self, x: jax.Array, at: At) -> jax.Array:
        assert at.layer is not None
        layers, num_heads = self.model.layers, x.shape[1]
        alone = x[:, None] * jnp.eye(num_heads, dtype=x.dtype)[None, :, :, None]  # [B, N, N, H]: row n has head n only
        joined = layers.attention.join_heads(alone, layer=at.layer).astype(jnp.float32)  # [B, N, D]
        norm = layers.post_attention_norm
        scale = lax.dynamic_index_in_dim(norm.scale[...], at.layer)  # [1, D]
        factor = _shrink(joined.sum(axis=1), norm.epsilon)[:, None]
        return (joined * (self.direction * scale)[:, None]).sum(axis=-1) * factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Shrinking:
    epsilon: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: jax.Array, at: At) -> jax.Array:
        del at
        return _shrink(x.astype(jnp.float32), self.epsilon)


def _shrink(x: jax.Array, epsilon: float) -> jax.Array:
    """By what an RMSNorm multiplies vectors [..., D] before its learnt factors, [...]."""
    return lax.rsqrt(jnp.square(x).mean(axis=-1) + epsilon)
