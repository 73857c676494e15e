"""The key and value cache: a frozen pytree with a length for each row."""

import dataclasses
import reprlib
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from grokjax.config import GrokConfig, check_config
from grokjax.context import is_traced, own_context
from grokjax.memory import check_fits
from grokjax.printing import describe, describe_devices, describe_fields, display, on_lines
from grokjax.quantization import largest_magnitude
from grokjax.request import check_integer, is_integer
from grokjax.sharding import Axes, Partitioner, ShardingRules, device_bytes, zeros

CACHE_AXES: Axes = ("layers", "batch", "kv_heads", None, None)

# Beyond what any machine holds, and few enough to count one by one.
MOST_ROWS = 1 << 22
# Of so many rows a cache prints each one's length.
_FEW_ROWS = 8


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

    __repr__ = describe_fields
    __treescope_repr__ = display

    @classmethod
    def of(cls, entries: jax.Array) -> Self:
        """Float entries [..., H] rounded to int8: off by at most half a scale, 1/254 of an entry's largest number.

        An entry with a NaN or an infinite number has an infinite scale, so no result of it is finite.
        """
        entries = entries.astype(jnp.float32)
        scales = largest_magnitude(entries, axis=-1) / 127
        numbers = jnp.round(entries / jnp.where(scales == 0, 1, scales)[..., None])
        return cls(numbers.astype(jnp.int8), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers, [L, B, K, S, H]."""
        return self.numbers.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the numbers, int8."""
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
    @own_context()
    def create(
        cls,
        config: GrokConfig,
        batch_size: int,
        max_len: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        rules: ShardingRules | None = None,
        allow_oom: bool = False,
    ) -> Self:
        """An empty cache, each shard made on its own device.

        Args:
          config: the model's sizes.
          batch_size: B, rows.
          max_len: S, entries a row can hold; by default `config.max_seq_len`, which it may not exceed.
          dtype: of keys and values: float32, bfloat16, or int8 with a scale for each head and position. By default
            bfloat16, but float32 on CPUs, which gain nothing from bfloat16 (and jax 0.10 converts the whole cache at
            each write there).
          mesh: the model's mesh; by default that of a model made without one, see `default_mesh`.
          rules: the model's sharding rules.
          allow_oom: try it even where the devices have too little memory left.

        Raises:
          ValueError: A size is below 1, `max_len` exceeds the configuration's longest sequence, the dtype is another
            one, or the devices have too little memory left.
        """
        shapes = cls.abstract(config, batch_size, max_len, dtype=dtype, mesh=mesh, rules=rules)
        return shapes.allocate(allow_oom=allow_oom)

    @classmethod
    @own_context()
    def abstract(
        cls,
        config: GrokConfig,
        batch_size: int,
        max_len: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        rules: ShardingRules | None = None,
    ) -> Self:
        """The cache that `create` makes, as `jax.ShapeDtypeStruct`s with shardings: to compile for, without memory.

        The arguments are those of `create`; of the mesh only the shape is asked for.

        Raises:
          ValueError: A size is out of range, or the dtype is another one.
        """
        check_config(config)
        max_len = config.max_seq_len if max_len is None else max_len
        batch_size = check_integer("batch_size", batch_size, 1, MOST_ROWS)
        if not is_integer(max_len) or not 1 <= max_len <= config.max_seq_len:
            raise ValueError(f"max_len={reprlib.repr(max_len)} must be between 1 and max_seq_len={config.max_seq_len}.")
        partitioner = Partitioner.create(config, mesh, rules)
        dtype = default_cache_dtype(partitioner.platform) if dtype is None else dtype
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

    @own_context()
    def allocate(self, *, allow_oom: bool = False) -> Self:
        """The empty cache that this one of shapes, from `abstract`, describes; see `create`."""
        if not allow_oom:
            self.check_fits()
        return zeros(self)

    def check_fits(self) -> None:
        """Checks that the devices have room for the cache that this one of shapes describes.

        Raises:
          ValueError: They have too little memory left.
        """
        if is_traced():  # inside a shard_map, a shard's bytes cannot be told either
            return
        sharding: Any = self.lengths.sharding
        check_fits(
            f"a cache of batch_size={self.batch_size}, max_len={self.max_len}",
            device_bytes(jax.tree.leaves(self)),
            sharding.mesh,
            remedy="take fewer rows, fewer tokens a row, int8 entries or more devices",
        )

    def __repr__(self) -> str:
        attributes = {"keys": describe(self.keys), "values": describe(self.values), "lengths": self._describe_lengths()}
        return on_lines(type(self).__name__, describe_devices(self), attributes)

    __treescope_repr__ = display

    def _describe_lengths(self) -> str:
        """How many entries are filled: of each row, or from the shortest to the longest of many."""
        if self.is_donated:
            return "donated to a step, which returned another cache in this one's memory"
        if not _is_concrete(self.lengths):
            return describe(self.lengths)
        with jax.transfer_guard("allow"):
            lengths = np.asarray(self.lengths)
        filled = lengths.tolist() if len(lengths) <= _FEW_ROWS else f"{lengths.min()} to {lengths.max()}"
        return f"{filled} of {self.max_len}"

    @property
    def is_donated(self) -> bool:
        """Whether a step has taken this cache's memory: then only the cache that it returned can be used."""
        return any(_is_concrete(leaf) and leaf.is_deleted() for leaf in jax.tree.leaves(self))

    @property
    def batch_size(self) -> int:
        """How many rows there are, B."""
        return self.keys.shape[1]

    @property
    def max_len(self) -> int:
        """How many entries each row can hold, S."""
        return self.keys.shape[3]

    def check_is_there(self) -> None:
        """Checks that no step has taken this cache's memory.

        Raises:
          ValueError: One has.
        """
        if self.is_donated:
            raise ValueError(
                "this cache was donated to a step, which returned another one in its memory: go on with that, as in "
                "`logits, cache = decode(model, tokens, cache)`. To keep a cache, give the step a copy: "
                "jax.tree.map(jnp.copy, cache)."
            )

    @own_context()
    def insert(self, row_cache: "KVCache", row: jax.Array | int) -> "KVCache":
        """This cache with row `row` replaced by the only row of `row_cache`.

        Args:
          row_cache: a cache of one row, no longer than this one, of the same model and mesh, int8 if this one is.
          row: int32 [], the row to fill.

        Raises:
          ValueError: `row_cache` has more than one row, is longer, of another model or mesh, or in int8 where this one
            is not, `row` is outside the batch, or a step has taken the memory of one of them.
        """
        self.check_is_there()
        row_cache.check_is_there()
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

        def put(stack: jax.Array, one: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(stack, one.astype(stack.dtype), row, axis=min(stack.ndim - 1, 1))

        return jax.tree.map(put, self, row_cache)

    @own_context()
    def reset(self, row: jax.Array | int) -> "KVCache":
        """This cache with one row empty; its memory stays as it is.

        Args:
          row: int32 [], or a number from 0.

        Raises:
          ValueError: `row` is outside the batch, or a step has taken this cache's memory.
        """
        self.check_is_there()
        return dataclasses.replace(self, lengths=self.lengths.at[self._check_row(row)].set(0))

    def _check_row(self, row: jax.Array | int) -> jax.Array:
        if isinstance(row, jax.core.Tracer):
            own = NamedSharding(jax.typeof(self.lengths).sharding.mesh, PartitionSpec())
            is_explicit = bool(jax.typeof(row).sharding.mesh.explicit_axes)
            return jnp.asarray(jax.device_put(row, own) if is_explicit else row, jnp.int32)
        if row not in range(self.batch_size):
            raise ValueError(
                f"row {row} is outside the cache's {self.batch_size} rows: give 0 to {self.batch_size - 1}."
            )
        return jnp.asarray(int(row), jnp.int32)


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _entry_shape(cache: KVCache) -> tuple[int, ...]:
    layers, _, heads, _, head_dim = cache.keys.shape
    return layers, heads, head_dim


def default_cache_dtype(platform: str, compute_dtype: DTypeLike = jnp.bfloat16) -> jnp.dtype:
    """The dtype of a cache that none is named for: float32 on CPUs and for a float32 model, else bfloat16.

    Args:
      platform: "cpu", "gpu" or "tpu".
      compute_dtype: the model's.
    """
    return jnp.dtype(jnp.float32 if platform == "cpu" or jnp.dtype(compute_dtype) == jnp.float32 else jnp.bfloat16)


def check_cache_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a cache as a `numpy.dtype`.

    Raises:
      ValueError: It is none of float32, bfloat16 and int8.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"the cache's dtype {dtype!r} must be float32, bfloat16 or int8.") from error
    if found not in [jnp.dtype(known) for known in (jnp.float32, jnp.bfloat16, jnp.int8)]:
        raise ValueError(f"the cache's dtype {found.name} must be float32, bfloat16 or int8.")
    return found
