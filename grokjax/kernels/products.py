"""The matrix product of activations with a plain or quantised weight, in the form that suits the device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grokjax.kernels import matmul_gpu
from grokjax.kernels.cotangents import operand_cotangent, placed, weight_cotangent
from grokjax.kernels.derivatives import with_rule
from grokjax.kernels.matmul_cpu import cpu_matmul, cpu_matmuls
from grokjax.kernels.slices import float_precision, select, select_scales, weight_and_scales
from grokjax.quantization import QuantizedArray, Weight


def matmul(x: jax.Array, w: Weight, *, at: tuple[jax.Array, ...] = (), platform: str) -> jax.Array:
    """`x @ w[at]`, reading only that part of a stack of weights and never holding a converted copy of it.

    The weight is cast to the dtype of the activations (int8 exactly), products are summed in float32, and the scales
    are applied to the sums.

    Args:
      x: float32 or bfloat16 [..., C].
      w: plain or quantised [*stack, C, O].
      at: one index, int32 [], for each stack axis.
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      float32 [..., O].

    Raises:
      ValueError: C differs, or there is not one index for each stack axis.
    """
    return matmuls(x, (w,), at=at, platform=platform)[0]


def matmuls(
    x: jax.Array, weights: Sequence[Weight], *, at: tuple[jax.Array, ...] = (), platform: str
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
    smooth = functools.partial(_multiply_smoothly, form=cpu_matmul if platform == "cpu" else direct_matmul)
    multiply = with_rule(
        functools.partial(_multiply, platform=platform), functools.partial(_pull, platform=platform), smooth=smooth
    )
    outs = multiply(rows, list(weights), at)
    return [out.reshape(*x.shape[:-1], w.shape[-1]) for out, w in zip(outs, weights, strict=True)]


def _multiply(x: jax.Array, weights: list[Weight], at: tuple[jax.Array, ...], *, platform: str) -> list[jax.Array]:
    """`matmuls` of rows [M, C]."""
    if platform == "cpu":
        return cpu_matmuls(x, weights, at)
    return gpu_matmuls(x, weights, at) if platform == "gpu" else _multiply_smoothly(x, weights, at, form=direct_matmul)


def _multiply_smoothly(
    x: jax.Array, weights: list[Weight], at: tuple[jax.Array, ...], *, form: Callable[..., jax.Array]
) -> list[jax.Array]:
    """`matmuls` of rows [M, C] in a form that JAX can differentiate, without kernels and without rounding to int8."""
    return [form(x, w, at) for w in weights]


def _pull(
    operands: tuple[jax.Array, list[Weight], tuple[jax.Array, ...]], _: Any, outs: list[jax.Array], *, platform: str
) -> tuple[Any, ...]:
    """The cotangents of `_multiply`'s operands from those of its results."""
    x, weights, at = operands
    parts = [
        operand_cotangent(out, w, at, dtype=x.dtype, platform=platform) for out, w in zip(outs, weights, strict=True)
    ]
    of_weights = [
        placed(weight_cotangent(x, out, w, at, platform=platform), w, at) for out, w in zip(outs, weights, strict=True)
    ]
    return sum(parts[1:], parts[0]).astype(x.dtype), of_weights, (None,) * len(at)


def direct_matmul(x: jax.Array, w: Weight, at: tuple[jax.Array, ...]) -> jax.Array:
    """`x @ w[at]` as one product on the slice: compilers for accelerators fuse the slice and the cast into it.

    Args:
      x: float32 or bfloat16 [M, C].
      w: plain or quantised [*stack, C, O].
      at: one index, int32 [], for each stack axis.

    Returns:
      float32 [M, O].
    """
    weight, scales = weight_and_scales(w)
    matrix = select(weight, at, 0, weight.shape[-2]).astype(x.dtype)
    return _scaled_product(x, matrix, None if scales is None else select_scales(scales, at))


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


def gpu_matmuls(x: jax.Array, weights: Sequence[Weight], at: tuple[jax.Array, ...]) -> list[jax.Array]:
    """`x @ w[at]` for several weights on GPUs, where XLA alone would copy the slices first.

    Few rows are multiplied by one kernel, many by XLA's products after a kernel that casts. Where no kernel fits, the
    form is `direct_matmul`. Arguments are those of `direct_matmul`, with several weights.

    Returns:
      float32 [M, O] for each weight.
    """
    if not at or not matmul_gpu.fits(x, weights):
        return [direct_matmul(x, w, at) for w in weights]
    index = jnp.stack(at)
    if len(x) <= KERNEL_ROWS:
        return [out[0] for out in matmul_gpu.stack_matmul(x[None], weights, index[None])]
    return [_product_after_cast(x, w, at, index) for w in weights]


def _product_after_cast(x: jax.Array, w: Weight, at: tuple[jax.Array, ...], index: jax.Array) -> jax.Array:
    """`x @ w[at]` after a kernel that casts an int8 weight; `index` is `at` as one array."""
    if not isinstance(w, QuantizedArray):
        return direct_matmul(x, w, at)
    return _scaled_product(x, matmul_gpu.cast(w.weight, index), select_scales(w.scales, at))
