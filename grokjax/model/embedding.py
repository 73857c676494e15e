"""The embedding table, plain or int8: tokens in, logits out."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.kernels import float_precision, pad_rows, product_dtype
from grokjax.quantization import QuantizedTable, specs
from grokjax.sharding import Partitioner

Table = jax.Array | QuantizedTable


class Embedding(nnx.Module):
    """The token table, used to embed tokens and, transposed, to make logits: [V, D], plain or a `QuantizedTable`."""

    def __init__(self, config: GrokConfig, *, dtype: DTypeLike, partitioner: Partitioner, rngs: nnx.Rngs):
        self.config, self.dtype, self.partitioner = config, jnp.dtype(dtype), partitioner
        self.table = nnx.Param(_random_table(rngs, config, dtype), logical_axes=("vocab", "embed"))

    def encode(self, tokens: jax.Array) -> jax.Array:
        """Embeds tokens, int32 [B, T], into the compute dtype [B, T, D], multiplier applied.

        Each device looks up the tokens of its own rows of the table: left to the compiler, XLA:GPU gathers the table.
        """
        partitioner = self.partitioner.without_embed()
        rows = partitioner.spec(("batch", None), tokens.shape)

        def lookup(table: Table, tokens: jax.Array) -> jax.Array:
            own = tokens - partitioner.index("vocab") * table.shape[0]
            found = (own >= 0) & (own < table.shape[0])
            embedded = _table_rows(table, jnp.clip(own, 0, table.shape[0] - 1))
            return partitioner.psum(jnp.where(found[..., None], embedded, 0), "vocab")

        table: Table = self.table.get_value()
        in_specs = (specs(table, ("vocab", "embed"), partitioner), rows)
        embedded = partitioner.shard_map(lookup, in_specs=in_specs, out_specs=PartitionSpec(*rows, None))(table, tokens)
        return (embedded * self.config.embedding_multiplier).astype(self.dtype)

    def decode(self, x: jax.Array) -> jax.Array:
        """Logits, float32 [..., V], of hidden states [..., D] in the compute dtype, multiplier applied."""
        partitioner = self.partitioner.without_embed()
        rows = partitioner.spec(("batch", *(None,) * (x.ndim - 1)), x.shape)
        table: Table = self.table.get_value()
        in_specs = (rows, specs(table, ("vocab", "embed"), partitioner))
        out_spec = PartitionSpec(*rows[:-1], partitioner.spec(("vocab", "embed"), table.shape)[0])
        logits = partitioner.shard_map(_unembed, in_specs=in_specs, out_specs=out_spec)(x, table)
        return logits * self.config.output_multiplier


# Parts in which a random table is drawn: whole, it would take eight times its memory.
_PARTS = 16


def _random_table(rngs: nnx.Rngs, config: GrokConfig, dtype: DTypeLike) -> jax.Array:
    """Normal numbers [V, D] of deviation `D ** -0.5`; every part has rows of each device."""
    num_parts = math.gcd(config.vocab_size, _PARTS)
    shape = (config.vocab_size // num_parts, config.model_dim)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(config.model_dim**-0.5, dtype)

    parts = lax.map(draw, jax.random.split(rngs.params(), num_parts))
    return parts.swapaxes(0, 1).reshape(config.vocab_size, config.model_dim)


def _table_rows(table: Table, indices: jax.Array) -> jax.Array:
    """Some rows of the table in float32: a bfloat16 select makes jax 0.10 convert the whole table on CPUs."""
    if isinstance(table, QuantizedTable):
        return table.weight[indices].astype(jnp.float32) * table.scales[indices][..., None]
    return table[indices].astype(jnp.float32)


def _unembed(x: jax.Array, table: Table) -> jax.Array:
    """`x [..., D] @ table [V, D].T` in float32."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(table, QuantizedTable):
        integers = functools.partial(lax.platform_dependent, cpu=integer_unembed, default=direct_unembed)
        out = integers(rows, table.weight) * table.scales[None]
    else:
        out = lax.platform_dependent(rows, table, cpu=padded_unembed, default=direct_unembed)
    return out.reshape(*x.shape[:-1], table.shape[0])


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


# Most rows that are written as int8 ones, and the rows of an int8 table that are cast together for more.
_INTEGER_ROWS, _CAST_ROWS = 16, 1024


def integer_unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x @ table.T` with an int8 table, of which XLA's CPU backend would make a whole copy in the dtype of x.

    A few rows are written as sums of int8 rows, each 254 times finer than the one before, and multiplied as integers:
    two for bfloat16, with an error of 2e-5 of a row's largest element, and three for float32. For more rows the table
    is cast block by block. Arguments and result are those of `direct_unembed`.
    """
    if x.shape[0] > _INTEGER_ROWS:
        return _blocked_unembed(x.astype(product_dtype(x.dtype)), table)
    digits = 2 if x.dtype == jnp.bfloat16 else 3
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=1, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest) / 127
    rest, rows = wide / scale, []
    for _ in range(digits):
        level = jnp.round(rest)
        rows.append(level.astype(jnp.int8))
        rest = (rest - level) * 254
    products = jnp.einsum("md,vd->mv", jnp.concatenate(rows), table, preferred_element_type=jnp.int32)
    parts = products.astype(jnp.float32).reshape(digits, x.shape[0], -1)
    return sum((part / 254**i for i, part in enumerate(parts)), jnp.zeros(())) * scale


def _blocked_unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    num_rows = table.shape[0]
    block = min(_CAST_ROWS, num_rows)

    def add_block(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * block, num_rows - block)  # the last block slides left and repeats what was done
        part = direct_unembed(x, lax.dynamic_slice_in_dim(table, start, block))
        return lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

    return lax.fori_loop(0, -(-num_rows // block), add_block, jnp.zeros((x.shape[0], num_rows), jnp.float32))
