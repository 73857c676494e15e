"""The embedding table, plain or int8: tokens in, logits out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from grokjax.config import GrokConfig
from grokjax.kernels import unembed, with_rule
from grokjax.model.base import Module, Parameter
from grokjax.model.contexts import in_any_context
from grokjax.model.weights import random_normal
from grokjax.quantization import QuantizedTable, Table, partition_specs, without_columns
from grokjax.sharding import Partitioner


class Embedding(Module):
    """The token table, used to embed tokens and, transposed, to make logits: [V, D], plain or a `QuantizedTable`."""

    def __init__(self, config: GrokConfig, *, dtype: DTypeLike, partitioner: Partitioner, rngs: nnx.Rngs):
        self.config, self.dtype, self.partitioner = config, jnp.dtype(dtype), partitioner
        shape = config.vocab_size, config.model_dim
        table = random_normal(rngs.params(), shape=shape, dtype=dtype, deviation=config.model_dim**-0.5)
        self.table = Parameter(table, logical_axes=("vocab", "embed"))

    @in_any_context
    def embed(self, tokens: ArrayLike) -> jax.Array:
        """Embeds tokens, integers [B, T], into the compute dtype [B, T, D], multiplier applied.

        Each device looks up the tokens of its own rows of the table: left to the compiler, XLA:GPU gathers the table.

        Raises:
          ValueError: They are no integers, or have another rank.
        """
        tokens = as_integers("tokens", tokens)
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape [batch, length]; these have shape {tokens.shape}.")
        partitioner = self.partitioner.without_embed()
        rows = partitioner.spec(("batch", None), tokens.shape)

        def lookup(table: Table, tokens: jax.Array) -> jax.Array:
            own = tokens - partitioner.index("vocab") * table.shape[0]
            found = (own >= 0) & (own < table.shape[0])
            embedded = with_rule(_table_rows, _pull_rows)(table, jnp.clip(own, 0, table.shape[0] - 1))
            return partitioner.psum(jnp.where(found[..., None], embedded, 0), "vocab")

        table = without_columns(self.table.get_value())
        in_specs = (partition_specs(table, ("vocab", "embed"), partitioner), rows)
        run = _on_own_shards(lookup, partitioner, in_specs=in_specs, out_specs=PartitionSpec(*rows, None))
        embedded = run(table, tokens)
        return (embedded * self.config.embedding_multiplier).astype(self.dtype)

    @in_any_context
    def unembed(self, x: jax.Array) -> jax.Array:
        """Logits, float32 [..., V], of hidden states [..., D] in the compute dtype, multiplier applied."""
        partitioner = self.partitioner.without_embed()
        rows = partitioner.spec(("batch", *(None,) * (x.ndim - 1)), x.shape)
        table: Table = self.table.get_value()
        in_specs = (rows, partition_specs(table, ("vocab", "embed"), partitioner))
        out_spec = PartitionSpec(*rows[:-1], partitioner.spec(("vocab", "embed"), table.shape)[0])
        product = functools.partial(unembed, platform=partitioner.platform)
        logits = _on_own_shards(product, partitioner, in_specs=in_specs, out_specs=out_spec)(x, table)
        return logits * self.config.output_multiplier


def as_integers(name: str, values: ArrayLike) -> jax.Array:
    """Token ids or lengths as an array; int64 stays so, because the check of their range must come before the cast.

    Raises:
      ValueError: They are text, no integers, or rows of several lengths.
    """
    try:
        array: Any = values if isinstance(values, jax.Array) else np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must have rows of one length: pad the shorter ones on the right.") from error
    if array.dtype.kind in "SU":
        raise ValueError(f'{name} must be integers, not text: encode it first, as in [tokenizer.encode("hello")].')
    if not jnp.issubdtype(array.dtype, jnp.integer):
        found = type(values).__name__ if array.dtype == object else array.dtype
        raise ValueError(f"{name} must be integers, not {found}.")
    return array


def _table_rows(table: Table, indices: jax.Array) -> jax.Array:
    """Some rows of the table in float32: a bfloat16 select makes jax 0.10 convert the whole table on CPUs."""
    if isinstance(table, QuantizedTable):
        return table.weight[indices].astype(jnp.float32) * table.scales[indices][..., None]
    return table[indices].astype(jnp.float32)


def _pull_rows(operands: tuple[Table, jax.Array], _: Any, rows: jax.Array) -> tuple[Any, None]:
    """The cotangents of `_table_rows`' operands from that of its result, float32 [*indices, D].

    JAX's own would be added into zeros, float32 [V, D]. Here each token that occurs has a place among the sums of so
    many rows, and from these is read what each row of the table has: what reads it makes no table of it.
    """
    table, indices = operands
    indices, rows = indices.reshape(-1), rows.reshape(-1, rows.shape[-1])
    if isinstance(table, QuantizedTable):
        of_scales = (table.weight[indices].astype(jnp.float32) * rows).sum(axis=1)
        scales = jnp.zeros(table.scales.shape, jnp.float32).at[indices].add(of_scales)
        quantized: Any = QuantizedTable
        return quantized(None, scales.astype(table.scales.dtype)), None
    nowhere = len(indices)
    places = jnp.full(len(table), nowhere, jnp.int32).at[indices].set(jnp.arange(nowhere, dtype=jnp.int32))
    sums = jnp.zeros((nowhere + 1, rows.shape[1]), jnp.float32).at[places[indices]].add(rows)
    return sums[places].astype(table.dtype), None


def _on_own_shards(
    function: Callable[..., jax.Array], partitioner: Partitioner, *, in_specs: Any, out_specs: Any
) -> Callable[..., jax.Array]:
    """`Partitioner.shard_map`, differentiated as `Partitioner.backwards` says."""
    forms = partitioner, partitioner.backwards()
    run, again = (form.shard_map(function, in_specs=in_specs, out_specs=out_specs) for form in forms)
    return with_rule(run, lambda operands, _, out: jax.vjp(again, *operands)[1](out))
