"""The experts backwards: the same sorted blocks of tokens, from the cotangents of the results to those of the operands.

What the two first products gave is saved, float numbers [M * X, F]; all else is computed again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.kernels.cotangents import floats, of_floats, operand_cotangent, weight_cotangent
from grokjax.kernels.experts_blocks import mix, run_blocks, sort_pairs
from grokjax.kernels.gated_unit import GatedWeights, activate
from grokjax.kernels.products import matmuls

# What the products with gate and up gave, sorted by expert: each [M * X + block, F] in the compute dtype.
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

    def evaluate(rows: jax.Array, expert: jax.Array, *_: jax.Array) -> tuple[Any, tuple[()]]:
        multiply = functools.partial(matmuls, at=(layer, expert), platform=platform)
        inputs, factors = multiply(x[rows], (gate, up))
        out = multiply(activate(inputs, factors).astype(x.dtype), (down,))[0]
        return (out, inputs.astype(x.dtype), factors.astype(x.dtype)), ()

    num_rows, hidden = experts.size + sizes[-1], gate.shape[-1]
    shapes = ((x.shape[1], jnp.float32), (hidden, x.dtype), (hidden, x.dtype))
    empty = tuple(jnp.zeros((num_rows, size), dtype) for size, dtype in shapes)
    (out, inputs, factors), _ = run_blocks(pairs, sizes, evaluate, empty)
    return mix(out, probabilities, pairs), (inputs, factors)


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

    def evaluate(rows: jax.Array, expert: jax.Array, first: jax.Array, left: jax.Array) -> tuple[Any, Any]:
        at, size = (layer, expert), len(rows)
        inputs, factors = (lax.dynamic_slice_in_dim(part, first, size).astype(jnp.float32) for part in saved)
        share = jnp.where(jnp.arange(size, dtype=jnp.int32) < left, lax.dynamic_slice_in_dim(shares, first, size), 0)[
            :, None
        ]
        back = functools.partial(operand_cotangent, at=at, dtype=x.dtype, platform=platform)
        activated, pull = jax.vjp(activate, inputs, factors)
        unweighted = back(out[rows], weights[2])
        of_inputs, of_factors = pull(unweighted * share)
        of_x = back(of_inputs, weights[0]) + back(of_factors, weights[1])
        products = ((x[rows], of_inputs), (x[rows], of_factors), (activated.astype(x.dtype), out[rows] * share))
        of_weights = [
            weight_cotangent(*product, w, at, platform=platform) for product, w in zip(products, weights, strict=True)
        ]
        return (of_x, (unweighted * activated).sum(axis=1)), of_weights

    def add(sums: list[jax.Array], parts: list[jax.Array], expert: jax.Array) -> list[jax.Array]:
        return [total.at[layer, expert].add(part) for total, part in zip(sums, parts, strict=True)]

    empty = jnp.zeros((num_rows, x.shape[1]), jnp.float32), jnp.zeros(num_rows, jnp.float32)
    sums = [jnp.zeros(floats(w).shape, jnp.float32) for w in weights]
    (of_x, of_shares), sums = run_blocks(pairs, sizes, evaluate, empty, sums, add)
    of_weights = tuple(of_floats(total.astype(floats(w).dtype), w) for total, w in zip(sums, weights, strict=True))
    of_probabilities = jnp.where(pairs.is_ours, of_shares[pairs.places.reshape(-1)], 0).reshape(experts.shape)
    return mix(of_x, jnp.ones_like(probabilities), pairs).astype(x.dtype), of_probabilities, None, of_weights, None
