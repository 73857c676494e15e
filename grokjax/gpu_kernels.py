"""Products that XLA's compiler for GPUs does not fuse, as Pallas kernels for Triton."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Rows of the weight that one step multiplies, and columns of a program's output.
_STEP, _OUTPUTS = 64, 128
_FEWEST_ROWS, _MOST_ROWS = 16, 128
# So many programs keep the multiprocessors of the largest GPUs busy, two each; fewer would read at a part of the rate.
_PROGRAMS = 256


def fits(x: jax.Array, weight: jax.Array, scales: jax.Array) -> bool:
    """Whether `int8_matmul` takes these: bfloat16 and int8, sizes that its tiles divide."""
    rows, outputs = weight.shape[-2:]
    types = (x.dtype, weight.dtype) == (jnp.bfloat16, jnp.int8)
    return types and outputs % _OUTPUTS == 0 and rows // scales.shape[-2] % _STEP == 0


def int8_matmul(
    x: jax.Array, weight: jax.Array, scales: jax.Array, at: tuple[jax.Array, ...], *, interpret: bool = False
) -> jax.Array:
    """`x @ weight[at]`, scaled, in which each tile of the weight is read in place, cast in registers and multiplied.

    XLA:GPU copies the slice of a stack before it multiplies; a kernel is given the whole stack and reads the slice.

    Args:
      x: bfloat16 [M, C].
      weight: int8 [*stack, C, O]; O a multiple of 128, C / Q of 64.
      scales: bfloat16 or float32 [*stack, Q, O].
      at: one index, int32 [], for each stack axis.
      interpret: run it as plain JAX, on any device.

    Returns:
      float32 [M, O].
    """
    # Imported where it is used: importing grokjax must not take the time, and other devices never need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    num_rows, contracted = x.shape
    outputs, num_blocks = weight.shape[-1], scales.shape[-2]
    tile = min(_MOST_ROWS, max(_FEWEST_ROWS, 1 << (num_rows - 1).bit_length()))
    x = jnp.pad(x, ((0, -num_rows % tile), (0, 0)))
    grid = (len(x) // tile, outputs // _OUTPUTS)
    parts = _num_parts(contracted, num_blocks, tile=tile, programs=grid[0] * grid[1])
    kernel = functools.partial(_multiply_tile, part=contracted // parts, scale_rows=contracted // num_blocks)
    partial = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((parts, len(x), outputs), jnp.float32),
        grid=(*grid, parts),
        in_specs=[
            pl.BlockSpec((len(at),), lambda *_: (0,)),
            pl.BlockSpec((tile, contracted), lambda row, *_: (row, 0)),
            pl.BlockSpec(weight.shape, lambda *_: (0,) * weight.ndim),
            pl.BlockSpec(scales.shape, lambda *_: (0,) * scales.ndim),
        ],
        out_specs=pl.BlockSpec((1, tile, _OUTPUTS), lambda row, output, part: (part, row, output)),
        compiler_params=triton.CompilerParams(num_warps=4 if tile <= 64 else 8, num_stages=3),
        interpret=interpret,
    )(jnp.stack(at), x, weight, scales)
    return partial.sum(axis=0)[:num_rows]


def _num_parts(contracted: int, num_blocks: int, *, tile: int, programs: int) -> int:
    """Parts of the contraction for different programs: each whole scale blocks or a whole fraction of one.

    As many as keep the device busy, if their sums, float32, are at most half of the weight's bytes.
    """
    scale_rows = contracted // num_blocks
    allowed = [n for n in range(1, num_blocks + 1) if num_blocks % n == 0]
    allowed += [num_blocks * n for n in range(2, scale_rows // _STEP + 1) if scale_rows % (n * _STEP) == 0]
    small = [n for n in allowed if n == 1 or n * tile * 8 <= contracted]
    return next((n for n in small if n * programs >= _PROGRAMS), small[-1])


def _multiply_tile(
    at_ref: Any, x_ref: Any, w_ref: Any, s_ref: Any, out_ref: Any, *, part: int, scale_rows: int
) -> None:
    """One tile of the output, over one part of the contraction; the stacks stay where they are, tiles are read."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    at = tuple(at_ref[i] for i in range(at_ref.shape[0]))
    columns = pl.ds(pl.program_id(1) * _OUTPUTS, _OUTPUTS)
    first = pl.program_id(2) * part
    piece = math.gcd(part, scale_rows)
    zeros = jnp.zeros(out_ref.shape[1:], jnp.float32)

    def add_piece(number: jax.Array, out: jax.Array) -> jax.Array:
        start = first + number * piece

        def add_step(step: jax.Array, total: jax.Array) -> jax.Array:
            rows = pl.ds(start + step * _STEP, _STEP)
            return total + triton.dot(x_ref[:, rows], w_ref[(*at, rows, columns)].astype(x_ref.dtype))

        total = lax.fori_loop(0, piece // _STEP, add_step, zeros)
        return out + total * s_ref[(*at, pl.ds(start // scale_rows, 1), columns)].astype(jnp.float32)

    out_ref[0] = lax.fori_loop(0, part // piece, add_piece, zeros)
