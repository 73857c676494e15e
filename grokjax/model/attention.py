"""The attention of a stack of layers: its projections, and the cache that it writes to and attends over."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.cache import CACHE_AXES, Entries
from grokjax.config import GrokConfig
from grokjax.kernels import CachePlace, attend, matmul, matmuls, own_place, write
from grokjax.model.base import Module
from grokjax.model.contexts import in_any_context
from grokjax.model.layers import rotate
from grokjax.model.probes import UNPROBED, Probe
from grokjax.model.weights import LayerWeights, weight_param
from grokjax.quantization import Weight
from grokjax.sharding import Partitioner

_INNER_SITES = ("attention.query", "attention.key", "attention.value", "attention.heads")
_WHOLE: Any = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class _Specs:
    """How what attention is given is divided.

    Attributes:
      row: of the tokens, and of all that has a number for each row.
      cache: of its keys and values.
      place: of the tokens' place in it.
    """

    row: Any
    cache: Any
    place: Any

    @classmethod
    def of(cls, x: jax.Array, keys: Entries, place: CachePlace, partitioner: Partitioner) -> Self:
        """For tokens [P, T, D] and the keys of a cache."""
        cache = jax.tree.map(lambda leaf: partitioner.spec(CACHE_AXES[: leaf.ndim], leaf.shape), keys)
        # Rows that may lie on any device are whole on all: each attends for those whose entries it holds.
        row: Any = partitioner.spec(("batch",), x.shape[:1]) if place.rows is None else _WHOLE
        return cls(row, cache, CachePlace(layer=_WHOLE, rows=_WHOLE, start=row, count=row))


class Attention(Module):
    """Grouped-query attention with RoPE and capped scores, for a stack of layers.

    Parameters: query [L, D, N * H], key and value [L, D, K * H], output [L, N * H, D].
    """

    def __init__(
        self, config: GrokConfig, *, dtype: DTypeLike, quantized: bool, partitioner: Partitioner, rngs: nnx.Rngs
    ):
        self.config, self.dtype, self.partitioner = config, jnp.dtype(dtype), partitioner
        layers, dim = config.num_layers, config.model_dim
        features, kv_features = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        weight = functools.partial(weight_param, rngs, dtype=dtype, quantized=quantized)
        self.query = weight((layers, dim, features), ("layers", "embed", "heads"))
        self.key = weight((layers, dim, kv_features), ("layers", "embed", "kv_heads"))
        self.value = weight((layers, dim, kv_features), ("layers", "embed", "kv_heads"))
        self.output = weight((layers, features, dim), ("layers", "heads", "embed"))

    def __call__(
        self,
        x: jax.Array,
        keys: Entries,
        values: Entries,
        *,
        layer: jax.Array,
        place: CachePlace,
        probe: Probe = UNPROBED,
    ) -> tuple[jax.Array, Entries, Entries]:
        """Writes the new tokens' keys and values into the cache and attends.

        Args:
          x: [P, T, D] in the compute dtype.
          keys: [L, B, K, S, H], the cache's.
          values: [L, B, K, S, H], the cache's.
          layer: int32 [], which layer's weights.
          place: of the tokens in the cache.
          probe: reads and changes queries, keys, values and heads.

        Returns:
          The output [P, T, D] in the compute dtype, and the cache's keys and values.
        """
        partitioner = self.partitioner.without_embed()
        specs = _Specs.of(x, keys, place, partitioner)
        if probe.is_at(*_INNER_SITES):
            return self._attend_in_parts(x, keys, values, layer=layer, place=place, probe=probe, specs=specs)
        weights = LayerWeights.of((self.query, self.key, self.value, self.output), layer, self.partitioner)
        project, output = self._project, self._output_locally
        mix = functools.partial(self._mix_locally, num_rows=keys.shape[1])

        def attend_locally(
            x: jax.Array, weights: tuple[Weight, ...], keys: Entries, values: Entries, layer: jax.Array, place: Any
        ) -> tuple[jax.Array, Entries, Entries]:
            mixed, keys, values = mix(*project(x, weights[:3], layer, place.start), keys, values, place)
            return output(mixed, weights[3], layer), keys, values

        run = partitioner.shard_map(
            attend_locally,
            in_specs=(specs.row, weights.partition_specs, specs.cache, specs.cache, _WHOLE, specs.place),
            out_specs=(specs.row, specs.cache, specs.cache),
        )
        return run(x, weights.stacks, keys, values, weights.layer, place)

    def _attend_in_parts(
        self,
        x: jax.Array,
        keys: Entries,
        values: Entries,
        *,
        layer: jax.Array,
        place: CachePlace,
        probe: Probe,
        specs: "_Specs",
    ) -> tuple[jax.Array, Entries, Entries]:
        """The same in three parts: what a probe is given is whole, so each part ends where there is a site."""
        weights = LayerWeights.of((self.query, self.key, self.value), layer, self.partitioner)
        partitioner, row, cache = self.partitioner.without_embed(), specs.row, specs.cache
        lead = (*(row or (None,)), None)
        heads = PartitionSpec(*lead, *partitioner.spec(("heads",), (self.config.num_heads,)))
        kv_heads = PartitionSpec(*lead, *partitioner.spec(("kv_heads",), keys.shape[2:3]))
        run = partitioner.shard_map(
            self._project,
            in_specs=(row, weights.partition_specs, _WHOLE, row),
            out_specs=(heads, kv_heads, kv_heads),
        )
        query, key, value = run(x, weights.stacks, weights.layer, place.start)
        query = probe.at("attention.query", query)
        key = self._at_kv_heads(probe, "attention.key", key.astype(self.dtype))
        value = self._at_kv_heads(probe, "attention.value", value.astype(self.dtype))
        run = partitioner.shard_map(
            functools.partial(self._mix_locally, num_rows=keys.shape[1]),
            in_specs=(heads, kv_heads, kv_heads, cache, cache, specs.place),
            out_specs=(heads, cache, cache),
        )
        mixed, keys, values = run(query, key, value, keys, values, place)
        split = mixed.reshape(*mixed.shape[:2], -1, self.config.head_dim)
        return self.join_heads(probe.at("attention.heads", split), layer=layer), keys, values

    @in_any_context
    def join_heads(self, heads: jax.Array, *, layer: jax.Array) -> jax.Array:
        """The output projection of what the heads have mixed.

        Args:
          heads: [P, T, N, H] in the compute dtype.
          layer: int32 [], which layer's weights.

        Returns:
          [P, T, D] in the compute dtype.
        """
        weights = LayerWeights.of((self.output,), layer, self.partitioner)
        partitioner = self.partitioner.without_embed()
        rows = partitioner.spec(("batch", None, "heads", None), heads.shape)
        run = partitioner.shard_map(
            self._output_locally,
            in_specs=(PartitionSpec(*rows[:3]), *weights.partition_specs, _WHOLE),
            out_specs=PartitionSpec(*rows[:1]),
        )
        return run(heads.reshape(*heads.shape[:2], -1), *weights.stacks, weights.layer)

    def _at_kv_heads(self, probe: Probe, site: str, x: jax.Array) -> jax.Array:
        """Keys or values past a site that has each kv head once, however many devices hold it."""
        if not probe.is_at(site):
            return x
        copies = self.partitioner.kv_copies(self.config)
        return jnp.repeat(probe.at(site, x[:, :, ::copies]), copies, axis=2)

    def _mix_locally(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        keys: Entries,
        values: Entries,
        place: CachePlace,
        *,
        num_rows: int,
    ) -> tuple[jax.Array, Entries, Entries]:
        """What one device's heads make of its rows of the cache's `num_rows`, [P, T, N * H]."""
        is_held = None
        if place.rows is not None and keys.shape[1] < num_rows:
            place, is_held = own_place(place, keys.shape[1], self.partitioner)
        platform = self.partitioner.platform
        with jax.named_scope("cache_write"):
            keys = write(keys, key.astype(self.dtype).swapaxes(1, 2), place, platform=platform)
            values = write(values, value.astype(self.dtype).swapaxes(1, 2), place, platform=platform)
        mixed = attend(
            query,
            keys,
            values,
            place,
            multiplier=self.config.attention_multiplier,
            softcap=self.config.attention_softcap,
            platform=platform,
        )
        if is_held is not None:
            mixed = self.partitioner.psum(jnp.where(is_held[:, None, None], mixed, 0), "batch")
        return mixed, keys, values

    def _output_locally(self, mixed: jax.Array, weight: Weight, layer: jax.Array) -> jax.Array:
        """The output [P, T, D] of what the heads have mixed, one device's share of them."""
        out = matmul(mixed, weight, at=(layer,), platform=self.partitioner.platform)
        return self.partitioner.psum(out, "heads").astype(self.dtype)

    def _project(
        self, x: jax.Array, weights: tuple[Weight, ...], layer: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [P, T, N, H] in the compute dtype, keys and values, float32 [P, T, K, H]; RoPE from `start` [P]."""
        batch, num_new, _ = x.shape
        positions = start[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None]
        query, key, value = matmuls(x, weights, at=(layer,), platform=self.partitioner.platform)
        query = query.reshape(batch, num_new, -1, self.config.head_dim)
        query = rotate(query, positions, self.config.rope_base).astype(self.dtype)
        key = rotate(self._kv_heads(key), positions, self.config.rope_base)
        return query, key, self._kv_heads(value)

    def _kv_heads(self, features: jax.Array) -> jax.Array:
        """This device's kv heads, [B, T, K, H], from its part of their features, [B, T, ...]."""
        batch, num_new, _ = features.shape
        copies = self.partitioner.kv_copies(self.config)
        if copies > 1:
            features = self.partitioner.all_gather(features, "kv_heads", dimension=2)
            own = self.partitioner.index("kv_heads") // copies
            features = lax.dynamic_slice_in_dim(features, own * self.config.head_dim, self.config.head_dim, axis=2)
        return features.reshape(batch, num_new, -1, self.config.head_dim)
