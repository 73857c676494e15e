"""The experts on any device: the tokens sorted by expert, and one block of tokens of one expert after the other."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.kernels.gated_unit import GatedWeights, gated_unit
from grokjax.kernels.products import matmuls

# Tokens whose results are added up at a time on TPUs: there XLA writes out the rows that each addend gathers.
_TPU_TOKENS = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SortedPairs:
    """The (token, expert) pairs sorted by expert, and cut into blocks that never mix experts.

    Attributes:
      is_ours: bool [M * X], pairs of experts that are held, in the order of the tokens.
      places: int32 [M, X], where each pair stands in the order of the experts.
      tokens: int32 [M * X + block], the token of each pair in that order; the last block reads past the last pair.
      counts: int32 [E], pairs of each expert.
      starts: int32 [E], the first pair of each expert.
      block_ends: int32 [E], blocks of each expert and those before it.
    """

    is_ours: jax.Array
    places: jax.Array
    tokens: jax.Array
    counts: jax.Array
    starts: jax.Array
    block_ends: jax.Array


def sort_pairs(experts: jax.Array, num_held: int, block: int) -> SortedPairs:
    """Sorts the pairs of experts [M, X], of which `num_held` are held, for blocks with room for `block` pairs."""
    flat = experts.reshape(-1)
    is_ours = (flat >= 0) & (flat < num_held)
    flat = jnp.where(is_ours, flat, num_held)  # what is left out sorts last
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    places = jnp.argsort(order).astype(jnp.int32).reshape(experts.shape)
    counts = jnp.bincount(flat, length=num_held).astype(jnp.int32)
    block_ends = jnp.cumsum(-(-counts // block))
    starts = jnp.cumsum(counts) - counts
    tokens = jnp.pad(order // experts.shape[1], (0, block))
    return SortedPairs(is_ours, places, tokens, counts, starts, block_ends)


def evaluate_in_blocks(
    x: jax.Array,
    probabilities: jax.Array,
    experts: jax.Array,
    weights: GatedWeights,
    layer: jax.Array,
    *,
    sizes: tuple[int, ...],
    platform: str,
) -> jax.Array:
    """`experts.evaluate_experts`, one block of tokens of one expert at a time.

    The (token, expert) pairs are sorted by expert and cut into blocks of rows that never mix experts; a loop of as many
    steps as there are blocks reads each block's expert from the stack. An expert that nobody chose is not read; one
    that several tokens chose is read once a block. Arguments and result are those of `experts.evaluate_experts`, and
    `sizes`, the numbers of rows to compute a block with, see `experts.block_sizes`.
    """
    (num_tokens, per_token), block = experts.shape, sizes[-1]
    pairs = sort_pairs(experts, weights[0].shape[1], block)

    def evaluate(rows: jax.Array, at: tuple[jax.Array, ...], *_: jax.Array) -> jax.Array:
        multiply = functools.partial(matmuls, at=at, platform=platform)
        return gated_unit(x[rows], weights, multiply)

    empty = jnp.zeros((num_tokens * per_token + block, x.shape[1]), jnp.float32)
    out = run_blocks(pairs, sizes, evaluate, empty, layer)
    return mix(out, probabilities, pairs, platform=platform)


def run_blocks(
    pairs: SortedPairs,
    sizes: tuple[int, ...],
    evaluate: Callable[[jax.Array, tuple[jax.Array, jax.Array], jax.Array, jax.Array], Any],
    out: Any,
    layer: jax.Array,
) -> Any:
    """Runs one block after the other, each with the smallest of `sizes` that holds the tokens that its expert has left.

    Args:
      pairs: sorted for blocks of `sizes[-1]` rows.
      sizes: ascending.
      evaluate: (tokens of the block's rows, int32 [size]; the layer and their expert, two int32 []; the number of the
        first pair; how many of the rows are real, which may be more than there are) -> a tree of [size, ...].
      out: a tree of [M * X + sizes[-1], ...], into which the rows are written where their pairs stand.
      layer: int32 [].

    Returns:
      `out`.
    """
    block = sizes[-1]

    def run_block(i: jax.Array, out: Any) -> Any:
        expert = jnp.searchsorted(pairs.block_ends, i, side="right").astype(jnp.int32)
        # Where one expert is held, its weights would be the same at every turn, and XLA:TPU would copy them out of
        # their stack ahead of the loop: so the layer's number depends on the turn.
        at = (lax.optimization_barrier((layer, i))[0] if len(pairs.counts) == 1 else layer, expert)
        done = (i - jnp.where(expert > 0, pairs.block_ends[expert - 1], 0)) * block
        first = pairs.starts[expert] + done
        rows = lax.dynamic_slice_in_dim(pairs.tokens, first, block)
        left = pairs.counts[expert] - done

        def evaluate_padded(size: int) -> Any:
            found = evaluate(rows[:size], at, first, left)
            missing = block - size
            return jax.tree.map(lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), found)

        found = _in_smallest(sizes, left, evaluate_padded)  # rows behind are overwritten by the blocks that follow
        write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return jax.tree.map(write, out, found)

    return lax.fori_loop(0, pairs.block_ends[-1], run_block, out)


def sum_blocks(
    pairs: SortedPairs,
    sizes: tuple[int, ...],
    expert: jax.Array,
    evaluate: Callable[[jax.Array, jax.Array, int], jax.Array],
    shape: tuple[int, ...],
) -> jax.Array:
    """Sums what is found for the blocks of one expert.

    Args:
      pairs: sorted for blocks of `sizes[-1]` rows.
      sizes: ascending.
      expert: int32 [].
      evaluate: (the number of the block's first pair; how many of its rows are real, which may be more than there are;
        how many there are) -> float32 of the shape.
      shape: of the sum.

    Returns:
      float32 of the shape, zeros for an expert that nobody chose.
    """
    start, count = pairs.starts[expert], pairs.counts[expert]

    def evaluate_block(done: jax.Array) -> jax.Array:
        left = count - done
        return _in_smallest(sizes, left, lambda size: evaluate(start + done, left, size))

    def add_block(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + evaluate_block(jnp.asarray(i, jnp.int32) * sizes[-1])  # a loop's index is of 64 bits under x64

    # Most experts have one block: its sum is written, not added to zeros.
    first = lax.cond(count > 0, lambda: evaluate_block(jnp.zeros_like(count)), lambda: jnp.zeros(shape, jnp.float32))
    if pairs.places.size <= sizes[-1]:  # there is no second one
        return first
    return lax.fori_loop(1, -(-count // sizes[-1]), add_block, first)


def _in_smallest(sizes: tuple[int, ...], left: jax.Array, evaluate: Callable[[int], Any]) -> Any:
    """`evaluate(size)` with the smallest of the sizes that holds so many tokens, or the last."""
    choice = (left > jnp.array(sizes[:-1], jnp.int32)).sum(dtype=jnp.int32)
    return lax.switch(choice, [functools.partial(evaluate, size) for size in sizes])


def mix(out: jax.Array, probabilities: jax.Array, pairs: SortedPairs, *, platform: str) -> jax.Array:
    """The sum over each token's experts [M, D] of what they gave its pairs, weighted by the probabilities [M, X]."""
    shares = jnp.where(pairs.is_ours, probabilities.reshape(-1), 0).reshape(probabilities.shape)

    def add_up(places: jax.Array, shares: jax.Array) -> jax.Array:
        parts = [out[places[:, choice]] * shares[:, choice, None] for choice in range(shares.shape[1])]
        return sum(parts[1:], parts[0])

    def add_up_one(token: tuple[jax.Array, jax.Array]) -> jax.Array:
        return add_up(*(part[None] for part in token))[0]

    if platform != "tpu":
        return add_up(pairs.places, shares)
    return lax.map(add_up_one, (pairs.places, shares), batch_size=_TPU_TOKENS)
