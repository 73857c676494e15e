"""What the forms of a product share: slices of a stack of weights, the precision, rows enough, and the layout."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from grokjax.quantization import QuantizedArray, Weight


def weight_and_scales(w: Weight) -> tuple[jax.Array, jax.Array | None]:
    """What a weight is stored as: int8 and its scales, or plain numbers and None."""
    return (w.weight, w.scales) if isinstance(w, QuantizedArray) else (w, None)


def num_scale_blocks(w: Weight) -> int:
    """Q, the scale blocks along the contracting axis; a plain weight is one block."""
    return w.num_blocks if isinstance(w, QuantizedArray) else 1


def float_precision(dtype: DTypeLike) -> lax.Precision:
    """Full precision for float32 operands, which TPUs would round to bfloat16; others are multiplied exactly anyway.

    It is always named: what a user's program sets for its own products changes none of these.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def pad_rows(x: jax.Array) -> jax.Array:
    """At least two rows [M, C] if they are bfloat16: for one, XLA's CPU backend casts the whole other factor first."""
    missing = 2 - x.shape[0] if x.dtype == jnp.bfloat16 else 0
    return jnp.pad(x, ((0, max(0, missing)), (0, 0)))


def select(
    stack: jax.Array,
    at: tuple[jax.Array, ...],
    start: jax.Array | int,
    size: int,
    *,
    column: jax.Array | int = 0,
    width: int | None = None,
) -> jax.Array:
    """Some rows and columns of one matrix of a stack, in one slice.

    Args:
      stack: [*stack, C, O].
      at: one index, int32 [], for each stack axis.
      start: int32 [], the first row.
      size: rows.
      column: int32 [], the first column.
      width: columns, by default all O.

    Returns:
      [size, width] in the dtype of the stack.
    """
    width = stack.shape[-1] if width is None else width
    index = (*at, jnp.asarray(start, jnp.int32), jnp.asarray(column, jnp.int32))
    sizes = (1,) * len(at) + (size, width)
    # Without the arithmetic for negative indices: jax 0.10 would carry its results, slice by slice, into every loop.
    return lax.dynamic_slice(stack, index, sizes, allow_negative_indices=False).reshape(size, width)


def select_scales(scales: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    """The scales [Q, O] of one matrix of a stack, [*stack, Q, O], in the dtype of the stack."""
    *sizes, num_blocks, width = scales.shape
    if num_blocks > 1 or len(at) < 2:
        return select(scales, at, 0, num_blocks)
    # As rows of one matrix: to slice them otherwise, the compiler for TPUs copies all of them first, at every step.
    row = at[0]
    for size, index in zip(sizes[1:], at[1:], strict=True):
        row = row * size + index
    return select(scales.reshape(-1, width), (), row, 1)


def in_place(stack: jax.Array, index: jax.Array, *, platform: str) -> tuple[jax.Array, jax.Array]:
    """A stack, and an index of a loop at which it is about to be read, such that the stack is read where it lies.

    XLA's CPU backend of jax 0.10 cuts bfloat16 numbers out of a stack as float32 ones. What does not change in a loop
    it computes ahead of it, and so it would convert the whole stack first. A barrier makes the stack depend on the
    index.

    Args:
      stack: of any dtype.
      index: int32, one or several.
      platform: "cpu", "gpu" or "tpu", where it will run.
    """
    if platform != "cpu" or stack.dtype != jnp.bfloat16:
        return stack, index
    held: tuple[jax.Array, jax.Array] = lax.optimization_barrier((stack, index))
    return held


def row_major(x: jax.Array) -> jax.Array:
    """The same numbers, laid out in memory with the last axis together, whatever XLA would choose."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def transposed(x: jax.Array, *, platform: str) -> jax.Array:
    """A factor turned round: XLA's CPU backend multiplies one of bfloat16 at half the speed, unless it lies in rows."""
    return row_major(x.T) if platform == "cpu" else x.T
