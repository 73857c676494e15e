"""Products with weights, backwards: the cotangents of the operands, block by block, so that no weight is cast whole."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from grokjax.kernels.cpu_features import product_dtype
from grokjax.kernels.slices import float_precision, in_place, num_scale_blocks, select, transposed, weight_and_scales
from grokjax.quantization import QuantizedArray, Weight

# Bytes of a weight that are cast at once: on CPUs they should stay in a core's cache, elsewhere each step has a price.
_BLOCK_BYTES = {"cpu": 1 << 21, "gpu": 1 << 25, "tpu": 1 << 25}


def operand_cotangent(
    out: jax.Array, w: Weight, at: tuple[jax.Array, ...], *, dtype: DTypeLike, platform: str
) -> jax.Array:
    """The cotangent of x in `x @ w[at]`, which is `out @ w[at].T`.

    Args:
      out: float32 [M, O], the cotangent of the product.
      w: plain or quantised [*stack, C, O].
      at: one index, int32 [], for each stack axis.
      dtype: of x; products are made in it, and summed in float32.
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      float32 [M, C].
    """
    weight, scales = weight_and_scales(w)
    blocks = _Blocks.of(w, platform)
    dtype = product_dtype(dtype) if platform == "cpu" else jnp.dtype(dtype)

    def add_block(i: jax.Array, cotangent: jax.Array) -> jax.Array:
        held, i = in_place(weight, i, platform=platform)
        q, start, _ = blocks.at(i)
        scaled = out if scales is None else out * select(scales, at, q, 1).astype(jnp.float32)
        part = _product("mo,co->mc", scaled.astype(dtype), select(held, at, start, blocks.rows).astype(dtype))
        return lax.dynamic_update_slice_in_dim(cotangent, part, start, axis=1)

    return lax.fori_loop(0, blocks.number, add_block, jnp.zeros((len(out), w.shape[-2]), jnp.float32))


def weight_cotangent(x: jax.Array, out: jax.Array, w: Weight, at: tuple[jax.Array, ...], *, platform: str) -> jax.Array:
    """The cotangent of the floats of `w[at]` in `x @ w[at]`: of a plain weight, or of the scales of a quantised one.

    Args:
      x: float32 or bfloat16 [M, C].
      out: float32 [M, O], the cotangent of the product.
      w: plain or quantised [*stack, C, O].
      at: one index, int32 [], for each stack axis.
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      float32 [C, O], or [Q, O] for the scales.
    """
    weight, scales = weight_and_scales(w)
    dtype = product_dtype(x.dtype) if platform == "cpu" else x.dtype
    x = x.astype(dtype)
    if scales is None:
        return _product("cm,mo->co", transposed(x, platform=platform), out.astype(dtype))
    blocks = _Blocks.of(w, platform)

    def add_block(i: jax.Array, cotangent: jax.Array) -> jax.Array:
        q, start, is_new = blocks.at(i)
        rows = jnp.where(is_new, lax.dynamic_slice_in_dim(x, start, blocks.rows, axis=1), 0)
        part = (_product("mc,co->mo", rows, select(weight, at, start, blocks.rows).astype(dtype)) * out).sum(axis=0)
        return cotangent.at[q].add(part)

    return lax.fori_loop(0, blocks.number, add_block, jnp.zeros(scales.shape[-2:], jnp.float32))


def placed(part: jax.Array, w: Weight, at: tuple[jax.Array, ...]) -> Any:
    """The cotangent of a whole stack of weights, of which only `w[at]` has one; None for the integers."""
    leaf = floats(w)
    index = (*at, *(jnp.zeros((), jnp.int32),) * 2)
    whole = lax.dynamic_update_slice(
        jnp.zeros_like(leaf), part.astype(leaf.dtype).reshape((1,) * len(at) + part.shape), index
    )
    return of_floats(whole, w)


def floats(w: Weight) -> jax.Array:
    """The floats of a weight: a plain one itself, or the scales of a quantised one."""
    return w.scales if isinstance(w, QuantizedArray) else w


def of_floats(cotangent: jax.Array, w: Weight) -> Any:
    """A cotangent of the floats of a weight in the structure of the weight; None for the integers."""
    quantized: Any = QuantizedArray
    return quantized(None, cotangent) if isinstance(w, QuantizedArray) else cotangent


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The rows of a weight in blocks that are cast at once, each within one scale block.

    Attributes:
      rows: of a block.
      in_scale: blocks of a scale block.
      scale_rows: rows of a scale block.
      number: of all blocks.
    """

    rows: int
    in_scale: int
    scale_rows: int
    number: int

    @classmethod
    def of(cls, w: Weight, platform: str) -> Self:
        weight, _ = weight_and_scales(w)
        scale_rows = w.shape[-2] // num_scale_blocks(w)
        rows = min(scale_rows, max(1, _BLOCK_BYTES[platform] // (w.shape[-1] * weight.dtype.itemsize)))
        in_scale = -(-scale_rows // rows)
        return cls(rows, in_scale, scale_rows, in_scale * num_scale_blocks(w))

    def at(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The scale block and the first row of block i, int32 [], and which of its rows no block before had, bool."""
        q, j = jnp.divmod(jnp.asarray(i, jnp.int32), self.in_scale)  # a loop's index is of 64 bits under x64
        begin = j * self.rows
        start = jnp.minimum(begin, self.scale_rows - self.rows)  # the last block slides left
        is_new = start + jnp.arange(self.rows, dtype=jnp.int32) >= begin
        return q, q * self.scale_rows + start, is_new


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum, float32, of two operands of the same dtype."""
    product = functools.partial(jnp.einsum, precision=float_precision(x.dtype), preferred_element_type=jnp.float32)
    return product(subscripts, x, y)
