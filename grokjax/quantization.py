"""int8 weights with blocked scales, and tables with a scale for each row: what they are."""

import dataclasses
import functools
import math
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from grokjax.context import in_own_context
from grokjax.printing import describe_fields, display
from grokjax.sharding import Axes, Partitioner

_T = TypeVar("_T")


def _value(array: _T, index: Any) -> _T:
    """The array itself for `...`, by which Flax's parameters give their value; anything else is refused."""
    return array if index is ... else _refuse_index(array)


def _refuse_index(array: Any, *_: Any) -> NoReturn:
    raise ValueError(
        f"a {type(array).__name__} is not indexed: its numbers mean nothing without their scales. Index its `weight` "
        "and `scales`, or take the plain weight, grokjax.dequantize(w). A parameter that holds one is read by "
        '`get_value()` and written by `set_value(...)`; docs/model.md shows it under "Changing weights".'
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An int8 weight and the scales that restore it; a pytree of two leaves, so it shards, scans and saves as such.

    Row c of the contracting axis belongs to scale block `c // (C / Q)`; element [..., c, o] stands for
    `weight[..., c, o] * scales[..., block, o]`. Leading axes (layers, experts) are the same in both leaves.

    Attributes:
      weight: int8 [..., C, O].
      scales: bfloat16 or float32 [..., Q, O]; Q divides C.

    Source: the release's `QuantizedWeight8bit`, where Q is 8 or 1.
    """

    weight: jax.Array
    scales: jax.Array

    __repr__ = describe_fields
    __treescope_repr__ = display
    __getitem__ = _value
    __setitem__ = _refuse_index

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """Rank of the weight that this stands for."""
        return self.weight.ndim

    @property
    def num_blocks(self) -> int:
        """Q, the scale blocks along the contracting axis."""
        return self.scales.shape[-2]

    def refine(self, num_blocks: int) -> "QuantizedArray":
        """The same values with each scale block cut into equal parts.

        Args:
          num_blocks: of the result, along the contracting axis: a multiple of Q that divides C.

        Raises:
          ValueError: It is something else.
        """
        if num_blocks < 1 or num_blocks % self.num_blocks or self.shape[-2] % num_blocks:
            raise ValueError(
                f"{self.num_blocks} scale blocks over {self.shape[-2]} rows cannot be cut into {num_blocks}: choose a "
                "multiple of the blocks that divides the rows."
            )
        return QuantizedArray(self.weight, self.scales.repeat(num_blocks // self.num_blocks, axis=-2))


Weight = jax.Array | QuantizedArray


@in_own_context
def quantize(w: jax.Array, *, num_blocks: int = 1, scale_dtype: DTypeLike = jnp.float32) -> QuantizedArray:
    """Rounds a weight to int8, symmetrically, with one scale for each output and block of rows.

    Args:
      w: float [..., C, O].
      num_blocks: Q, must divide C.
      scale_dtype: dtype of the scales; the weight is divided by the scale as rounded to it.

    Returns:
      The array whose values differ from `w` by at most half a scale (a little more where a bfloat16 scale rounds down).
      The scale of a block with a NaN or an infinite number is infinite.

    Raises:
      ValueError: `w` has no axes C and O, or `num_blocks` does not divide C.
    """
    if w.ndim < 2:
        raise ValueError(f"w has shape {w.shape}: give a matrix [C, O], or several [..., C, O].")
    rows = w.shape[-2]
    if num_blocks < 1 or rows % num_blocks:
        raise ValueError(f"num_blocks={num_blocks} does not divide the {rows} rows of the contracting axis.")
    return _quantize(w, num_blocks, jnp.dtype(scale_dtype))


# One program, not one for each operation, where nothing is traced.
@functools.partial(jax.jit, static_argnames=("num_blocks", "scale_dtype"), inline=True)
def _quantize(w: jax.Array, num_blocks: int, scale_dtype: jnp.dtype) -> QuantizedArray:
    *lead, rows, outputs = w.shape
    blocks = w.astype(jnp.float32).reshape(*lead, num_blocks, rows // num_blocks, outputs)
    # XLA may leave out a cast and the one back, and would divide by what was not rounded.
    limits = jnp.finfo(scale_dtype)
    scales = lax.reduce_precision(largest_magnitude(blocks, axis=-2) / 127, limits.nexp, limits.nmant)
    scales = scales.astype(scale_dtype)
    return QuantizedArray(_round_to_int8(blocks, scales[..., None, :]).reshape(w.shape), scales)


def largest_magnitude(x: jax.Array, axis: int) -> jax.Array:
    """The largest magnitude along an axis, in the dtype of `x`; infinite where there is a NaN.

    So a scale made of it is infinite, and what NaN is rounded to is seen. For XLA's CPU backend the largest of some
    numbers and NaN may be one of the numbers.
    """
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)).max(axis=axis)


def _round_to_int8(w: jax.Array, scales: jax.Array) -> jax.Array:
    """The int8 weight that, with these scales, comes nearest to `w`; 0 where the scale is 0."""
    divisor = jnp.where(scales == 0, jnp.ones_like(scales), scales).astype(jnp.float32)
    return jnp.clip(jnp.round(w.astype(jnp.float32) / divisor), -127, 127).astype(jnp.int8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTable:
    """An int8 embedding table and the scale of each of its rows; a pytree of two leaves, or of three.

    Attributes:
      weight: int8 [V, D].
      scales: float32 [V]; row v stands for `weight[v] * scales[v]`.
      columns: int8 [D, V], `weight` once more, as CPUs make the logits of a few rows fastest; None elsewhere.
    """

    weight: jax.Array
    scales: jax.Array
    columns: jax.Array | None = None

    __repr__ = describe_fields
    __treescope_repr__ = display
    __getitem__ = _value
    __setitem__ = _refuse_index

    @property
    def shape(self) -> tuple[int, ...]:
        """[V, D]."""
        return self.weight.shape


Table = jax.Array | QuantizedTable


def without_columns(table: Table) -> Table:
    """A table that holds its numbers once, for what reads rows."""
    return QuantizedTable(table.weight, table.scales) if isinstance(table, QuantizedTable) else table


@in_own_context
def quantize_table(table: jax.Array, *, with_columns: bool = False) -> QuantizedTable:
    """Rounds a table to int8 with one float32 scale for each row; off by at most half a scale.

    A row with a NaN or an infinite number has an infinite scale, so whatever is made of it is not finite.

    Args:
      table: float [V, D].
      with_columns: holds it in columns too.
    """
    # Without barriers XLA's CPU backend casts the table once for all, and holds all of it in float32 meanwhile.
    scales = jnp.abs(table).max(axis=1).astype(jnp.float32) / 127
    scales, table = lax.optimization_barrier((scales, table))
    scales = jnp.where(jnp.isnan(table).any(axis=1), jnp.inf, scales)  # see `largest_magnitude`
    scales, table = lax.optimization_barrier((scales, table))
    weight = _round_to_int8(table, scales[:, None])
    return QuantizedTable(weight, scales, weight.T if with_columns else None)


@in_own_context
def dequantize(w: Weight, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The plain weight [..., C, O] in `dtype`; a plain weight is only cast."""
    return _dequantize(w, jnp.dtype(dtype)) if isinstance(w, QuantizedArray) else w.astype(dtype)


# One program, too.
@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _dequantize(w: QuantizedArray, dtype: jnp.dtype) -> jax.Array:
    *lead, rows, outputs = w.shape
    blocks = w.weight.astype(jnp.float32).reshape(*lead, w.num_blocks, rows // w.num_blocks, outputs)
    return (blocks * w.scales.astype(jnp.float32)[..., None, :]).reshape(w.shape).astype(dtype)


def einsum(subscripts: str, x: jax.Array, w: Weight) -> jax.Array:
    """`jnp.einsum` of an activation and a plain or quantised weight, for any contraction.

    It may hold the dequantised weight in memory, which `matmul` never does.

    Args:
      subscripts: as for `jnp.einsum`, of two operands.
      x: the activation, of any shape and float dtype.
      w: the weight [..., C, O].

    Returns:
      float32, of the shape that the subscripts say.
    """
    return jnp.einsum(subscripts, x.astype(jnp.float32), dequantize(w), precision=lax.Precision.HIGHEST)


def partition_specs(w: Any, axes: Axes, partitioner: Partitioner) -> Any:
    """`PartitionSpec`s of a weight, in its own structure; scale blocks follow the contracting axis unless Q is 1.

    Args:
      w: a weight or a table, or one of shapes alone.
      axes: the logical axis of each of its axes.
      partitioner: mesh and rules.

    Raises:
      ValueError: A mesh axis does not divide a size, or would split two axes.
    """
    if isinstance(w, QuantizedTable):
        rows: list[Any] = [partitioner.spec(axes, w.shape), partitioner.spec(axes[:1], w.scales.shape)]
        if w.columns is not None:
            rows.append(partitioner.spec(axes[::-1], w.columns.shape))
        return QuantizedTable(*rows)
    if not isinstance(w, QuantizedArray):
        return partitioner.spec(axes, w.shape)
    scale_axes = axes if w.num_blocks > 1 else (*axes[:-2], None, axes[-1])
    leaves: list[Any] = [partitioner.spec(axes, w.shape), partitioner.spec(scale_axes, w.scales.shape)]
    return QuantizedArray(*leaves)


def shardable_blocks(num_blocks: int, axes: Axes, partitioner: Partitioner) -> int:
    """The scale blocks to `refine` to, so that every device holds whole blocks for its rows of the weight.

    Args:
      num_blocks: Q, blocks that there are.
      axes: the logical axes of the weight, the contracting one second to last.
      partitioner: mesh and rules.
    """
    contracting = axes[-2]
    return (
        num_blocks if num_blocks == 1 or contracting is None else math.lcm(num_blocks, partitioner.shards(contracting))
    )
