"""The key and value cache: a frozen pytree with a length for each row."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.sharding import Axes, Partitioner, ShardingRules

CACHE_AXES: Axes = ("layers", "batch", "kv_heads", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of all positions seen so far; a value, never changed in place by Python code.

    Entries at and beyond a row's length are never read.

    Attributes:
      keys: [L, B, K, S, H]; K counts each kv head once for every device of its group (see `ShardingRules.kv_heads`).
      values: [L, B, K, S, H], of the same dtype.
      lengths: int32 [B], filled entries of each row, 0 to S.
    """

    keys: jax.Array
    values: jax.Array
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
          dtype: of keys and values. By default bfloat16, but float32 on CPUs, which gain nothing from bfloat16 (and
            jax 0.10 converts the whole cache at each write there).
          mesh: the model's mesh; one device by default.
          rules: the model's sharding rules.

        Raises:
          ValueError: A size is below 1, or `max_len` exceeds the configuration's longest sequence.
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
        entries: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.sharding(CACHE_AXES, shape))
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
          row_cache: a cache of one row, no longer than this one, of the same model, mesh and dtype.
          row: int32 [], the row to fill.

        Raises:
          ValueError: `row_cache` has more than one row, is longer or of another model or mesh, or `row` is outside the
            batch.
        """
        if row_cache.batch_size != 1 or row_cache.max_len > self.max_len:
            raise ValueError(
                f"insert takes a cache of one row and at most {self.max_len} entries, not {row_cache.batch_size} rows "
                f"of {row_cache.max_len}."
            )
        # A smaller update would be written into a corner of the row without an error.
        ours, theirs = self._entry_shape(), row_cache._entry_shape()
        if ours != theirs:
            raise ValueError(
                f"the row holds entries of (layers, kv heads, head size) {theirs} and this cache {ours}: create both "
                "with the same configuration, mesh and rules."
            )
        row = self._check_row(row)
        zero = jnp.zeros((), jnp.int32)
        index = (zero, row, zero, zero, zero)
        return KVCache(
            keys=lax.dynamic_update_slice(self.keys, row_cache.keys.astype(self.keys.dtype), index),
            values=lax.dynamic_update_slice(self.values, row_cache.values.astype(self.values.dtype), index),
            lengths=lax.dynamic_update_slice(self.lengths, row_cache.lengths, (row,)),
        )

    def reset(self, row: jax.Array | int) -> "KVCache":
        """This cache with row `row` empty."""
        return dataclasses.replace(self, lengths=self.lengths.at[self._check_row(row)].set(0))

    def _entry_shape(self) -> tuple[int, ...]:
        layers, _, heads, _, head_dim = self.keys.shape
        return layers, heads, head_dim

    def _check_row(self, row: jax.Array | int) -> jax.Array:
        if not isinstance(row, jax.core.Tracer) and not 0 <= int(row) < self.batch_size:
            raise ValueError(f"row {int(row)} is outside the cache's {self.batch_size} rows.")
        return jnp.asarray(row, jnp.int32)


def write(stack: jax.Array, new: jax.Array, *, layer: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """Writes new entries of one layer into the stack, in place where the stack is a loop's carry.

    Entries that would lie beyond the end are dropped; everything else stays as it was. Each row is one
    `dynamic_update_slice`: a scatter makes XLA:TPU copy the whole stack into another layout.

    Args:
      stack: [L, B, K, S, H].
      new: [B, K, T, H] with T at most S; of row b the first `count[b]` entries are written.
      layer: int32 [].
      start: int32 [B], position of each row's first new entry.
      count: int32 [B], 0 to T.

    Returns:
      The stack [L, B, K, S, H].
    """
    num_rows, heads, num_new, head_dim = new.shape
    zero = jnp.zeros((), jnp.int32)

    def write_row(row: jax.Array, stack: jax.Array) -> jax.Array:
        # Near the end of the cache the window slides left, and the new entries slide right inside it.
        first = jnp.minimum(start[row], stack.shape[3] - num_new)
        shift = start[row] - first
        index = (layer, row, zero, first, zero)
        old = lax.dynamic_slice(stack, index, (1, 1, heads, num_new, head_dim))
        number = jnp.arange(num_new) - shift
        fresh = (number >= 0) & (number < count[row])
        moved = jnp.roll(lax.dynamic_index_in_dim(new, row, keepdims=False), shift, axis=1)
        window = jnp.where(fresh[:, None], moved.astype(stack.dtype), old[0, 0])
        return lax.dynamic_update_slice(stack, window[None, None], index)

    return lax.fori_loop(0, num_rows, write_row, stack)
