"""The key and value cache: a frozen pytree with a length for each row."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.sharding import Axes, Partitioner, ShardingRules

CACHE_AXES: Axes = ("layers", "batch", "kv_heads", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedEntries:
    """Keys or values in int8 with a scale for each head and position; a pytree of two leaves.

    Attributes:
      numbers: int8 [L, B, K, S, H].
      scales: float32 [L, B, K, S]; an entry stands for `numbers[..., s, :] * scales[..., s]`.
    """

    numbers: jax.Array
    scales: jax.Array

    @classmethod
    def of(cls, entries: jax.Array) -> Self:
        """Float entries [..., H] rounded to int8: off by at most half a scale, 1/254 of an entry's largest number."""
        entries = entries.astype(jnp.float32)
        scales = jnp.abs(entries).max(axis=-1) / 127
        numbers = jnp.round(entries / jnp.where(scales == 0, 1, scales)[..., None])
        return cls(numbers.astype(jnp.int8), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """[L, B, K, S, H]."""
        return self.numbers.shape

    @property
    def dtype(self) -> jnp.dtype:
        """int8."""
        return self.numbers.dtype


Entries = jax.Array | QuantizedEntries


def entry_bytes(head_dim: int, dtype: DTypeLike) -> int:
    """Bytes of one head's key, or value, at one position of a cache of this dtype."""
    dtype = jnp.dtype(dtype)
    return head_dim * dtype.itemsize + (4 if dtype == jnp.int8 else 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of all positions seen so far; a value, never changed in place by Python code.

    Entries at and beyond a row's length are never read.

    Attributes:
      keys: [L, B, K, S, H]; K counts each kv head once for every device of its group (see `ShardingRules.kv_heads`).
      values: [L, B, K, S, H], of the same kind.
      lengths: int32 [B], filled entries of each row, 0 to S.
    """

    keys: Entries
    values: Entries
    lengths: jax.Array

    @classmethod
    def create(
        cls,
        config: GrokConfig,
        batch_size: int,
        max_len: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        rules: ShardingRules | None = None,
    ) -> Self:
        """An empty cache, each shard made on its own device.

        Args:
          config: the model's sizes.
          batch_size: B, rows.
          max_len: S, entries a row can hold; by default `config.max_seq_len`, which it may not exceed.
          dtype: of keys and values: float32, bfloat16, or int8 with a scale for each head and position. By default
            bfloat16, but float32 on CPUs, which gain nothing from bfloat16 (and jax 0.10 converts the whole cache at
            each write there).
          mesh: the model's mesh; one device by default.
          rules: the model's sharding rules.

        Raises:
          ValueError: A size is below 1, `max_len` exceeds the configuration's longest sequence, or the dtype is
            another one.
        """
        shapes = cls.abstract(config, batch_size, max_len, dtype=dtype, mesh=mesh, rules=rules)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)

    @classmethod
    def abstract(
        cls,
        config: GrokConfig,
        batch_size: int,
        max_len: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        rules: ShardingRules | None = None,
    ) -> Self:
        """The cache that `create` makes, as `jax.ShapeDtypeStruct`s with shardings: to compile for, without memory."""
        max_len = config.max_seq_len if max_len is None else max_len
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more.")
        if not 1 <= max_len <= config.max_seq_len:
            raise ValueError(f"max_len={max_len} must be between 1 and max_seq_len={config.max_seq_len}.")
        partitioner = Partitioner.create(config, mesh, rules)
        if dtype is None:
            dtype = jnp.float32 if partitioner.platform == "cpu" else jnp.bfloat16
        heads = config.num_kv_heads * partitioner.kv_copies(config)
        shape = (config.num_layers, batch_size, heads, max_len, config.head_dim)

        def abstract(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
            sharding = partitioner.sharding(CACHE_AXES[: len(shape)], shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        entries = abstract(shape, check_cache_dtype(dtype))
        if entries.dtype == jnp.int8:
            entries = QuantizedEntries(entries, abstract(shape[:-1], jnp.float32))
        whole = partitioner.sharding((None,), (batch_size,))
        lengths: Any = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=whole)
        return cls(keys=entries, values=entries, lengths=lengths)

    @property
    def batch_size(self) -> int:
        """B, rows."""
        return self.keys.shape[1]

    @property
    def max_len(self) -> int:
        """S, entries that each row can hold."""
        return self.keys.shape[3]

    def insert(self, row_cache: "KVCache", row: jax.Array | int) -> "KVCache":
        """This cache with row `row` replaced by the only row of `row_cache`.

        Args:
          row_cache: a cache of one row, no longer than this one, of the same model and mesh, int8 if this one is.
          row: int32 [], the row to fill.

        Raises:
          ValueError: `row_cache` has more than one row, is longer, of another model or mesh, or in int8 where this one
            is not, or `row` is outside the batch.
        """
        if row_cache.batch_size != 1 or row_cache.max_len > self.max_len:
            raise ValueError(
                f"insert takes a cache of one row and at most {self.max_len} entries, not {row_cache.batch_size} rows "
                f"of {row_cache.max_len}."
            )
        # A smaller update would be written into a corner of the row without an error.
        ours, theirs = _entry_shape(self), _entry_shape(row_cache)
        if ours != theirs:
            raise ValueError(
                f"the row holds entries of (layers, kv heads, head size) {theirs} and this cache {ours}: create both "
                "with the same configuration, mesh and rules."
            )
        if type(self.keys) is not type(row_cache.keys):
            raise ValueError(
                f"the row holds entries of {row_cache.keys.dtype} and this cache those of {self.keys.dtype}: create "
                "both with the same dtype."
            )
        row = self._check_row(row)

        def put(stack: jax.Array, piece: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(stack, piece.astype(stack.dtype), row, axis=min(stack.ndim - 1, 1))

        return jax.tree.map(put, self, row_cache)

    def reset(self, row: jax.Array | int) -> "KVCache":
        """This cache with row `row` empty."""
        return dataclasses.replace(self, lengths=self.lengths.at[self._check_row(row)].set(0))

    def _check_row(self, row: jax.Array | int) -> jax.Array:
        if not isinstance(row, jax.core.Tracer) and row not in range(self.batch_size):
            raise ValueError(f"row {row} is outside the cache's {self.batch_size} rows: give one of 0, 1, ...")
        return jnp.asarray(row, jnp.int32)


def _entry_shape(cache: KVCache) -> tuple[int, ...]:
    layers, _, heads, _, head_dim = cache.keys.shape
    return layers, heads, head_dim


def check_cache_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a cache as a `numpy.dtype`.

    Raises:
      ValueError: It is none of float32, bfloat16 and int8.
    """
    if jnp.dtype(dtype) not in [jnp.dtype(known) for known in (jnp.float32, jnp.bfloat16, jnp.int8)]:
        raise ValueError(f"the cache's dtype {jnp.dtype(dtype).name} must be float32, bfloat16 or int8.")
    return jnp.dtype(dtype)


def write(
    stack: Entries,
    new: jax.Array,
    *,
    layer: jax.Array,
    rows: jax.Array | None = None,
    start: jax.Array,
    count: jax.Array,
) -> Entries:
    """Writes new entries of one layer into the stack, in place where the stack is a loop's carry.

    Entries that would lie beyond the end are dropped; everything else stays as it was. Each row is one
    `dynamic_update_slice`: a scatter makes XLA:TPU copy the whole stack into another layout. On GPUs it is a scatter,
    one kernel for all rows.

    Args:
      stack: [L, B, K, S, H].
      new: float [P, K, T, H] with T at most S; of each row the first `count` entries are written.
      layer: int32 [].
      rows: int32 [P], the stack's rows that they belong to; all B in order by default.
      start: int32 [P], position of each row's first new entry.
      count: int32 [P], 0 to T.

    Returns:
      The stack [L, B, K, S, H].
    """
    parts = QuantizedEntries.of(new) if isinstance(stack, QuantizedEntries) else new

    def put(stack: jax.Array, new: jax.Array) -> jax.Array:
        return lax.platform_dependent(stack, new, layer, rows, start, count, cuda=scatter_entries, default=_write_rows)

    return jax.tree.map(put, stack, parts)


def read(
    stack: Entries,
    *,
    layer: jax.Array,
    rows: jax.Array | None = None,
    begin: jax.Array,
    size: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array | None]:
    """A block of one layer's entries, and what they have to be multiplied with.

    Args:
      stack: [L, B, K, S, H].
      layer: int32 [].
      rows: int32 [P], the stack's rows to read; all B in order by default.
      begin: int32 [], position of the first entry.
      size: entries.
      dtype: to cast them to; int8 is exact in any.

    Returns:
      The entries [P, K, size, H] in `dtype`, and their scales, float32 [P, K, size], or None for factors of 1.
    """
    zero = jnp.zeros((), jnp.int32)
    stack = jax.tree.map(_row_major, stack)

    def take_rows(stack: jax.Array, first: jax.Array, num_rows: int) -> jax.Array:
        index = (layer, first, zero, begin) + (zero,) * (stack.ndim - 4)
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
        own, is_held = own_rows(rows, stack.shape[1], partitioner) if is_split else (rows, jnp.ones(2, bool))

        def copy_layer(layer: jax.Array, stack: jax.Array) -> jax.Array:
            places = [(layer, own[i]) + (jnp.zeros((), jnp.int32),) * (stack.ndim - 2) for i in range(2)]
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


def own_rows(rows: jax.Array, num_held: int, partitioner: Partitioner) -> tuple[jax.Array, jax.Array]:
    """Inside `shard_map`, of a cache whose rows are split: this device's numbers of some rows, and which it holds.

    Args:
      rows: int32 [P], of the whole cache.
      num_held: rows that the device holds.
      partitioner: of the model.

    Returns:
      int32 [P], 0 for rows held elsewhere, and bool [P].
    """
    own = rows - partitioner.index("batch") * num_held
    is_held = (own >= 0) & (own < num_held)
    return jnp.where(is_held, own, 0), is_held


def scatter_entries(
    stack: jax.Array, new: jax.Array, layer: jax.Array, rows: jax.Array | None, start: jax.Array, count: jax.Array
) -> jax.Array:
    """Writes new entries of one layer into one array by a scatter, which on GPUs is one kernel for all rows.

    Args:
      stack: [L, B, K, S, ...], keys, values or their scales.
      new: [P, K, T, ...] with T at most S.
      layer: int32 [].
      rows: int32 [P], as in `write`; all B in order if None.
      start: int32 [P].
      count: int32 [P].

    Returns:
      The stack [L, B, K, S, ...].
    """
    num_rows, _, num_new, *_ = new.shape
    number = jnp.arange(num_new)[None]
    # What is not to be written goes behind the end, each to a place of its own.
    behind = stack.shape[3] + jnp.arange(num_rows * num_new).reshape(num_rows, num_new)
    position = jnp.where(number < count[:, None], start[:, None] + number, behind)  # [P, T]
    moved = new.swapaxes(1, 2).astype(stack.dtype)
    rows = jnp.arange(num_rows) if rows is None else rows
    return stack.at[layer, rows[:, None], :, position].set(moved, mode="drop", unique_indices=True)


def _write_rows(
    stack: jax.Array, new: jax.Array, layer: jax.Array, rows: jax.Array | None, start: jax.Array, count: jax.Array
) -> jax.Array:
    """What `scatter_entries` does, row by row."""
    num_rows, heads, num_new, *rest = new.shape
    zero = jnp.zeros((), jnp.int32)

    def write_row(i: jax.Array, stack: jax.Array) -> jax.Array:
        # Near the end of the cache the window slides left, and the new entries slide right inside it.
        first = jnp.minimum(start[i], stack.shape[3] - num_new)
        shift = start[i] - first
        index = (layer, i if rows is None else rows[i], zero, first) + (zero,) * len(rest)
        old = lax.dynamic_slice(stack, index, (1, 1, heads, num_new, *rest))
        number = jnp.arange(num_new) - shift
        fresh = (number >= 0) & (number < count[i])
        moved = jnp.roll(lax.dynamic_index_in_dim(new, i, keepdims=False), shift, axis=1)
        window = jnp.where(fresh.reshape(-1, *[1] * len(rest)), moved.astype(stack.dtype), old[0, 0])
        return _row_major(lax.dynamic_update_slice(_row_major(stack), window[None, None], index))

    return lax.fori_loop(0, num_rows, write_row, stack)


def _row_major(stack: jax.Array) -> jax.Array:
    """The stack in the layout that it has outside of loops: XLA:TPU would copy all of it into another one."""
    return with_layout_constraint(stack, Layout(major_to_minor=tuple(range(stack.ndim))))
