"""The experts backwards: the same sorted blocks of tokens, from the cotangents of the results to those of the operands.

What the two first products gave is saved, float32 [M * X, F], so that no product is computed again here. The rows are
gone through first, then the weights, expert by expert and part by part: a part is summed over its expert's blocks, and
written once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.kernels.cotangents import floats, of_floats, operand_cotangent, weight_cotangent
from grokjax.kernels.cpu_features import product_dtype
from grokjax.kernels.experts_blocks import SortedPairs, mix, run_blocks, sort_pairs, sum_blocks
from grokjax.kernels.gated_unit import GatedWeights, activate
from grokjax.kernels.products import matmuls
from grokjax.quantization import Weight

# Bytes of a weight's cotangent that are summed at once, in float32: on CPUs they should stay in the caches.
_PART_BYTES = {"cpu": 1 << 24, "gpu": 1 << 25, "tpu": 1 << 25}

# What the products with gate and up gave, sorted by expert: each float32 [M * X + block, F].
Saved = tuple[jax.Array, jax.Array]


def evaluate_saving(
    x: jax.Array,
    probabilities: jax.Array,
    experts: jax.Array,
    weights: GatedWeights,
    layer: jax.Array,
    *,
    sizes: tuple[int, ...],
    platform: str,
) -> tuple[jax.Array, Saved]:
    """`evaluate_in_blocks`, and what `pull_in_blocks` needs of it."""
    gate, up, down = weights
    pairs = sort_pairs(experts, gate.shape[1], sizes[-1])

    def evaluate(rows: jax.Array, at: tuple[jax.Array, ...], *_: jax.Array) -> tuple[jax.Array, ...]:
        multiply = functools.partial(matmuls, at=at, platform=platform)
        inputs, factors = multiply(x[rows], (gate, up))
        out = multiply(activate(inputs, factors).astype(x.dtype), (down,))[0]
        return out, inputs, factors

    # In float32: jax 0.10 converts all of what a loop writes bfloat16 numbers into, at every turn.
    num_rows, widths = experts.size + sizes[-1], (x.shape[1], gate.shape[-1], up.shape[-1])
    empty = tuple(jnp.zeros((num_rows, width), jnp.float32) for width in widths)
    out, inputs, factors = run_blocks(pairs, sizes, evaluate, empty, layer)
    return mix(out, probabilities, pairs, platform=platform), (inputs, factors)


def pull_in_blocks(
    operands: tuple[jax.Array, jax.Array, jax.Array, GatedWeights, jax.Array],
    saved: Saved,
    out: jax.Array,
    *,
    sizes: tuple[int, ...],
    platform: str,
) -> tuple[Any, ...]:
    """The cotangents of the operands of `evaluate_in_blocks`.

    Args:
      operands: x, probabilities, experts, weights and layer.
      saved: by `evaluate_saving`.
      out: float32 [M, D], the cotangent of the result.
      sizes: numbers of rows to compute a block with.
      platform: "cpu", "gpu" or "tpu", where it will run.
    """
    x, probabilities, experts, weights, layer = operands
    pairs = sort_pairs(experts, weights[0].shape[1], sizes[-1])
    num_rows = experts.size + sizes[-1]
    shares = jnp.zeros(num_rows, jnp.float32).at[pairs.places.reshape(-1)].set(probabilities.reshape(-1))

    def evaluate(
        rows: jax.Array, at: tuple[jax.Array, ...], first: jax.Array, left: jax.Array
    ) -> tuple[jax.Array, ...]:
        size = len(rows)
        inputs, factors = (lax.dynamic_slice_in_dim(part, first, size) for part in saved)
        share = jnp.where(jnp.arange(size, dtype=jnp.int32) < left, lax.dynamic_slice_in_dim(shares, first, size), 0)[
            :, None
        ]
        back = functools.partial(operand_cotangent, at=at, dtype=x.dtype, platform=platform)
        activated, pull = jax.vjp(activate, inputs, factors)
        unweighted = back(out[rows], weights[2])
        of_inputs, of_factors = pull(unweighted * share)
        of_x = back(of_inputs, weights[0]) + back(of_factors, weights[1])
        return of_x, (unweighted * activated).sum(axis=1), of_inputs, of_factors

    widths = (x.shape[1], *(part.shape[1] for part in saved))
    of_x, of_inputs, of_factors = (jnp.zeros((num_rows, width), jnp.float32) for width in widths)
    empty = of_x, jnp.zeros(num_rows, jnp.float32), of_inputs, of_factors
    of_x, of_shares, of_inputs, of_factors = run_blocks(pairs, sizes, evaluate, empty, layer)
    activated = activate(*saved).astype(x.dtype)
    products = (
        (x[pairs.tokens], of_inputs),
        (x[pairs.tokens], of_factors),
        (activated, out[pairs.tokens] * shares[:, None]),
    )
    of_weight = functools.partial(_weight_cotangent, sizes=sizes, platform=platform)
    of_weights = tuple(of_weight(*product, w, pairs, layer) for product, w in zip(products, weights, strict=True))
    of_probabilities = jnp.where(pairs.is_ours, of_shares[pairs.places.reshape(-1)], 0).reshape(experts.shape)
    of_x = mix(of_x, jnp.ones_like(probabilities), pairs, platform=platform).astype(x.dtype)
    return of_x, of_probabilities, None, of_weights, None


def _weight_cotangent(
    x: jax.Array,
    out: jax.Array,
    w: Weight,
    pairs: SortedPairs,
    layer: jax.Array,
    *,
    sizes: tuple[int, ...],
    platform: str,
) -> Any:
    """The cotangent of a stack of weights, of which one layer multiplied the sorted pairs.

    Args:
      x: [M * X + block, C], what was multiplied.
      out: float32 [M * X + block, O], the cotangent of the products.
      w: plain or quantised [L, E, C, O].
      pairs: how they are sorted.
      layer: int32 [].
      sizes: numbers of rows to compute a block with.
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      A tree like the weight in the dtype of its floats, None for the integers.
    """
    leaf = floats(w)
    in_floats = functools.partial(_floats_cotangent, sizes=sizes, platform=platform)
    if platform != "cpu" or leaf.dtype != jnp.bfloat16:
        return of_floats(in_floats(x, out, w, pairs, layer), w)
    # As integers: jax 0.10 converts all of what a loop writes bfloat16 numbers into, at every turn.
    in_bits = jax.custom_jvp(functools.partial(in_floats, as_bits=True))
    in_bits.defjvp(lambda operands, changes: jax.jvp(in_floats, operands, changes))
    return of_floats(in_bits(x, out, w, pairs, layer), w)


def _floats_cotangent(
    x: jax.Array,
    out: jax.Array,
    w: Weight,
    pairs: SortedPairs,
    layer: jax.Array,
    *,
    sizes: tuple[int, ...],
    platform: str,
    as_bits: bool = False,
) -> jax.Array:
    """What `_weight_cotangent` gives for the floats of the weight, in their dtype; as bits it has no derivatives."""
    (contracting, outputs), leaf = w.shape[-2:], floats(w)

    def stored(numbers: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(numbers, jnp.uint16) if as_bits else numbers

    if leaf is w:
        out = out.astype(product_dtype(x.dtype) if platform == "cpu" else x.dtype)  # once, not for every part
    # A plain weight's rows are those of its cotangent; the scales of a quantised one need all of them.
    num_parts = -(-contracting * outputs * 4 // _PART_BYTES[platform]) if leaf is w else 1
    size = -(-contracting // num_parts)
    part_shape = (size if leaf is w else leaf.shape[-2], outputs)

    def add_part(i: jax.Array, found: jax.Array) -> jax.Array:
        expert, part = jnp.divmod(jnp.asarray(i, jnp.int32), num_parts)
        begin = jnp.minimum(part * size, contracting - size)  # the last part slides back and repeats what was done

        def evaluate(first: jax.Array, left: jax.Array, num_rows: int) -> jax.Array:
            is_real = jnp.arange(num_rows, dtype=jnp.int32) < left
            factor = jnp.where(is_real[:, None], lax.dynamic_slice(x, (first, begin), (num_rows, size)), 0)
            own = lax.dynamic_slice_in_dim(out, first, num_rows)
            return weight_cotangent(factor, own, w, (layer, expert), platform=platform)

        total = stored(sum_blocks(pairs, sizes, expert, evaluate, part_shape).astype(leaf.dtype))
        return lax.dynamic_update_slice(found, total[None, None], (layer, expert, begin, jnp.zeros_like(begin)))

    whole = lax.fori_loop(0, leaf.shape[1] * num_parts, add_part, stored(jnp.zeros_like(leaf)))
    return lax.bitcast_convert_type(whole, leaf.dtype) if as_bits else whole
