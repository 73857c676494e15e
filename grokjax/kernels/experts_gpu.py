"""The experts on GPUs: all of them in one kernel for each weight, where each has few tokens."""

import functools

import jax
import jax.numpy as jnp

from grokjax.kernels import matmul_gpu
from grokjax.kernels.gated_unit import GatedWeights, gated_unit
from grokjax.kernels.products import KERNEL_ROWS

# Most tokens of which every one is computed by every chosen expert: rows that nobody asked for cost a kernel nothing.
_COMMON_ROWS = 16


def is_few(num_tokens: int, *, per_token: int, num_experts: int) -> bool:
    """Whether the experts of a GPU expect so few tokens each that a kernel casts their weights faster."""
    return num_tokens * per_token <= KERNEL_ROWS * num_experts


def fits(x: jax.Array, weights: GatedWeights, *, per_token: int, num_experts: int) -> bool:
    """Whether `evaluate_in_one_kernel` takes these, and gains: an expert has so few tokens that it is faster."""
    gate, up, down = weights
    gains = is_few(len(x), per_token=per_token, num_experts=num_experts)
    return gains and matmul_gpu.fits(x, (gate, up)) and matmul_gpu.fits(x, (down,))


def evaluate_in_one_kernel(
    x: jax.Array,
    probabilities: jax.Array,
    experts: jax.Array,
    weights: GatedWeights,
    *,
    layer: jax.Array,
    num_experts: int,
) -> jax.Array:
    """`experts.evaluate_experts` with all experts in one kernel for each weight, for GPUs.

    A loop over blocks, as in `experts.evaluate_in_blocks`, would ask the host at every turn whether it goes on. Few
    tokens are all computed by every expert that one of them chose, many are sorted into blocks of one expert each.

    Args:
      x: bfloat16 [M, D].
      probabilities: float32 [M, X].
      experts: int32 [M, X], as in `experts.evaluate_in_blocks`, those of a token all different.
      weights: gate and up [L, E, D, F] and down [L, E, F, D].
      layer: int32 [].
      num_experts: of all devices; tokens are expected to be spread over them.

    Returns:
      float32 [M, D].
    """
    if len(x) <= _COMMON_ROWS:
        return _evaluate_common(x, probabilities, experts, weights, layer=layer)
    return _evaluate_sorted(x, probabilities, experts, weights, layer=layer, num_experts=num_experts)


def _evaluate_common(
    x: jax.Array, probabilities: jax.Array, experts: jax.Array, weights: GatedWeights, *, layer: jax.Array
) -> jax.Array:
    """All tokens by every expert that one of them chose: rows that nobody asked for are weighted with 0."""
    held = weights[0].shape[1]
    candidates = experts[0] if len(x) == 1 else jnp.arange(held, dtype=jnp.int32)  # [N]
    is_ours = (candidates >= 0) & (candidates < held)
    choices = (experts[None] == candidates[:, None, None]) & is_ours[:, None, None]  # [N, M, X]
    chosen = choices.any(axis=-1)
    shares = jnp.where(choices, probabilities[None], 0).sum(axis=-1)
    wanted, most = chosen.any(axis=-1), min(held, experts.size)
    out = _gated_units(x[None], weights, layer=layer, experts=candidates, is_wanted=wanted, num_wanted=most)
    return jnp.where(chosen[..., None], out * shares[..., None], 0).sum(axis=0)  # what is not wanted is no number


def _evaluate_sorted(
    x: jax.Array,
    probabilities: jax.Array,
    experts: jax.Array,
    weights: GatedWeights,
    *,
    layer: jax.Array,
    num_experts: int,
) -> jax.Array:
    """The (token, expert) pairs in blocks of one expert each.

    They are few, and comparing each with each is one kernel where a sort is several.
    """
    (num_tokens, per_token), held = experts.shape, weights[0].shape[1]
    pairs = experts.size
    # Room for twice a fair share: that an expert has a second block costs more than rows of nobody.
    tile = matmul_gpu.tile_rows(max(1, 2 * pairs // num_experts))
    most = min(held * -(-num_tokens // tile), pairs // tile + min(held, pairs))
    flat, number = experts.reshape(-1), jnp.arange(pairs, dtype=jnp.int32)  # [M * X]
    is_ours = (flat >= 0) & (flat < held)
    counts = (flat[None] == jnp.arange(held, dtype=jnp.int32)[:, None]).sum(axis=1, dtype=jnp.int32)  # [E]
    ends = jnp.cumsum(-(-counts // tile))  # blocks
    first = ends - -(-counts // tile)
    is_before = (flat[None] == flat[:, None]) & (number[None] < number[:, None])  # pairs of the same expert
    before = is_before.sum(axis=1, dtype=jnp.int32)
    places = jnp.where(is_ours, first[jnp.where(is_ours, flat, 0)] * tile + before, most * tile + number)
    tokens = jnp.zeros(most * tile, jnp.int32).at[places].set(number // per_token, mode="drop", unique_indices=True)
    block = jnp.arange(most, dtype=jnp.int32)
    chosen = jnp.minimum((ends[None] <= block[:, None]).sum(axis=1, dtype=jnp.int32), held - 1)
    rows = x[tokens].reshape(most, tile, -1)
    expected = max(1, pairs * held // (num_experts * tile) + held // 2)
    out = _gated_units(rows, weights, layer=layer, experts=chosen, is_wanted=block < ends[-1], num_wanted=expected)
    found = out.reshape(most * tile, -1)[places] * probabilities.reshape(-1, 1)
    return jnp.where(is_ours[:, None], found, 0).reshape(num_tokens, per_token, -1).sum(axis=1)


def _gated_units(
    x: jax.Array,
    weights: GatedWeights,
    *,
    layer: jax.Array,
    experts: jax.Array,
    is_wanted: jax.Array,
    num_wanted: int,
) -> jax.Array:
    """`gated_unit` of rows [N or 1, M, D] with N experts, int32 [N]: float32 [N, M, D]."""
    at = jnp.stack([jnp.broadcast_to(layer, experts.shape), experts], axis=1).astype(jnp.int32)
    multiply = functools.partial(matmul_gpu.stack_matmul, at=at, is_wanted=is_wanted, num_wanted=num_wanted)
    return gated_unit(x, weights, multiply)
