"""How probable the tokens of a text are to a model: logits in blocks of positions and of vocabulary, never all at once.

Each block of logits leaves a few numbers for each of its positions, and those of two blocks join into those of both. So
do those of the devices over which the vocabulary is divided.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from grokjax.kernels import in_place, unembed
from grokjax.model.contexts import in_any_context
from grokjax.model.grok import Grok
from grokjax.model.slots import A
from grokjax.model.steps import check_texts
from grokjax.model.streamed import Compiled
from grokjax.printing import describe_fields
from grokjax.quantization import Table, partition_specs

# Positions, and tokens of the vocabulary, whose logits are there at once: 1 MiB of them.
_BLOCK = 512
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
    """

    logprob: A
    rank: A
    entropy: A
    top_id: A

    __repr__ = describe_fields

    def pack(self: "Scores[jax.Array]") -> jax.Array:
        """The fields side by side, int32 [..., 4]: one array, so that a step takes one copy to the host."""
        fields = self.logprob, self.rank, self.entropy, self.top_id
        return jnp.stack([field.view(jnp.int32) for field in fields], axis=-1)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "Scores[np.ndarray]":
        """What `pack` holds, on the host."""
        logprob, rank, entropy, top_id = (np.ascontiguousarray(packed[..., i]) for i in range(4))
        return Scores(logprob.view(np.float32), rank, entropy.view(np.float32), top_id)


@in_any_context
def score(model: Grok, tokens: ArrayLike, lengths: ArrayLike) -> Scores[jax.Array]:
    """How probable each token of some texts is, without a cache, in about the time and memory of a prefill.

    Args:
      model: the model, edited or not.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T.

    Returns:
      The scores of the tokens, each field [B, T].

    Raises:
      ValueError: Shapes disagree, a token is outside the vocabulary, a text is empty, or T exceeds max_seq_len.
    """
    return _score(model, *check_texts(model, tokens, lengths))


@Compiled
def _score(model: Grok, tokens: jax.Array, lengths: jax.Array) -> Scores[jax.Array]:
    hidden = model.hidden_states(tokens, count=lengths)
    of_next = scores_of(model, hidden, jnp.roll(tokens, -1, axis=1))
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    has_score = (positions > 0) & (positions < lengths[:, None])

    def placed(of_next: jax.Array, nothing: int) -> jax.Array:
        return jnp.where(has_score, jnp.roll(of_next, 1, axis=1), nothing)

    return Scores(
        logprob=placed(of_next.logprob, 0),
        rank=placed(of_next.rank, -1),
        entropy=placed(of_next.entropy, 0),
        top_id=placed(of_next.top_id, -1),
    )


def scores_of(model: Grok, hidden: jax.Array, targets: jax.Array) -> Scores[jax.Array]:
    """The scores of one token at each position, each field [B, T].

    Args:
      model: the model.
      hidden: [B, T, D], what it returned for the tokens up to each position.
      targets: int32 [B, T] in the vocabulary, the tokens that are scored there.
    """
    partitioner = model.partitioner.without_embed()
    table: Table = model.embedding.table.get_value()
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
            return _summarize(functools.partial(logits, block[0]), table, block[1], first, width, platform)

        with jax.named_scope("score"):
            reached = partitioner.psum(lax.map(target_logits, (blocks, wanted)), "vocab")
            own = jax.tree.map(lambda leaf: leaf[None], lax.map(summary, (blocks, reached)))
            every = _join(jax.tree.map(lambda leaf: partitioner.all_gather(leaf, "vocab", dimension=0), own))
            scores = every.scores(reached)
        return jax.tree.map(lambda leaf: leaf.reshape(-1)[: targets.size].reshape(targets.shape), scores)

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
    """

    top: jax.Array
    total: jax.Array
    weighted: jax.Array
    greater: jax.Array
    best: jax.Array

    def scores(self, target: jax.Array) -> Scores[jax.Array]:
        """The scores of the positions whose targets have these logits, once all logits are in the summary."""
        log_total = jnp.log(self.total)
        return Scores(
            logprob=target - self.top - log_total,
            rank=self.greater,
            entropy=log_total - self.weighted / self.total,
            top_id=self.best,
        )


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
    )


def _summarize(
    logits: Callable[[Table], jax.Array],
    table: Table,
    target: jax.Array,
    first: jax.Array,
    width: int,
    platform: str,
) -> _Summary:
    """The summary of all logits of a block of positions, block by block of the table.

    Args:
      logits: those of the positions, float32 [M, width], with some rows of the table, [width, D].
      table: the device's own rows.
      target: float32 [M], the logits of the targets.
      first: int32 [], the token of the table's first row.
      width: rows of a block, at most those of the table.
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
        )
        return _join(jax.tree.map(lambda *both: jnp.stack(both), before, found))

    shape, zeros = target.shape, jnp.zeros_like(target)
    none = jnp.zeros(shape, jnp.int32)
    nothing = _Summary(jnp.full(shape, _LEAST), zeros, zeros, none, none)
    return lax.fori_loop(0, -(-num_rows // width), add_block, nothing)


def _parts(table: Table, index: jax.Array, take: Callable[[jax.Array, jax.Array], jax.Array], platform: str) -> Table:
    """What `take` cuts out of each array of the table at an index that changes in a loop."""
    part: Table = jax.tree.map(lambda leaf: take(*in_place(leaf, index, platform=platform)), table)
    return part


def _in_blocks(rows: jax.Array, size: int) -> jax.Array:
    """Rows [M, ...] in blocks [n, size, ...], the last one padded."""
    padded = jnp.pad(rows, ((0, -len(rows) % size), *((0, 0),) * (rows.ndim - 1)))
    return padded.reshape(-1, size, *rows.shape[1:])
