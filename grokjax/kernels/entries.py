"""Reads, writes and copies entries of the cache: rows of one layer, in place, on any device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.cache import CACHE_AXES, Entries, QuantizedEntries
from grokjax.kernels.slices import row_major
from grokjax.sharding import Partitioner


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlace:
    """Where in a cache of B rows the new tokens [P, T] of a call lie, in one of its layers.

    Attributes:
      layer: int32 [], the layer of the cache.
      rows: int32 [P], rows of the cache that the tokens are for, each once; all B in order if None.
      start: int32 [P], filled entries of each row before, and so the position of its first new token.
      count: int32 [P], real new tokens of each row, 0 to T.
    """

    layer: jax.Array
    rows: jax.Array | None = None
    start: jax.Array
    count: jax.Array


def write(stack: Entries, new: jax.Array, place: CachePlace, *, platform: str) -> Entries:
    """Writes new entries of one layer into the stack, in place where the stack is a loop's carry.

    Entries that would lie beyond the end are dropped; everything else stays as it was. Each row is one
    `dynamic_update_slice`: a scatter makes XLA:TPU copy the whole stack into another layout. On GPUs it is a scatter,
    one kernel for all rows.

    Args:
      stack: [L, B, K, S, H].
      new: float [P, K, T, H] with T at most S; of each row the first `count` entries are written.
      place: where they lie.
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      The stack [L, B, K, S, H].
    """
    parts = _rounded(new) if isinstance(stack, QuantizedEntries) else new
    form = scatter_entries if platform == "gpu" else functools.partial(_write_rows, platform=platform)
    return jax.tree.map(lambda stack, new: form(stack, new, place), stack, parts)


@jax.custom_jvp
def _rounded(new: jax.Array) -> QuantizedEntries:
    """New entries [P, K, T, H] as int8 ones, through which no derivative goes."""
    return QuantizedEntries.of(new)


@_rounded.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "a derivative through an int8 cache was asked for, and rounding has none: create the cache with dtype=float32 "
        "or bfloat16."
    )


def read(
    stack: Entries, place: CachePlace, *, begin: jax.Array, size: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array | None]:
    """A block of one layer's entries, and what they have to be multiplied with.

    Args:
      stack: [L, B, K, S, H].
      place: the layer and the rows to read.
      begin: int32 [], position of the first entry.
      size: entries.
      dtype: to cast them to; int8 is exact in any.

    Returns:
      The entries [P, K, size, H] in `dtype`, and their scales, float32 [P, K, size], or None for factors of 1.
    """
    zero, rows = jnp.zeros((), jnp.int32), place.rows
    stack = jax.tree.map(row_major, stack)

    def take_rows(stack: jax.Array, first: jax.Array, num_rows: int) -> jax.Array:
        index = (place.layer, first, zero, begin) + (zero,) * (stack.ndim - 4)
        return lax.dynamic_slice(stack, index, (1, num_rows, stack.shape[2], size, *stack.shape[4:]))[0]

    def take(stack: jax.Array) -> jax.Array:
        if rows is None:
            return take_rows(stack, zero, stack.shape[1])
        return jnp.concatenate([take_rows(stack, rows[i], 1) for i in range(len(rows))])

    if isinstance(stack, QuantizedEntries):
        return take(stack.numbers).astype(dtype), take(stack.scales)
    return take(stack).astype(dtype), None


def copy_row(stack: Entries, partitioner: Partitioner, *, source: jax.Array, target: jax.Array) -> Entries:
    """The stack with row `target` a copy of row `source`, layer by layer, on whatever devices they lie.

    Args:
      stack: [L, B, K, S, H].
      partitioner: of the model.
      source: int32 [].
      target: int32 [].

    Returns:
      The stack [L, B, K, S, H].
    """
    num_rows = stack.shape[1]

    def copy(stack: jax.Array, rows: jax.Array) -> jax.Array:
        is_split = stack.shape[1] < num_rows
        own, is_held = _own_rows(rows, stack.shape[1], partitioner) if is_split else (rows, jnp.ones(2, bool))

        def copy_layer(layer: jax.Array, stack: jax.Array) -> jax.Array:
            places = [
                (jnp.asarray(layer, jnp.int32), own[i]) + (jnp.zeros((), jnp.int32),) * (stack.ndim - 2)
                for i in range(2)
            ]
            new, old = (lax.dynamic_slice(stack, place, (1, 1, *stack.shape[2:])) for place in places)
            if is_split:
                new = partitioner.psum(jnp.where(is_held[0], new, 0), "batch")
            return lax.dynamic_update_slice(stack, jnp.where(is_held[1], new, old), places[1])

        return lax.fori_loop(0, stack.shape[0], copy_layer, stack)

    spec = jax.tree.map(lambda leaf: partitioner.spec(CACHE_AXES[: leaf.ndim], leaf.shape), stack)
    copy_all = partitioner.shard_map(
        lambda stack, rows: jax.tree.map(lambda leaf: copy(leaf, rows), stack),
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
    )
    copied: Entries = copy_all(stack, jnp.stack([source, target]))
    return copied


def own_place(place: CachePlace, num_held: int, partitioner: Partitioner) -> tuple[CachePlace, jax.Array]:
    """Inside `shard_map`, of a cache whose rows are split: the place as this device knows it, and which rows it holds.

    Args:
      place: in the whole cache, its rows given.
      num_held: rows that the device holds.
      partitioner: of the model.

    Returns:
      The place, without any tokens for rows held elsewhere, and bool [P].
    """
    assert place.rows is not None
    rows, is_held = _own_rows(place.rows, num_held, partitioner)
    start, count = jnp.where(is_held, place.start, 0), jnp.where(is_held, place.count, 0)
    return dataclasses.replace(place, rows=rows, start=start, count=count), is_held


def _own_rows(rows: jax.Array, num_held: int, partitioner: Partitioner) -> tuple[jax.Array, jax.Array]:
    """This device's numbers of rows [P] of the whole cache, 0 for those held elsewhere, and whether it holds each."""
    own = rows - partitioner.index("batch") * num_held
    is_held = (own >= 0) & (own < num_held)
    return jnp.where(is_held, own, 0), is_held


def scatter_entries(stack: jax.Array, new: jax.Array, place: CachePlace) -> jax.Array:
    """Writes new entries of one layer into one array by a scatter, which on GPUs is one kernel for all rows.

    Args:
      stack: [L, B, K, S, ...], keys, values or their scales.
      new: [P, K, T, ...] with T at most S.
      place: where they lie.

    Returns:
      The stack [L, B, K, S, ...].
    """
    num_rows, _, num_new, *_ = new.shape
    number = jnp.arange(num_new, dtype=jnp.int32)[None]
    # What is not to be written goes behind the end, each to a place of its own.
    behind = stack.shape[3] + jnp.arange(num_rows * num_new, dtype=jnp.int32).reshape(num_rows, num_new)
    position = jnp.where(number < place.count[:, None], place.start[:, None] + number, behind)  # [P, T]
    moved = new.swapaxes(1, 2).astype(stack.dtype)
    rows = jnp.arange(num_rows, dtype=jnp.int32) if place.rows is None else place.rows
    return stack.at[place.layer, rows[:, None], :, position].set(moved, mode="drop", unique_indices=True)


def _write_rows(stack: jax.Array, new: jax.Array, place: CachePlace, *, platform: str) -> jax.Array:
    """Writes what `scatter_entries` writes, row by row."""
    num_rows, heads, num_new, *rest = new.shape
    zero = jnp.zeros((), jnp.int32)

    def write_row(i: jax.Array, stack: jax.Array) -> jax.Array:
        i = jnp.asarray(i, jnp.int32)
        # Near the end of the cache the window slides left, and the new entries slide right inside it.
        first = jnp.minimum(place.start[i], stack.shape[3] - num_new)
        shift = place.start[i] - first
        index = (place.layer, i if place.rows is None else place.rows[i], zero, first) + (zero,) * len(rest)
        # Read and written in the layout that the stack has outside of loops: XLA:TPU would copy all of it into another.
        # On CPUs to state it for reading would only cost a kernel.
        held = row_major(stack)
        old = lax.dynamic_slice(held if platform == "tpu" else stack, index, (1, 1, heads, num_new, *rest))
        number = jnp.arange(num_new, dtype=jnp.int32) - shift
        fresh = (number >= 0) & (number < place.count[i])
        moved = jnp.roll(lax.dynamic_index_in_dim(new, i, keepdims=False), shift, axis=1)
        window = jnp.where(fresh.reshape(-1, *[1] * len(rest)), moved.astype(stack.dtype), old[0, 0])
        return row_major(lax.dynamic_update_slice(held, window[None, None], index))

    return lax.fori_loop(0, num_rows, write_row, stack)
