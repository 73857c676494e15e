"""The product of hidden states with the embedding table, plain or int8, in the form that suits the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.kernels.cpu_features import integer_rows, product_dtype, summed_rows, takes_planes
from grokjax.kernels.derivatives import with_rule
from grokjax.kernels.matmul_cpu import summed_matmul
from grokjax.kernels.planes import multiply_in_parts, to_planes
from grokjax.kernels.slices import float_precision, in_place, pad_rows, transposed
from grokjax.quantization import QuantizedTable, Table, without_columns


def unembed(x: jax.Array, table: Table, *, platform: str) -> jax.Array:
    """`x @ table.T`, never holding a converted copy of the table.

    Args:
      x: float32 or bfloat16 [..., D].
      table: plain or quantised [V, D].
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      float32 [..., V].
    """
    is_cpu = platform == "cpu"
    plain = padded_unembed if is_cpu else direct_unembed
    int8, smooth = (integer_unembed, blocked_unembed) if is_cpu else (direct_unembed, direct_unembed)
    rows = x.reshape(-1, x.shape[-1])
    if not is_cpu or len(rows) > summed_rows():
        table = without_columns(table)
    run = with_rule(
        functools.partial(_unembed, int8=int8, plain=plain),
        functools.partial(_pull, platform=platform),
        smooth=functools.partial(_unembed, int8=smooth, plain=plain),
    )
    out: jax.Array = run(rows, table)
    return out.reshape(*x.shape[:-1], table.shape[0])


Form = Callable[[jax.Array, jax.Array], jax.Array]


def _unembed(x: jax.Array, table: Table, *, int8: Form, plain: Form) -> jax.Array:
    """`unembed` of rows [M, D]: in columns if the table has them, in one form for an int8 table, or for a plain one."""
    if not isinstance(table, QuantizedTable):
        return plain(x, table)
    product = int8(x, table.weight) if table.columns is None else summed_matmul(x, table.columns, ())
    return product * table.scales[None]


def _pull(operands: tuple[jax.Array, Table], _: Any, out: jax.Array, *, platform: str) -> tuple[jax.Array, Any]:
    """The cotangents of rows [M, D] and of the floats of the table from that of `_unembed`'s result, block by block."""
    x, table = operands
    weight, scales = (table.weight, table.scales) if isinstance(table, QuantizedTable) else (table, None)
    scaled = (out if scales is None else out * scales[None]).astype(x.dtype)
    num_rows, block = len(weight), min(_CAST_ROWS, len(weight))
    product = functools.partial(jnp.einsum, precision=float_precision(x.dtype), preferred_element_type=jnp.float32)

    def add_block(i: jax.Array, of_x: jax.Array) -> jax.Array:
        held_out, i = in_place(scaled, i, platform=platform)
        held_weight, i = in_place(weight, i, platform=platform)
        start = jnp.minimum(i * block, num_rows - block)  # the last block slides left and leaves out what was seen
        is_new = start + jnp.arange(block, dtype=jnp.int32) >= i * block
        part = jnp.where(is_new[None], lax.dynamic_slice_in_dim(held_out, start, block, axis=1), 0)
        return of_x + product("mv,vd->md", part, lax.dynamic_slice_in_dim(held_weight, start, block).astype(x.dtype))

    of_x = lax.fori_loop(0, -(-num_rows // block), add_block, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)
    if scales is None:
        of_weight = product("vm,md->vd", transposed(scaled, platform=platform), x).astype(weight.dtype)
        return of_x, lax.optimization_barrier(of_weight)  # jax 0.12 would keep float32 numbers till the end
    quantized: Any = QuantizedTable
    return of_x, quantized(None, (blocked_unembed(x, weight) * out).sum(axis=0).astype(scales.dtype))


def direct_unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x @ table.T` as one product: compilers for accelerators fuse the cast into it.

    Args:
      x: float32 or bfloat16 [M, D].
      table: plain or int8 [V, D], without its scales.

    Returns:
      float32 [M, V].
    """
    product = functools.partial(jnp.einsum, "md,vd->mv", precision=float_precision(x.dtype))
    return product(x, table.astype(x.dtype), preferred_element_type=jnp.float32)


def padded_unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x @ table.T` with rows enough for XLA's CPU backend to multiply the table as it is, not a float32 copy of it.

    Arguments and result are those of `direct_unembed`.
    """
    return direct_unembed(pad_rows(x), table)[: x.shape[0]]


# The rows of an int8 table that are cast together.
_CAST_ROWS = 1024


def integer_unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x @ table.T` with an int8 table, of which XLA's CPU backend would make a whole copy in the dtype of x.

    A few rows are multiplied as integers, in planes, and more where the processor is faster so; else the table is cast
    block by block. Arguments and result are those of `direct_unembed`.
    """
    if x.shape[0] > integer_rows() and not takes_planes(x.shape[0], x.dtype):
        return blocked_unembed(x.astype(product_dtype(x.dtype)), table)
    planes = to_planes(x)
    product = functools.partial(jnp.einsum, "md,vd->mv", precision=float_precision(table.dtype))
    to_table = functools.partial(product, preferred_element_type=jnp.int32)
    return planes.join(multiply_in_parts(planes.rows, lambda rows: to_table(rows, table)))


def blocked_unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """`direct_unembed`, block by block of an int8 table: only one is held in the dtype of x.

    Arguments and result are those of `direct_unembed`.
    """
    num_rows = table.shape[0]
    block = min(_CAST_ROWS, num_rows)

    def add_block(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * block, num_rows - block)  # the last block slides left and repeats what was done
        part = direct_unembed(x, lax.dynamic_slice_in_dim(table, start, block))
        return lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

    return lax.fori_loop(0, -(-num_rows // block), add_block, jnp.zeros((x.shape[0], num_rows), jnp.float32))
