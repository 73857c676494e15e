"""What a step must read and compute, counted from shapes: the floor under its time."""

import dataclasses

import jax
from flax import nnx
from jax.typing import DTypeLike

from grokjax.cache import entry_bytes
from grokjax.model import Grok
from grokjax.quantization import without_columns
from grokjax.sharding import device_bytes


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Bytes that one device must read in a step, as stored, and its operations.

    Attributes:
      attention: bytes of the projections of all layers.
      experts: bytes of the experts that the tokens choose, on average over uniform choices; where a device holds some
        of the experts only, of the busiest device.
      unembedding: bytes of the table.
      cache: bytes of the filled keys and values of all rows, scales included.
      operations: multiplications and additions, attention included.
    """

    attention: float
    experts: float
    unembedding: float
    cache: float
    operations: float

    @property
    def num_bytes(self) -> float:
        """All that is read."""
        return self.attention + self.experts + self.unembedding + self.cache


def step_cost(model: Grok, *, batch_size: int, num_new: int = 1, filled: int, cache_dtype: DTypeLike) -> StepCost:
    """The cost of adding `num_new` tokens to each of `batch_size` rows.

    Args:
      model: the model, or an abstract one.
      batch_size: rows.
      num_new: 1 for a decode step, more for a prefill.
      filled: entries of each row, the new ones included.
      cache_dtype: of keys and values.
    """
    config, partitioner, layers = model.config, model.partitioner, model.layers
    data, shards = partitioner.shards("batch"), partitioner.shards("heads")
    rows = batch_size / data if batch_size % data == 0 else batch_size
    attention = layers.attention
    feed_forward = layers.feed_forward
    # Where `embed` is sharded, a device reads what it has gathered.
    parts = partitioner.shards("embed")
    experts = parts * stored_bytes(feed_forward.gate, feed_forward.up, feed_forward.down)
    fraction = _read_fraction(model, rows * num_new)
    heads = max(1, config.num_kv_heads // shards)
    entries = 2 * config.num_layers * heads * rows * filled
    return StepCost(
        attention=parts * stored_bytes(attention.query, attention.key, attention.value, attention.output),
        experts=experts * fraction,
        unembedding=parts * stored_bytes(model.embedding.table),
        cache=entries * entry_bytes(config.head_dim, cache_dtype),
        operations=_operations(model, rows, num_new, filled - (num_new - 1) / 2),
    )


def stored_bytes(*params: nnx.Variable) -> int:
    """Bytes of some parameters on each device, scales included; of a table that is held twice one form is read."""
    return device_bytes(jax.tree.leaves([without_columns(param.get_value()) for param in params]))


def _read_fraction(model: Grok, tokens: float) -> float:
    """The part of a device's experts that so many tokens choose."""
    config = model.config
    shards = model.partitioner.shards("experts")
    if shards > 1:
        own = config.num_experts // shards
        return min(own, tokens * config.experts_per_token) / own
    return 1 - (1 - config.experts_per_token / config.num_experts) ** tokens


def _operations(model: Grok, rows: float, num_new: int, seen: float) -> float:
    """Operations on a device for `num_new` tokens a row that see `seen` entries on average; logits of the last one."""
    config, partitioner = model.config, model.partitioner
    heads, kv_heads = config.num_heads, config.num_kv_heads
    projections = 2 * config.model_dim * config.head_dim * (heads + kv_heads) / partitioner.shards("heads")
    attention = 2 * heads * config.head_dim * seen / partitioner.shards("heads")
    shards = partitioner.shards("ffn") * partitioner.shards("experts")
    experts = 3 * config.model_dim * config.ffn_dim * config.experts_per_token / shards
    unembedding = config.model_dim * config.vocab_size / partitioner.shards("vocab")
    return 2 * rows * (num_new * config.num_layers * (projections + attention + experts) + unembedding)
