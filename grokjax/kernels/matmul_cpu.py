"""Products with weights on CPUs: forms that read a weight once, where XLA would copy and convert all of it first."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.kernels.cpu_features import product_dtype, summed_rows, takes_planes
from grokjax.kernels.planes import LONGEST_SUM, Planes, multiply_in_parts, to_planes
from grokjax.kernels.slices import float_precision, in_place, num_scale_blocks, pad_rows, select, weight_and_scales
from grokjax.quantization import QuantizedArray, Weight

# Fewest rows for which a wide result costs less in blocks of columns, which need no sum, than in blocks of weight rows.
_COLUMN_ROWS = 32

# Slices of a weight in one step of those sums, and about how many numbers each has.
_STEP_SLICES, SLICE_NUMBERS = 8, 1 << 15


def cpu_matmuls(x: jax.Array, weights: Sequence[Weight], at: tuple[jax.Array, ...]) -> list[jax.Array]:
    """`x @ w[at]` for several weights: int8 ones in planes of the activations, where the processor is faster so.

    Arguments are those of `cpu_matmul`, with several weights.

    Returns:
      float32 [M, O] for each weight.
    """
    if not takes_planes(x.shape[0], x.dtype):
        return [cpu_matmul(x, w, at) for w in weights]
    planes = to_planes(x)
    return [planes_matmul(planes, w, at) if _has_integers(w) else cpu_matmul(x, w, at) for w in weights]


def _has_integers(w: Weight) -> bool:
    """Whether a weight is int8, and in each scale block short enough for sums in int32."""
    return isinstance(w, QuantizedArray) and w.shape[-2] // w.num_blocks <= LONGEST_SUM


def planes_matmul(planes: Planes, w: Weight, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ w[at]` as products of integers, summed in int32.

    A row's result has the same bits in any company: integers are summed exactly in any order. A wide result is computed
    in blocks of columns also for few rows, since the library is slow where 64 does not divide the columns.

    Args:
      planes: x [M, C].
      w: quantised [*stack, C, O].
      at: one index, int32 [], for each stack axis.

    Returns:
      float32 [M, O].
    """
    form = column_matmul if w.shape[-1] > w.shape[-2] else blocked_matmul
    return planes.join(form(planes.rows, w, at))


def cpu_matmul(x: jax.Array, w: Weight, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ w[at]` in the form that suits the number of rows; each reads a weight once and copies none of it whole.

    All of its forms have derivatives.

    Args:
      x: float32 or bfloat16 [M, C].
      w: plain or quantised [*stack, C, O].
      at: one index, int32 [], for each stack axis.

    Returns:
      float32 [M, O].
    """
    x = x.astype(product_dtype(x.dtype))
    if x.shape[0] <= summed_rows():
        return summed_matmul(x, w, at)
    is_wide = x.shape[0] >= _COLUMN_ROWS and w.shape[-1] > w.shape[-2]
    return column_matmul(x, w, at) if is_wide else blocked_matmul(x, w, at)


def summed_matmul(x: jax.Array, w: Weight, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ w[at]` as sums of products, weight row by weight row: for a few rows of activations on CPUs.

    XLA's CPU backend makes one vectorised loop of each step, spread over the cores, in which the weight is read where
    it lies, cast in registers and multiplied; before a matmul it would be copied and packed. A step takes some slices
    of several weight rows, one slice after the other, so that it is long enough to be shared by the cores. Arguments
    and result are those of `cpu_matmul`.
    """
    weight, scales = weight_and_scales(w)
    num_blocks, (rows, outputs) = num_scale_blocks(w), w.shape[-2:]
    scale_rows = rows // num_blocks
    slices = min(_STEP_SLICES, scale_rows)
    # At least two steps: of a loop that runs once, XLA would make copies of the slices.
    size = max(1, min(SLICE_NUMBERS // outputs, scale_rows // (2 * slices)))
    step = slices * size
    wide = x.astype(jnp.float32)

    def add_step(i: jax.Array, total: jax.Array, first: jax.Array) -> jax.Array:
        start = jnp.minimum(i * step, scale_rows - step)  # the last step slides left and leaves out what was seen
        factors = lax.dynamic_slice_in_dim(wide, first + start, step, axis=1)
        is_new = start + jnp.arange(step, dtype=jnp.int32) >= i * step
        factors = jnp.where(is_new, factors, 0).reshape(-1, slices, size, 1)
        held, start = in_place(weight, start, platform="cpu")
        for j in range(slices):
            part = select(held, at, first + start + j * size, size)[None]  # [1, size, O]
            total = total + part.astype(jnp.float32) * factors[:, j]
        return total

    def add_scale_block(q: jax.Array, out: jax.Array) -> jax.Array:
        total = jnp.zeros((x.shape[0], size, outputs), jnp.float32)
        add = functools.partial(add_step, first=q * scale_rows)
        summed = lax.fori_loop(0, -(-scale_rows // step), add, total).sum(axis=1)
        return out + (summed if scales is None else summed * select(scales, at, q, 1).astype(jnp.float32))

    return lax.fori_loop(0, num_blocks, add_scale_block, jnp.zeros((x.shape[0], outputs), jnp.float32))


# Bytes of weight that one step of the blocked product converts: small enough for a core's own cache.
BLOCK_BYTES = 1 << 20


def blocked_matmul(x: jax.Array, w: Weight, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ w[at]` as a loop over blocks of weight rows, for CPUs: XLA would copy, then convert, the whole slice.

    Arguments and result are those of `cpu_matmul`; x may be int8, too, if the weight is.
    """
    weight, scales = weight_and_scales(w)
    num_blocks, (rows, outputs) = num_scale_blocks(w), w.shape[-2:]
    scale_rows = rows // num_blocks
    block = min(scale_rows, max(32, BLOCK_BYTES // (outputs * weight.dtype.itemsize)))
    whole, rest = divmod(scale_rows, block)
    padded = pad_rows(x)

    def product(start: jax.Array, size: int) -> jax.Array:
        held, start = in_place(weight, start, platform="cpu")
        matrix = select(held, at, start, size).astype(x.dtype)
        return _sums(lax.dynamic_slice_in_dim(padded, start, size, axis=1), matrix)

    def add_scale_block(q: jax.Array, out: jax.Array) -> jax.Array:
        first = q * scale_rows
        total = jnp.zeros(out.shape, _sum_dtype(x))
        total = lax.fori_loop(0, whole, lambda i, total: total + product(first + i * block, block), total)
        if rest:
            total = total + product(first + whole * block, rest)
        total = total.astype(jnp.float32)
        return out + (total if scales is None else total * select(scales, at, q, 1).astype(jnp.float32))

    out = jnp.zeros((padded.shape[0], outputs), jnp.float32)
    return lax.fori_loop(0, num_blocks, add_scale_block, out)[: x.shape[0]]


def column_matmul(x: jax.Array, w: Weight, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ w[at]` as a loop over blocks of columns, for many rows on CPUs: each is cast and multiplied at once.

    Arguments and result are those of `cpu_matmul`; x may be int8, too, if the weight is.
    """
    weight, scales = weight_and_scales(w)
    num_blocks, (rows, outputs) = num_scale_blocks(w), w.shape[-2:]
    scale_rows = rows // num_blocks
    most = max(64, BLOCK_BYTES // (rows * x.dtype.itemsize))
    num_columns = -(-outputs // most)
    width = min(outputs, -(-outputs // num_columns // 64) * 64)

    def product(q: jax.Array, column: jax.Array) -> jax.Array:
        held, column = in_place(weight, column, platform="cpu")
        matrix = select(held, at, q * scale_rows, scale_rows, column=column, width=width).astype(x.dtype)
        out = _sums(lax.dynamic_slice_in_dim(x, q * scale_rows, scale_rows, axis=1), matrix).astype(jnp.float32)
        return out if scales is None else out * select(scales, at, q, 1, column=column, width=width).astype(jnp.float32)

    def add_columns(i: jax.Array, out: jax.Array) -> jax.Array:
        column = jnp.minimum(i * width, outputs - width)  # the last block slides left and repeats what was done
        part = product(jnp.zeros((), jnp.int32), column)
        part = lax.fori_loop(1, num_blocks, lambda q, part: part + product(q, column), part)
        return lax.dynamic_update_slice_in_dim(out, part, column, axis=1)

    return lax.fori_loop(0, -(-outputs // width), add_columns, jnp.zeros((x.shape[0], outputs), jnp.float32))


def _sums(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix` [M, O] of operands of the same dtype, in that of its sums."""
    product = functools.partial(jnp.matmul, precision=float_precision(x.dtype), preferred_element_type=_sum_dtype(x))
    return multiply_in_parts(x, lambda x: product(x, matrix)) if x.dtype == jnp.int8 else product(x, matrix)


def _sum_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype in which products of x are summed."""
    return jnp.dtype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
