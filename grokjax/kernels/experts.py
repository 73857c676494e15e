"""The experts that each token chose: chooses the form for the device, and has that in sorted blocks of tokens."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.kernels import experts_gpu
from grokjax.kernels.gated_unit import GatedWeights, gated_unit
from grokjax.kernels.products import matmuls

# Numbers of rows for which a CPU has programs of their own; at the largest a product is fastest, a row.
_CPU_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384)
# On TPUs, and on GPUs where there is no kernel: those of a decode step's short blocks, fewest and most rows of a block.
_FEW_ROWS, _FEWEST_ROWS, _MOST_ROWS = (1, 2), 8, 128
# On GPUs, where an expert has so many tokens that its weights are cast first: in quarters of a fair share.
_GPU_SIZES = (1, 2, 3, 4, 5, 6, 8)


def evaluate_experts(
    x: jax.Array,
    probabilities: jax.Array,
    experts: jax.Array,
    weights: GatedWeights,
    *,
    layer: jax.Array,
    num_experts: int,
    platform: str,
) -> jax.Array:
    """The sum over each token's experts, weighted by their probabilities.

    On GPUs a few tokens an expert are `experts_gpu.evaluate_in_one_kernel`; all else is `evaluate_in_blocks`.

    Args:
      x: [M, D] in the compute dtype.
      probabilities: float32 [M, X].
      experts: int32 [M, X], numbers of experts in `weights`, those of a token all different; others (below 0, or E and
        above) are left out.
      weights: gate and up [L, E, D, F] and down [L, E, F, D].
      layer: int32 [].
      num_experts: of all devices; tokens are expected to be spread over them.
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      float32 [M, D].
    """
    (num_tokens, per_token), routed = experts.shape, (probabilities, experts)
    if platform == "gpu" and experts_gpu.fits(x, weights, per_token=per_token, num_experts=num_experts):
        return experts_gpu.evaluate_in_one_kernel(x, *routed, weights, layer=layer, num_experts=num_experts)
    sizes = block_sizes(num_tokens, per_token=per_token, num_experts=num_experts, platform=platform)
    return evaluate_in_blocks(x, *routed, weights, layer=layer, sizes=sizes, platform=platform)


def block_sizes(num_tokens: int, *, per_token: int, num_experts: int, platform: str) -> tuple[int, ...]:
    """Numbers of rows, ascending, that a block of tokens of one expert can be computed with; the last is its room.

    On a CPU a block has room for whatever comes, so that an expert's weights are read, cast and packed once, and is
    computed with the size next to what came. So it is on GPUs where many come, with room for two fair shares. Elsewhere
    it has room for one: a larger one would be filled up with rows of nobody, a smaller one would read the weights more
    often.
    """
    fair_share = max(1, num_tokens * per_token // num_experts)
    if platform == "cpu":
        room = min(num_tokens, _CPU_SIZES[-1])
        return (*(size for size in _CPU_SIZES if fair_share / 4 <= size < room), room)
    if platform == "gpu" and not experts_gpu.is_few(num_tokens, per_token=per_token, num_experts=num_experts):
        return tuple(size * (-(-fair_share // 4)) for size in _GPU_SIZES if size * fair_share <= 4 * num_tokens)
    room = min(num_tokens, _MOST_ROWS, max(_FEWEST_ROWS, 1 << (fair_share - 1).bit_length()))
    return (*(size for size in _FEW_ROWS if size < room <= _FEWEST_ROWS), room)


@dataclasses.dataclass(frozen=True)
class _SortedPairs:
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


def _sort_pairs(experts: jax.Array, num_held: int, block: int) -> _SortedPairs:
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
    return _SortedPairs(is_ours, places, tokens, counts, starts, block_ends)


def evaluate_in_blocks(
    x: jax.Array,
    probabilities: jax.Array,
    experts: jax.Array,
    weights: GatedWeights,
    *,
    layer: jax.Array,
    sizes: tuple[int, ...],
    platform: str,
) -> jax.Array:
    """`evaluate_experts`, one block of tokens of one expert at a time.

    The (token, expert) pairs are sorted by expert and cut into blocks of rows that never mix experts; a loop of as many
    steps as there are blocks reads each block's expert from the stack. An expert that nobody chose is not read; one
    that several tokens chose is read once a block. Arguments and result are those of `evaluate_experts`, and `sizes`,
    the numbers of rows to compute a block with, see `block_sizes`.
    """
    block, (num_tokens, per_token) = sizes[-1], experts.shape
    pairs = _sort_pairs(experts, weights[0].shape[1], block)

    def add_block(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(pairs.block_ends, i, side="right").astype(jnp.int32)
        done = (i - jnp.where(expert > 0, pairs.block_ends[expert - 1], 0)) * block
        first = pairs.starts[expert] + done
        rows = lax.dynamic_slice_in_dim(pairs.tokens, first, block)
        multiply = functools.partial(matmuls, at=(layer, expert), platform=platform)

        def evaluate(size: int) -> Callable[[], jax.Array]:
            return lambda: jnp.pad(gated_unit(x[rows[:size]], weights, multiply), ((0, block - size), (0, 0)))

        # The smallest size that holds the expert's tokens; rows behind them are overwritten by the blocks that follow.
        choice = (pairs.counts[expert] - done > jnp.array(sizes[:-1], jnp.int32)).sum(dtype=jnp.int32)
        return lax.dynamic_update_slice_in_dim(out, lax.switch(choice, [evaluate(size) for size in sizes]), first, 0)

    out = jnp.zeros((num_tokens * per_token + block, x.shape[1]), jnp.float32)
    out = lax.fori_loop(0, pairs.block_ends[-1], add_block, out)
    shares = jnp.where(pairs.is_ours, probabilities.reshape(-1), 0).reshape(probabilities.shape)
    return sum(out[pairs.places[:, choice]] * shares[:, choice, None] for choice in range(per_token))
