"""Products with parts of a stack of weights, for which XLA's compiler for GPUs would copy them: kernels in Triton."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.kernels.slices import float_precision, num_scale_blocks, weight_and_scales
from grokjax.quantization import QuantizedArray, Weight

# So many programs keep the multiprocessors of the largest GPUs busy to the end, four each.
ENOUGH_PROGRAMS = 512
# Rows that one program multiplies: matrix units take no fewer than 16, and 32 took longer than 64 on an H100.
_ROWS = (16, 64, 128)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program of the kernel computes, and how.

    Attributes:
      rows: of the output.
      outputs: columns of it.
      step: rows of the weight that are multiplied together.
      warps: that share the work.
      stages: steps whose tiles are on their way at the same time.
    """

    rows: int
    outputs: int = 128
    step: int = 64
    warps: int = 4
    stages: int = 3


def choose_tile(num_rows: int, weights: Sequence[Weight]) -> Tile:
    """The tile with which `stack_matmul` multiplies groups of `num_rows` rows with these weights.

    It is the fastest of those tried on an H100, with int8 weights; see benchmarks/notebook/gpu.md.

    Args:
      num_rows: M, of each group.
      weights: only their shapes and dtypes are looked at.
    """
    rows = tile_rows(num_rows)
    are_wide = all(w.shape[-1] % 256 == 0 and isinstance(w, QuantizedArray) for w in weights)
    is_wide = rows < _ROWS[-1] and are_wide
    return Tile(rows, outputs=256 if is_wide else 128, stages=4 if is_wide or rows == _ROWS[-1] else 3)


def tile_rows(num_rows: int) -> int:
    """Rows that one program multiplies where each group has `num_rows`."""
    return next((rows for rows in _ROWS if num_rows <= rows), _ROWS[-1])


def fits(x: jax.Array, weights: Sequence[Weight]) -> bool:
    """Whether `stack_matmul` takes these: bfloat16 and int8 or bfloat16, sizes that its tiles divide."""
    have_same_blocks = len(set(map(num_scale_blocks, weights))) == 1
    return x.dtype == jnp.bfloat16 and have_same_blocks and all(map(_fits, weights))


def _fits(w: Weight) -> bool:
    """Whether the tiles divide this weight, and the kernel knows its dtype and finds its elements."""
    (weight, scales), (contracted, outputs) = weight_and_scales(w), w.shape[-2:]
    is_known = weight.dtype == (jnp.bfloat16 if scales is None else jnp.int8)
    is_divided = outputs % 128 == 0 and contracted // num_scale_blocks(w) % 64 == 0
    return is_known and has_safe_offsets(weight) and is_divided


def has_safe_offsets(array: jax.Array) -> bool:
    """Whether kernels find the elements: jax up to 0.12 numbers them with 32 signed bits up to 4 GiB, even of int8."""
    return not 2**31 < array.size <= 2**32 // array.dtype.itemsize


def stack_matmul(
    x: jax.Array,
    weights: Sequence[Weight],
    at: jax.Array,
    *,
    is_wanted: jax.Array | None = None,
    num_wanted: int | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """`x[i] @ weight[at[i]]` for some weights, scaled; each tile of them is read in place, cast and multiplied.

    XLA:GPU copies the slice of a stack before it multiplies; a kernel is given the whole stack and reads the slice. All
    weights and groups are one kernel, and neighbours with the same weight share what is read of it.

    Args:
      x: bfloat16 [N, M, C], N groups of rows, or [1, M, C], the same rows for all.
      weights: each quantised or bfloat16 [*stack, C, O]; the sizes O are multiples of 128, C / Q is one of 64.
      at: int32 [N, stack axes], what each group is multiplied with.
      is_wanted: bool [N], groups to compute, by default all; the results of the others mean nothing.
      num_wanted: how many of them to expect, by default all.
      interpret: run it as plain JAX, on any device.

    Returns:
      float32 [N, M, O] for each weight.
    """
    # Imported where it is used: importing grokjax must not take the time, and other devices do not need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    num_rows, contracted = x.shape[1:]
    num_groups, outputs = len(at), [w.shape[-1] for w in weights]
    num_blocks = num_scale_blocks(weights[0])
    tile = choose_tile(num_rows, weights)
    tiles, columns = -(-num_rows // tile.rows), sum(outputs) // tile.outputs
    programs = (num_groups if num_wanted is None else num_wanted) * tiles * columns
    parts = choose_num_parts(contracted, num_blocks, tile=tile, num_rows=num_rows, programs=programs)
    wanted = jnp.ones(num_groups, jnp.int32) if is_wanted is None else is_wanted.astype(jnp.int32)
    operands = (x, wanted, at, list(weights))
    out_shape = (parts, num_groups, num_rows, sum(outputs))

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    partial = pl.pallas_call(
        functools.partial(_multiply_tile, tile=tile, part=contracted // parts, scale_rows=contracted // num_blocks),
        out_shape=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        grid=(num_groups * tiles, columns, parts),
        in_specs=jax.tree.map(whole, operands),
        out_specs=pl.BlockSpec(out_shape, lambda *_: (0, 0, 0, 0)),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="stack_matmul",
    )(*operands)
    return jnp.split(partial.sum(axis=0), list(itertools.accumulate(outputs))[:-1], axis=-1)


def choose_num_parts(contracted: int, num_blocks: int, *, tile: Tile, num_rows: int, programs: int) -> int:
    """Parts into which `stack_matmul` cuts the contraction, each for programs of its own.

    A part is some whole scale blocks or a whole fraction of one. There are as many as keep the device busy, if their
    sums, float32, are at most a third of the weight's bytes.

    Args:
      contracted: C.
      num_blocks: Q, scale blocks along it.
      tile: what one program computes.
      num_rows: M, of each group.
      programs: that there are for each part.
    """
    scale_rows = contracted // num_blocks
    allowed = [n for n in range(1, num_blocks + 1) if num_blocks % n == 0]
    allowed += [num_blocks * n for n in range(2, scale_rows // tile.step + 1) if scale_rows % (n * tile.step) == 0]
    small = [n for n in allowed if n == 1 or n * min(num_rows, tile.rows) * 12 <= contracted]
    return next((n for n in small if n * programs >= ENOUGH_PROGRAMS), small[-1])


def _multiply_tile(
    x_ref: Any,
    wanted_ref: Any,
    at_ref: Any,
    weights: Sequence[Any],
    out_ref: Any,
    *,
    tile: Tile,
    part: int,
    scale_rows: int,
) -> None:
    """One tile of the output, over one part of the contraction; the stacks stay where they are, tiles are read."""
    from jax.experimental import pallas as pl

    tiles = -(-x_ref.shape[1] // tile.rows)
    group, number, number_of_part = pl.program_id(0) // tiles, pl.program_id(1), pl.program_id(2)
    rows = pl.program_id(0) % tiles * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    if x_ref.shape[1] % tile.rows:
        rows = jnp.minimum(rows, x_ref.shape[1] - 1)  # the last row several times: the same is written to one place

    def read_x(begin: jax.Array) -> jax.Array:
        place = rows[:, None], (begin + jnp.arange(tile.step, dtype=jnp.int32))[None]
        return x_ref[(group if len(x_ref) > 1 else 0, *place)]

    first = 0  # column tiles of the weights before
    for w in weights:
        end = first + w.shape[-1] // tile.outputs

        @pl.when((wanted_ref[group] != 0) & (number >= first) & (number < end))
        def compute(first: int = first, w: Any = w) -> None:
            columns = number * tile.outputs + jnp.arange(tile.outputs, dtype=jnp.int32)
            own_columns = pl.ds((number - first) * tile.outputs, tile.outputs)
            at = tuple(at_ref[group, i] for i in range(at_ref.shape[1]))
            sums = _multiply_part(
                read_x, w, at, own_columns, tile=tile, number=number_of_part, part=part, scale_rows=scale_rows
            )
            out_ref[number_of_part, group, rows[:, None], columns[None]] = sums

        first = end


def _multiply_part(
    read_x: Callable[[jax.Array], jax.Array],
    w: Any,
    at: tuple[jax.Array, ...],
    columns: Any,
    *,
    tile: Tile,
    number: jax.Array,
    part: int,
    scale_rows: int,
) -> jax.Array:
    """The product of a tile of rows with some columns of `w[at]`, over the part `number` of the weight's rows, scaled.

    `read_x` gives the columns of the rows, from one on, that one step multiplies with as many rows of the weight.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    weight_ref, scales_ref = weight_and_scales(w)
    block = math.gcd(part, scale_rows)
    zeros = jnp.zeros((tile.rows, tile.outputs), jnp.float32)

    def add_block(i: jax.Array, out: jax.Array) -> jax.Array:
        first = number * part + i * block

        def add_step(step: jax.Array, total: jax.Array) -> jax.Array:
            begin = first + step * tile.step
            x = read_x(begin)
            factor = weight_ref[(*at, pl.ds(begin, tile.step), columns)].astype(x.dtype)
            return total + triton.dot(x, factor, precision=float_precision(x.dtype))

        total = lax.fori_loop(0, block // tile.step, add_step, zeros)
        if scales_ref is not None:
            total = total * scales_ref[(*at, pl.ds(first // scale_rows, 1), columns)].astype(jnp.float32)
        return out + total

    return lax.fori_loop(0, part // block, add_block, zeros)


# Rows and columns that one program casts.
_CAST_TILE = (8, 128 * 8)


def cast(stack: jax.Array, at: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`stack[at]` in bfloat16, in one pass over it: XLA:GPU copies the slice before it casts.

    Args:
      stack: int8 [*stack, C, O]; C a multiple of 8, O of 128.
      at: int32 [stack axes].
      interpret: run it as plain JAX, on any device.

    Returns:
      bfloat16 [C, O].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *_, rows, outputs = stack.shape
    tile = (_CAST_TILE[0], math.gcd(_CAST_TILE[1], outputs))

    def cast_tile(at_ref: Any, stack_ref: Any, out_ref: Any) -> None:
        index = tuple(at_ref[i] for i in range(at_ref.shape[0]))
        place = (pl.ds(pl.program_id(axis) * tile[axis], tile[axis]) for axis in range(2))
        out_ref[...] = stack_ref[(*index, *place)].astype(out_ref.dtype)

    return pl.pallas_call(
        cast_tile,
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.bfloat16),
        grid=(rows // tile[0], outputs // tile[1]),
        in_specs=[pl.BlockSpec(array.shape, lambda *_, rank=array.ndim: (0,) * rank) for array in (at, stack)],
        out_specs=pl.BlockSpec(tile, lambda row, column: (row, column)),
        compiler_params=triton.CompilerParams(),
        interpret=interpret,
        name="cast",
    )(at, stack)
