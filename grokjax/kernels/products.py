"""The matrix product of activations with a plain or quantised weight, in the form that suits the device."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from grokjax.kernels import matmul_gpu
from grokjax.kernels.cpu_features import product_dtype
from grokjax.quantization import QuantizedArray, Weight


def matmul(x: jax.Array, w: Weight, *, at: tuple[jax.Array, ...] = (), platform: str | None = None) -> jax.Array:
    """`x @ w[at]`, reading only that part of a stack of weights and never holding a converted copy of it.

    The weight is cast to the dtype of the activations (int8 exactly), products are summed in float32, and the scales
    are applied to the sums.

    Args:
      x: float32 or bfloat16 [..., C].
      w: plain or quantised [*stack, C, O].
      at: one index, int32 [], for each stack axis.
      platform: "gpu" where the kernels for GPUs may be used; else the form is chosen when it is compiled.

    Returns:
      float32 [..., O].

    Raises:
      ValueError: C differs, or there is not one index for each stack axis.
    """
    return matmuls(x, (w,), at=at, platform=platform)[0]


def matmuls(
    x: jax.Array, weights: Sequence[Weight], *, at: tuple[jax.Array, ...] = (), platform: str | None = None
) -> list[jax.Array]:
    """`matmul` of the same activations with several weights; on GPUs one kernel does all.

    Args:
      x: float32 or bfloat16 [..., C].
      weights: each plain or quantised [*stack, C, O], the stack axes and C the same in all.
      at: as for `matmul`.
      platform: as for `matmul`.

    Returns:
      float32 [..., O] for each weight.

    Raises:
      ValueError: as `matmul`, for any of the weights.
    """
    for w in weights:
        if x.shape[-1] != w.shape[-2] or len(at) != w.ndim - 2:
            raise ValueError(
                f"activations of shape {x.shape} and {len(at)} indices do not fit a weight of shape {w.shape}."
            )
    rows = x.reshape(-1, x.shape[-1])
    at = tuple(jnp.asarray(index, jnp.int32) for index in at)
    arrays = [numbers_and_scales(w) for w in weights]
    # Only where it is asked for: to trace the kernels takes a second that other devices need not spend.
    if platform == "gpu":
        outs = gpu_matmuls(rows, arrays, at)
    else:
        outs = lax.platform_dependent(rows, arrays, at, cpu=_each(_cpu_matmul), default=_each(direct_matmul))
    return [out.reshape(*x.shape[:-1], w.shape[-1]) for out, w in zip(outs, weights, strict=True)]


def numbers_and_scales(w: Weight) -> tuple[jax.Array, jax.Array | None]:
    """What a weight is stored as: int8 and its scales, or plain numbers and None."""
    return (w.weight, w.scales) if isinstance(w, QuantizedArray) else (w, None)


def _each(product: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """A form of the product for one weight after the other."""
    return lambda x, weights, at: [product(x, *w, at) for w in weights]


def float_precision(dtype: DTypeLike) -> lax.Precision | None:
    """Full precision for float32 operands (TPUs would round them to bfloat16), the default for others."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def pad_rows(x: jax.Array) -> jax.Array:
    """At least two rows [M, C] if they are bfloat16: for one, XLA's CPU backend casts the whole other factor first."""
    missing = 2 - x.shape[0] if x.dtype == jnp.bfloat16 else 0
    return jnp.pad(x, ((0, max(0, missing)), (0, 0)))


def _select(
    stack: jax.Array,
    at: tuple[jax.Array, ...],
    start: jax.Array | int,
    size: int,
    *,
    column: jax.Array | int = 0,
    width: int | None = None,
) -> jax.Array:
    """Rows [size, width] from row `start` and `column` of `stack[at]`, by default all columns, in one slice."""
    width = stack.shape[-1] if width is None else width
    index = (*at, jnp.asarray(start, jnp.int32), jnp.asarray(column, jnp.int32))
    sizes = (1,) * len(at) + (size, width)
    # Without the arithmetic for negative indices: jax 0.10 would carry its results, slice by slice, into every loop.
    return lax.dynamic_slice(stack, index, sizes, allow_negative_indices=False).reshape(size, width)


def direct_matmul(x: jax.Array, weight: jax.Array, scales: jax.Array | None, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ weight[at]` as one product on the slice: compilers for accelerators fuse the slice and the cast into it.

    Args:
      x: float32 or bfloat16 [M, C].
      weight: plain or int8 [*stack, C, O].
      scales: [*stack, Q, O] of an int8 weight, None of a plain one.
      at: one index, int32 [], for each stack axis.

    Returns:
      float32 [M, O].
    """
    w = _select(weight, at, 0, weight.shape[-2]).astype(x.dtype)
    return _scaled_product(x, w, None if scales is None else _select(scales, at, 0, scales.shape[-2]))


def _scaled_product(x: jax.Array, w: jax.Array, scales: jax.Array | None) -> jax.Array:
    """`x [M, C] @ w [C, O]` in float32, scaled by [Q, O]."""
    product = functools.partial(jnp.einsum, precision=float_precision(x.dtype), preferred_element_type=jnp.float32)
    if scales is None:
        return product("mc,co->mo", x, w)
    scales = scales.astype(jnp.float32)
    if len(scales) == 1:
        return product("mc,co->mo", x, w) * scales
    x_blocks = x.reshape(len(x), len(scales), -1)  # [M, Q, C / Q]
    w_blocks = w.reshape(len(scales), -1, w.shape[1])
    return (product("mqc,qco->qmo", x_blocks, w_blocks) * scales[:, None]).sum(axis=0)


# Most rows for which a kernel that casts each tile of a weight costs less than one that casts all of it beforehand.
KERNEL_ROWS = 512


def gpu_matmuls(x: jax.Array, weights: matmul_gpu.Weights, at: tuple[jax.Array, ...]) -> list[jax.Array]:
    """`x @ weight[at]` for several weights on GPUs, where XLA alone would copy the slices first.

    Few rows are multiplied by one kernel, many by XLA's products after a kernel that casts. Where no kernel fits, the
    form is `direct_matmul`.

    Args:
      x: float32 or bfloat16 [M, C].
      weights: numbers and scales of each, as `direct_matmul` takes them.
      at: one index, int32 [], for each stack axis.

    Returns:
      float32 [M, O] for each weight.
    """
    if not at or not matmul_gpu.fits(x, weights):
        return _each(direct_matmul)(x, weights, at)
    index = jnp.stack(at)
    if len(x) <= KERNEL_ROWS:
        return [out[0] for out in matmul_gpu.stack_matmul(x[None], weights, index[None])]
    return [
        _scaled_product(x, matmul_gpu.cast(weight, index), _select(scales, at, 0, scales.shape[-2]))
        if scales is not None
        else direct_matmul(x, weight, None, at)
        for weight, scales in weights
    ]


# Most rows for which XLA's CPU backend is asked for sums of products.
_SUMMED_ROWS = 2

# Fewest rows for which a wide result costs less in blocks of columns, which need no sum, than in blocks of weight rows.
_COLUMN_ROWS = 32

# Slices of a weight in one step of those sums, and about how many numbers each has.
_STEP_SLICES, SLICE_NUMBERS = 8, 1 << 15


def _cpu_matmul(x: jax.Array, weight: jax.Array, scales: jax.Array | None, at: tuple[jax.Array, ...]) -> jax.Array:
    """The product in the form that suits the number of rows; each reads a weight once and copies none of it whole."""
    x = x.astype(product_dtype(x.dtype))
    if x.shape[0] <= _SUMMED_ROWS:
        return summed_matmul(x, weight, scales, at)
    is_wide = x.shape[0] >= _COLUMN_ROWS and weight.shape[-1] > weight.shape[-2]
    form = column_matmul if is_wide else blocked_matmul
    return form(x, weight, scales, at)


def summed_matmul(x: jax.Array, weight: jax.Array, scales: jax.Array | None, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ weight[at]` as sums of products, weight row by weight row: for one or two rows of activations on CPUs.

    XLA's CPU backend makes one vectorised loop of each step, spread over the cores, in which the weight is read where
    it lies, cast in registers and multiplied; before a matmul it would be copied and packed. A step takes some slices
    of several weight rows, one slice after the other, so that it is long enough to be shared by the cores. Arguments
    and result are those of `direct_matmul`.
    """
    rows, outputs = weight.shape[-2:]
    num_blocks = 1 if scales is None else scales.shape[-2]
    scale_rows = rows // num_blocks
    slices = min(_STEP_SLICES, scale_rows)
    # At least two steps: of a loop that runs once, XLA would make copies of the slices.
    size = max(1, min(SLICE_NUMBERS // outputs, scale_rows // (2 * slices)))
    step = slices * size
    wide = x.astype(jnp.float32)

    def add_step(i: jax.Array, total: jax.Array, first: jax.Array) -> jax.Array:
        start = jnp.minimum(i * step, scale_rows - step)  # the last step slides left and leaves out what was seen
        factors = lax.dynamic_slice_in_dim(wide, first + start, step, axis=1)
        factors = jnp.where(start + jnp.arange(step) >= i * step, factors, 0).reshape(-1, slices, size, 1)
        for j in range(slices):
            part = _select(weight, at, first + start + j * size, size)[None]  # [1, size, O]
            total = total + part.astype(jnp.float32) * factors[:, j]
        return total

    def add_scale_block(q: jax.Array, out: jax.Array) -> jax.Array:
        total = jnp.zeros((x.shape[0], size, outputs), jnp.float32)
        add = functools.partial(add_step, first=q * scale_rows)
        summed = lax.fori_loop(0, -(-scale_rows // step), add, total).sum(axis=1)
        return out + (summed if scales is None else summed * _select(scales, at, q, 1).astype(jnp.float32))

    return lax.fori_loop(0, num_blocks, add_scale_block, jnp.zeros((x.shape[0], outputs), jnp.float32))


# Bytes of weight that one step of the blocked product converts: small enough for a core's own cache.
BLOCK_BYTES = 1 << 20


def blocked_matmul(x: jax.Array, weight: jax.Array, scales: jax.Array | None, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ weight[at]` as a loop over blocks of weight rows, for CPUs: XLA would copy, then convert, the whole slice.

    Arguments and result are those of `direct_matmul`.
    """
    rows, outputs = weight.shape[-2:]
    num_blocks = 1 if scales is None else scales.shape[-2]
    scale_rows = rows // num_blocks
    block = min(scale_rows, max(32, BLOCK_BYTES // (outputs * weight.dtype.itemsize)))
    whole, rest = divmod(scale_rows, block)
    padded = pad_rows(x)

    def product(start: jax.Array, size: int) -> jax.Array:
        w = _select(weight, at, start, size).astype(x.dtype)
        part = lax.dynamic_slice_in_dim(padded, start, size, axis=1)
        return jnp.matmul(part, w, precision=float_precision(x.dtype), preferred_element_type=jnp.float32)

    def add_scale_block(q: jax.Array, out: jax.Array) -> jax.Array:
        first = q * scale_rows
        total = jnp.zeros(out.shape, jnp.float32)
        total = lax.fori_loop(0, whole, lambda i, total: total + product(first + i * block, block), total)
        if rest:
            total = total + product(first + whole * block, rest)
        return out + (total if scales is None else total * _select(scales, at, q, 1).astype(jnp.float32))

    out = jnp.zeros((padded.shape[0], outputs), jnp.float32)
    return lax.fori_loop(0, num_blocks, add_scale_block, out)[: x.shape[0]]


def column_matmul(x: jax.Array, weight: jax.Array, scales: jax.Array | None, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ weight[at]` as a loop over blocks of columns, for many rows on CPUs: each is cast and multiplied at once.

    Arguments and result are those of `direct_matmul`.
    """
    rows, outputs = weight.shape[-2:]
    num_blocks = 1 if scales is None else scales.shape[-2]
    scale_rows = rows // num_blocks
    most = max(64, BLOCK_BYTES // (rows * x.dtype.itemsize))
    num_columns = -(-outputs // most)
    width = min(outputs, -(-outputs // num_columns // 64) * 64)

    def product(q: jax.Array, column: jax.Array) -> jax.Array:
        w = _select(weight, at, q * scale_rows, scale_rows, column=column, width=width).astype(x.dtype)
        part = lax.dynamic_slice_in_dim(x, q * scale_rows, scale_rows, axis=1)
        out = jnp.matmul(part, w, precision=float_precision(x.dtype), preferred_element_type=jnp.float32)
        return (
            out if scales is None else out * _select(scales, at, q, 1, column=column, width=width).astype(jnp.float32)
        )

    def add_columns(i: jax.Array, out: jax.Array) -> jax.Array:
        column = jnp.minimum(i * width, outputs - width)  # the last block slides left and repeats what was done
        part = product(jnp.zeros((), jnp.int32), column)
        part = lax.fori_loop(1, num_blocks, lambda q, part: part + product(q, column), part)
        return lax.dynamic_update_slice_in_dim(out, part, column, axis=1)

    return lax.fori_loop(0, -(-outputs // width), add_columns, jnp.zeros((x.shape[0], outputs), jnp.float32))
