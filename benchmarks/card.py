"""What every benchmark prints: a card of what must move, the machine's ceiling, and last one JSON line."""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grokjax import Grok, GrokConfig, QuantizedArray


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step must read, as stored.

    Attributes:
      attention: projections of all layers.
      experts: of the experts that the rows choose, on average over uniform choices.
      unembedding: the table, once.
      cache: keys and values of the filled entries of all rows.
    """

    attention: float
    experts: float
    unembedding: float
    cache: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.attention + self.experts + self.unembedding + self.cache


def step_bytes(model: Grok, *, batch_size: int, filled: int, cache_itemsize: int) -> StepBytes:
    """What a decode step of `batch_size` rows with `filled` entries each must read."""
    config, layers = model.config, model.layers
    attention = sum(map(stored_bytes, (layers.attention.query, layers.attention.key)))
    attention += sum(map(stored_bytes, (layers.attention.value, layers.attention.output)))
    feed_forward = layers.feed_forward
    experts = sum(map(stored_bytes, (feed_forward.gate, feed_forward.up, feed_forward.down)))
    missed = (1 - config.experts_per_token / config.num_experts) ** batch_size
    entry = 2 * config.num_layers * config.num_kv_heads * config.head_dim * cache_itemsize
    return StepBytes(
        attention=attention,
        experts=experts * (1 - missed),
        unembedding=stored_bytes(model.embedding.table),
        cache=entry * filled * batch_size,
    )


def stored_bytes(param: nnx.Variable) -> int:
    """Bytes of a parameter, scales included."""
    value = param.get_value()
    leaves = (value.weight, value.scales) if isinstance(value, QuantizedArray) else (value,)
    return sum(leaf.nbytes for leaf in leaves)


def token_operations(config: GrokConfig) -> float:
    """Multiplications and additions for one token, attention over the cache left out."""
    attention = 2 * config.model_dim * config.head_dim * (config.num_heads + config.num_kv_heads)
    experts = 3 * config.model_dim * config.ffn_dim * config.experts_per_token
    return 2.0 * (config.num_layers * (attention + experts) + config.model_dim * config.vocab_size)


def read_bandwidth(mesh: Mesh, num_bytes: int = 1 << 29) -> float:
    """Bytes a second at which all devices of the mesh together read arrays of `num_bytes` each, best of five sums."""
    shape = (mesh.size, num_bytes // 4)
    array = jnp.ones(shape, jnp.float32, device=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    return array.nbytes / min(seconds(lambda: total(array)) for _ in range(5))


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, its results waited for."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of some calls."""
    return statistics.median(seconds(run) for _ in range(repeats))


def environment() -> dict[str, object]:
    """Device and versions, for the JSON line."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def print_rows(title: str, rows: dict[str, str]) -> None:
    """A titled list of names and values."""
    print(title)
    for name, value in rows.items():
        print(f"  {name:<34} {value}")


def print_json(record: dict[str, object]) -> None:
    """The last line of every benchmark."""
    print(json.dumps(record))
