"""How probable the tokens of a text are to a model: logits in blocks of positions and of vocabulary, never all at once.

Each block of logits leaves a few numbers for each of its positions, and those of two blocks join into those of both. So
do those of the devices over which the vocabulary is divided.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from grokjax.config import GrokConfig
from grokjax.kernels import in_place, unembed
from grokjax.model.contexts import in_any_context
from grokjax.model.grok import Grok
from grokjax.model.slots import A
from grokjax.model.steps import check_texts
from grokjax.model.streamed import Compiled
from grokjax.printing import describe_fields
from grokjax.quantization import Table, partition_specs, without_columns
from grokjax.request import check_integer

# Positions, and tokens of the vocabulary, whose logits are there at once: 1 MiB of them.
_BLOCK = 512
# No row of `pad_texts` is shorter.
_SHORTEST = 16
# Below every logit, and finite: what is multiplied by 0 must stay a number.
_LEAST = float(np.finfo(np.float32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scores(Generic[A]):
    """How a model takes each token of some texts, given the tokens before it: temperature 1, no mask, no filter.

    There is nothing to say of a text's first token, nor of padding: there logprob and entropy are 0, which a sum over a
    text does not notice, and rank and top_id are -1.

    Attributes:
      logprob: float32 [B, T], natural log-probability of the token.
      rank: int32 [B, T], how many tokens are more probable than it: 0 for the most probable one, and for those that are
        exactly as probable.
      entropy: float32 [B, T], of the distribution that the token was expected by, in nats.
      top_id: int32 [B, T], the token that was most probable in its place; of several, that with the lowest id.
      top_ids: int32 [B, T, K], the most probable tokens in its place, best first, of equal ones the lowest id first; -1
        where there is nothing to say. None where they were not asked for.
      top_logprobs: float32 [B, T, K], their log-probabilities; 0 where there is nothing to say.
    """

    logprob: A
    rank: A
    entropy: A
    top_id: A
    top_ids: A | None = None
    top_logprobs: A | None = None

    __repr__ = describe_fields

    def pack(self: "Scores[jax.Array]") -> jax.Array:
        """The fields side by side, int32 [..., 4 + 2 K]: one array, so that a step takes one copy to the host."""
        fields = self.logprob, self.rank, self.entropy, self.top_id
        packed = jnp.stack([field.view(jnp.int32) for field in fields], axis=-1)
        if self.top_ids is None or self.top_logprobs is None:
            return packed
        return jnp.concatenate([packed, self.top_ids, self.top_logprobs.view(jnp.int32)], axis=-1)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "Scores[np.ndarray]":
        """The scores [...] that `pack` made int32 [..., 4] of, on the host."""
        logprob, rank, entropy, top_id = (np.ascontiguousarray(packed[..., i]) for i in range(4))
        scores = Scores(logprob.view(np.float32), rank, entropy.view(np.float32), top_id)
        if packed.shape[-1] == 4:
            return scores
        top_ids, top_logprobs = np.split(packed[..., 4:], 2, axis=-1)
        return dataclasses.replace(scores, top_ids=top_ids, top_logprobs=top_logprobs.view(np.float32))


@in_any_context
def score(model: Grok, tokens: ArrayLike, lengths: ArrayLike, *, num_top: int = 0) -> Scores[jax.Array]:
    """How probable each token of some texts is, without a cache, in about the time and memory of a prefill.

    Args:
      model: the model, edited or not.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T.
      num_top: K, most probable tokens that are told of each position, 0 to V; another number is compiled anew.

    Returns:
      The scores of the tokens, each field [B, T].

    Raises:
      ValueError: Shapes disagree, a token is outside the vocabulary, a text is empty, T exceeds max_seq_len, or num_top
        is out of its range.
    """
    num_top = check_integer("num_top", num_top, 0, model.config.vocab_size)
    return _score(model, *check_texts(model, tokens, lengths), num_top=num_top)


def pad_texts(
    config: GrokConfig, texts: Sequence[Sequence[int] | np.ndarray], num_rows: int, max_len: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Texts as rows of one length, a power of two if there is room: few shapes, so that few programs are compiled.

    Args:
      config: the sizes.
      texts: the tokens of each, at least one text and one token.
      num_rows: B, as many rows as there are texts, or more: the others are texts of one token.
      max_len: length of the longest text that there may be; by default the model's longest sequence.

    Returns:
      Tokens, int32 [B, T], and lengths, int32 [B], as `score` takes them.
    """
    rows = [np.asarray(text, np.int32) for text in texts]
    width = max(_SHORTEST, 1 << (max(map(len, rows)) - 1).bit_length())
    tokens = np.full((num_rows, min(width, max_len or config.max_seq_len)), config.pad_id, np.int32)
    lengths = np.ones(num_rows, np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        lengths[number] = len(row)
    return tokens, lengths


@functools.partial(Compiled, static=("num_top",))
def _score(model: Grok, tokens: jax.Array, lengths: jax.Array, *, num_top: int = 0) -> Scores[jax.Array]:
    hidden = model.hidden_states(tokens, count=lengths)
    of_next = scores_of(model, hidden, jnp.roll(tokens, -1, axis=1), num_top)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    has_score = (positions > 0) & (positions < lengths[:, None])

    def placed(of_next: jax.Array, nothing: int) -> jax.Array:
        here = has_score if of_next.ndim == 2 else has_score[..., None]
        return jnp.where(here, jnp.roll(of_next, 1, axis=1), nothing)

    return Scores(
        logprob=placed(of_next.logprob, 0),
        rank=placed(of_next.rank, -1),
        entropy=placed(of_next.entropy, 0),
        top_id=placed(of_next.top_id, -1),
        top_ids=None if of_next.top_ids is None else placed(of_next.top_ids, -1),
        top_logprobs=None if of_next.top_logprobs is None else placed(of_next.top_logprobs, 0),
    )


def scores_of(model: Grok, hidden: jax.Array, targets: jax.Array, num_top: int = 0) -> Scores[jax.Array]:
    """The scores of one token at each position, each field [B, T].

    Args:
      model: the model.
      hidden: [B, T, D], what it returned for the tokens up to each position.
      targets: int32 [B, T] in the vocabulary, the tokens that are scored there.
      num_top: K, most probable tokens that are told of each position; 0 for none, without their fields.
    """
    partitioner = model.partitioner.without_embed()
    table = without_columns(model.embedding.table.get_value())
    rows = partitioner.spec(("batch", None), targets.shape)
    platform, multiplier = partitioner.platform, model.config.output_multiplier

    def logits(x: jax.Array, some: Table) -> jax.Array:
        return unembed(x, some, platform=platform) * multiplier

    def of_own_rows(x: jax.Array, table: Table, targets: jax.Array) -> Scores[jax.Array]:
        num_own = table.shape[0]
        width = min(_BLOCK, num_own)
        height = min(width, targets.size)
        blocks, wanted = _in_blocks(x.reshape(-1, x.shape[-1]), height), _in_blocks(targets.reshape(-1), height)
        first = jnp.asarray(partitioner.index("vocab") * num_own, jnp.int32)

        def target_logits(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, targets = block
            own = targets - first
            at = jnp.clip(own, 0, num_own - 1)
            # By a product of the shape that gives the others: what is as probable has the same logit to the bit.
            rows = _parts(table, jnp.pad(at, (0, width - height)), operator.getitem, platform)
            found = jnp.diagonal(logits(x, rows))
            return jnp.where(own == at, found, 0)

        def summary(block: tuple[jax.Array, jax.Array]) -> _Summary:
            of_block = functools.partial(logits, block[0])
            return _summarize(of_block, table, block[1], first, width, num_top, platform)

        with jax.named_scope("score"):
            reached = partitioner.psum(lax.map(target_logits, (blocks, wanted)), "vocab")
            own = jax.tree.map(lambda leaf: leaf[None], lax.map(summary, (blocks, reached)))
            every = _join(jax.tree.map(lambda leaf: partitioner.all_gather(leaf, "vocab", dimension=0), own))
            scores = every.scores(reached)
        return jax.tree.map(lambda leaf: _in_texts(leaf, targets.shape), scores)

    in_specs = (PartitionSpec(*rows, None), partition_specs(table, ("vocab", "embed"), partitioner), rows)
    scores: Scores[jax.Array] = partitioner.shard_map(of_own_rows, in_specs=in_specs, out_specs=rows)(
        hidden, table, targets
    )
    return scores


class _Summary(NamedTuple):
    """What some logits of each position leave behind, each [...].

    Attributes:
      top: float32, the greatest logit.
      total: float32, the sum of exp(logit - top).
      weighted: float32, the sum of exp(logit - top) * (logit - top).
      greater: int32, how many are greater than the target's.
      best: int32, the lowest token that has the greatest.
      greatest: the K greatest logits with their tokens, if they are asked for.
    """

    top: jax.Array
    total: jax.Array
    weighted: jax.Array
    greater: jax.Array
    best: jax.Array
    greatest: "_Greatest | None"

    def scores(self, target: jax.Array) -> Scores[jax.Array]:
        """The scores of the positions whose targets have these logits, once all logits are in the summary."""
        log_total = jnp.log(self.total)
        scores = Scores(
            logprob=target - self.top - log_total,
            rank=self.greater,
            entropy=log_total - self.weighted / self.total,
            top_id=self.best,
        )
        if self.greatest is None:
            return scores
        top_logprobs = self.greatest.logits - (self.top + log_total)[..., None]
        return dataclasses.replace(scores, top_ids=self.greatest.tokens, top_logprobs=top_logprobs)


class _Greatest(NamedTuple):
    """The greatest logits of each position, the greatest first; of equal ones the lowest token first.

    Attributes:
      logits: float32 [..., K]; `_LEAST` where there are fewer.
      tokens: int32 [..., K].
    """

    logits: jax.Array
    tokens: jax.Array

    @classmethod
    def of(cls, logits: jax.Array, tokens: jax.Array, num_top: int) -> "_Greatest":
        """Those among logits [..., n] of tokens [..., n], equal ones of which are in the order of their tokens."""
        found, places = lax.top_k(logits, min(num_top, logits.shape[-1]))
        lacking = [(0, 0)] * (logits.ndim - 1) + [(0, num_top - found.shape[-1])]
        found_tokens = jnp.take_along_axis(tokens, places.astype(jnp.int32), axis=-1)
        return cls(jnp.pad(found, lacking, constant_values=_LEAST), jnp.pad(found_tokens, lacking))

    def joined(self) -> "_Greatest":
        """Those of all parts, from those of each [n, ..., K] in the order of their tokens."""
        logits, tokens = (jnp.moveaxis(field, 0, -2) for field in self)  # [..., n, K]
        shape = *logits.shape[:-2], -1
        return self.of(logits.reshape(shape), tokens.reshape(shape), logits.shape[-1])


def _join(parts: _Summary) -> _Summary:
    """The summary of all logits from those of parts of them, [n, ...]."""
    top = parts.top.max(axis=0)
    lower = parts.top - top[None]
    scale = jnp.exp(lower)
    is_best = parts.top == top[None]
    return _Summary(
        top=top,
        total=(scale * parts.total).sum(axis=0),
        weighted=(scale * (parts.weighted + lower * parts.total)).sum(axis=0),
        greater=parts.greater.sum(axis=0, dtype=jnp.int32),
        best=jnp.where(is_best, parts.best, np.iinfo(np.int32).max).min(axis=0),
        greatest=None if parts.greatest is None else parts.greatest.joined(),
    )


def _summarize(
    logits: Callable[[Table], jax.Array],
    table: Table,
    target: jax.Array,
    first: jax.Array,
    width: int,
    num_top: int,
    platform: str,
) -> _Summary:
    """The summary of all logits of a block of positions, block by block of the table.

    Args:
      logits: those of the positions, float32 [M, width], with some rows of the table, [width, D].
      table: the device's own rows.
      target: float32 [M], the logits of the targets.
      first: int32 [], the token of the table's first row.
      width: rows of a block, at most those of the table.
      num_top: K, how many of the greatest logits are kept.
      platform: where it runs.
    """
    num_rows = table.shape[0]

    def add_block(i: jax.Array, before: _Summary) -> _Summary:
        start = jnp.minimum(i * width, num_rows - width)  # the last block slides left and leaves out what was seen
        rows = start + jnp.arange(width, dtype=jnp.int32)
        part = _parts(table, start, functools.partial(lax.dynamic_slice_in_dim, slice_size=width), platform)
        here = jnp.where((rows >= i * width)[None], logits(part), _LEAST)
        top = here.max(axis=1)
        lower = here - top[:, None]
        weights = jnp.exp(lower)
        found = _Summary(
            top=top,
            total=weights.sum(axis=1),
            weighted=(weights * lower).sum(axis=1),
            greater=(here > target[:, None]).sum(axis=1, dtype=jnp.int32),
            best=jnp.where(here == top[:, None], (first + rows)[None], np.iinfo(np.int32).max).min(axis=1),
            greatest=_Greatest.of(here, jnp.broadcast_to(first + rows, here.shape), num_top) if num_top else None,
        )
        return _join(jax.tree.map(lambda *both: jnp.stack(both), before, found))

    shape, zeros = target.shape, jnp.zeros_like(target)
    none = jnp.zeros(shape, jnp.int32)
    none_greatest = _Greatest(jnp.full((*shape, num_top), _LEAST), jnp.zeros((*shape, num_top), jnp.int32))
    nothing = _Summary(jnp.full(shape, _LEAST), zeros, zeros, none, none, none_greatest if num_top else None)
    return lax.fori_loop(0, -(-num_rows // width), add_block, nothing)


def _parts(table: Table, index: jax.Array, take: Callable[[jax.Array, jax.Array], jax.Array], platform: str) -> Table:
    """What `take` cuts out of each array of the table at an index that changes in a loop."""
    part: Table = jax.tree.map(lambda leaf: take(*in_place(leaf, index, platform=platform)), table)
    return part


def _in_blocks(rows: jax.Array, size: int) -> jax.Array:
    """Rows [M, ...] in blocks [n, size, ...], the last one padded."""
    padded = jnp.pad(rows, ((0, -len(rows) % size), *((0, 0),) * (rows.ndim - 1)))
    return padded.reshape(-1, size, *rows.shape[1:])


def _in_texts(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Blocks [n, size, ...] of the positions of texts as the texts [B, T, ...], without what pads the last block."""
    rest = rows.shape[2:]
    return rows.reshape(-1, *rest)[: math.prod(shape)].reshape(*shape, *rest)
