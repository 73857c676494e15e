"""The parts of a decoder layer but the experts: RMSNorm, RoPE and attention, each for a stack of layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.cache import CACHE_AXES, Entries, own_rows, read, write
from grokjax.config import GrokConfig
from grokjax.quantization import QuantizedArray, Weight, float_precision, matmul, specs
from grokjax.sharding import Axes, Partitioner


def weight_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, *, dtype: DTypeLike, quantized: bool = False
) -> nnx.Param:
    """A random weight [L, ..., C, O] that keeps the scale of what it multiplies, its logical axes beside it.

    Plain weights are normal with deviation `C ** -0.5`; quantised ones are born as uniform int8 of that deviation.
    They are drawn layer by layer: the random words of a whole stack would take three times its memory.
    """
    deviation = shape[-2] ** -0.5
    if not quantized:

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, shape[1:], dtype) * jnp.asarray(deviation, dtype)

        return nnx.Param(lax.map(draw, jax.random.split(rngs.params(), shape[0])), logical_axes=axes)
    weight = lax.map(lambda key: _random_int8(key, shape[1:]), jax.random.split(rngs.params(), shape[0]))
    uniform_deviation = (127 * 128 / 3) ** 0.5  # of the integers -127 ... 127
    scales = jnp.full((*shape[:-2], 1, shape[-1]), deviation / uniform_deviation, jnp.bfloat16)
    return nnx.Param(QuantizedArray(weight, scales), logical_axes=axes)


def _random_int8(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform integers -127 ... 127, four from each random word: large models are made of many."""
    *lead, last = shape
    words = jax.random.bits(key, (*lead, -(-last // 4)), jnp.uint32)
    levels = lax.bitcast_convert_type(words, jnp.int8).reshape(*lead, -1)[..., :last]
    return jnp.maximum(levels, -127)


def gather_embed(param: nnx.Param, layer: jax.Array, partitioner: Partitioner) -> tuple[Weight, jax.Array]:
    """A stacked weight as a layer uses it: no dimension split by the `embed` rule.

    Without that rule this is the stack itself, to be indexed at its use; with it, one layer, cut out and gathered.

    Returns:
      The weight [L or 1, ...] and the index, int32 [], of the layer in it.
    """
    stack: Weight = param.get_value()
    if partitioner.rules.embed is None:
        return stack, layer
    split = specs(stack, param.logical_axes, partitioner)
    whole = specs(stack, param.logical_axes, partitioner.without_embed())

    def cut(stack: Weight, layer: jax.Array) -> Weight:
        one = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer), stack)
        return jax.tree.map(gather, one, split, whole)

    def gather(leaf: jax.Array, split: PartitionSpec, whole: PartitionSpec) -> jax.Array:
        dimensions = [i for i, names in enumerate(zip(split, whole, strict=True)) if names[0] != names[1]]
        return partitioner.all_gather(leaf, "embed", dimension=dimensions[0]) if dimensions else leaf

    # A mere constraint on the layer would spread to the stack, and all layers would be gathered at once.
    run = partitioner.shard_map(cut, in_specs=(split, PartitionSpec()), out_specs=whole)
    return run(stack, layer), jnp.zeros((), jnp.int32)


class RMSNorm(nnx.Module):
    """Scales vectors [..., D] to unit root mean square, then by a learnt factor; in float32 inside."""

    def __init__(self, config: GrokConfig, *, num_layers: int | None = None):
        stack = () if num_layers is None else (num_layers,)
        axes: Axes = (None,) if num_layers is None else ("layers", None)
        self.epsilon = config.norm_eps
        self.scale = nnx.Param(jnp.ones((*stack, config.model_dim), jnp.float32), logical_axes=axes)

    def __call__(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """Normalises x [..., D]; `layer`, int32 [], picks the factor where the norm is stacked."""
        scale = self.scale[...]
        if layer is not None:
            scale = lax.dynamic_index_in_dim(scale, layer, keepdims=False)
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (wide * lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding in float32, pairing the first half of the features with the second.

    Args:
      x: float32 [B, T, heads, H].
      positions: int32 [B, T].
      base: of the geometric sequence of wavelengths.

    Returns:
      float32 [B, T, heads, H].

    Source: Su et al., RoFormer (arXiv 2104.09864), in the half-split form of GPT-NeoX.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    phases = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]  # [B, T, 1, H / 2]
    cos, sin = jnp.cos(phases), jnp.sin(phases)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# Keys, and queries, that one step of blocked attention handles: bounds the score matrix in memory.
KEY_BLOCK = 256
QUERY_BLOCK = 256


def attend(
    query: jax.Array,
    keys: Entries,
    values: Entries,
    *,
    layer: jax.Array,
    rows: jax.Array | None = None,
    start: jax.Array,
    count: jax.Array,
    multiplier: float,
    softcap: float,
) -> jax.Array:
    """Causal attention of new tokens over one layer of a cache that holds them already.

    Blocks of keys are taken one after the other, up to the longest filled row, with a running maximum and sum, so the
    cost follows the filled length and no [T, S] matrix exists.

    Args:
      query: [P, T, N, H], after RoPE, in the compute dtype.
      keys: [L, B, K, S, H].
      values: [L, B, K, S, H].
      layer: int32 [], which layer of the cache.
      rows: int32 [P], rows of the cache that the queries belong to; all B in order by default.
      start: int32 [P], position of each row's first query.
      count: int32 [P], real queries of each row; the others' results mean nothing.
      multiplier: factor on the scores.
      softcap: c in `c * tanh(score / c)`.

    Returns:
      The compute dtype, [P, T, N * H].

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867).
    """
    batch, num_new, _, _ = query.shape
    block = min(QUERY_BLOCK, num_new)
    num_blocks = -(-num_new // block)
    padded = jnp.pad(query, ((0, 0), (0, num_blocks * block - num_new), (0, 0), (0, 0)))
    one_block = functools.partial(
        _attend_block, keys=keys, values=values, layer=layer, rows=rows, multiplier=multiplier, softcap=softcap
    )

    def run(i: jax.Array) -> jax.Array:
        queries = lax.dynamic_slice_in_dim(padded, i * block, block, axis=1)
        filled = jnp.max(start + jnp.minimum(count, (i + 1) * block))
        return one_block(queries, first=start + i * block, filled=filled)

    if num_blocks == 1:
        return run(jnp.zeros((), jnp.int32))
    out = lax.map(run, jnp.arange(num_blocks))  # [blocks, B, block, N * H]
    return out.swapaxes(0, 1).reshape(batch, num_blocks * block, -1)[:, :num_new]


def _attend_block(
    query: jax.Array,
    keys: Entries,
    values: Entries,
    *,
    layer: jax.Array,
    rows: jax.Array | None,
    first: jax.Array,
    filled: jax.Array,
    multiplier: float,
    softcap: float,
) -> jax.Array:
    """Attention of a block of queries [B, T, N, H] at positions `first [B] + 0 ... T` over `filled` entries."""
    batch, num_new, num_heads, head_dim = query.shape
    num_kv_heads, max_len = keys.shape[2:4]
    grouped = query.reshape(batch, num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)
    block = min(KEY_BLOCK, max_len)
    positions = (first[:, None] + jnp.arange(num_new)[None])[:, None, None, :, None]  # [B, 1, 1, T, 1]
    precision = float_precision(query.dtype)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        peak, total, mixed = carry
        begin = jnp.minimum(i * block, max_len - block)  # the last block slides left and masks what was seen before
        block_of = functools.partial(read, layer=layer, rows=rows, begin=begin, size=block, dtype=query.dtype)
        (key, key_scales), (value, value_scales) = block_of(keys), block_of(values)
        scores = jnp.einsum("btkgh,bksh->bkgts", grouped, key, precision=precision, preferred_element_type=jnp.float32)
        scores = _scaled(scores, key_scales)
        scores = softcap * jnp.tanh(scores * (multiplier / softcap))
        entry = (begin + jnp.arange(block))[None, None, None, None]
        scores = jnp.where((entry <= positions) & (entry >= i * block), scores, -1e30)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        part = jnp.einsum(
            "bkgts,bksh->bkgth",
            _scaled(weights, value_scales).astype(query.dtype),
            value,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return new_peak, total * decay + weights.sum(axis=-1), mixed * decay[..., None] + part

    shape = (batch, num_kv_heads, num_heads // num_kv_heads, num_new)
    empty = (
        jnp.full(shape, -1e30, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    _, total, mixed = lax.fori_loop(0, -(-filled // block), step, empty)
    # A batch of empty rows runs no step at all: its total is 0 and its result, never read, is 0 too.
    out = mixed / jnp.maximum(total, 1e-30)[..., None]  # [B, K, G, T, H]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, num_new, num_heads * head_dim).astype(query.dtype)


def _scaled(scores: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Scores, or weights, [B, K, G, T, S] times the scales of the entries [B, K, S]."""
    return scores if scales is None else scores * scales[:, :, None, None]


class Attention(nnx.Module):
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
        slot: jax.Array,
        rows: jax.Array | None = None,
        start: jax.Array,
        count: jax.Array,
    ) -> tuple[jax.Array, Entries, Entries]:
        """Writes the new tokens' keys and values into the cache and attends.

        Args:
          x: [P, T, D] in the compute dtype.
          keys: [L, B, K, S, H], the cache's.
          values: [L, B, K, S, H], the cache's.
          layer: int32 [], which layer's weights.
          slot: int32 [], which layer of the cache.
          rows: int32 [P], rows of the cache that x belongs to, each once; all B in order by default.
          start: int32 [P], filled entries before.
          count: int32 [P], real new tokens of each row.

        Returns:
          The output [P, T, D] in the compute dtype, and the cache's keys and values.
        """
        partitioner = self.partitioner.without_embed()
        params = (self.query, self.key, self.value, self.output)
        weights, indices = zip(*(gather_embed(param, layer, self.partitioner) for param in params), strict=True)
        weight_specs = tuple(specs(w, p.logical_axes, partitioner) for w, p in zip(weights, params, strict=True))
        cache = jax.tree.map(lambda leaf: partitioner.spec(CACHE_AXES[: leaf.ndim], leaf.shape), keys)
        # Rows that may lie on any device are whole on all: each attends for those whose entries it holds.
        whole = PartitionSpec()
        row = partitioner.spec(("batch",), x.shape[:1]) if rows is None else whole
        run = partitioner.shard_map(
            functools.partial(self._local, num_rows=keys.shape[1]),
            in_specs=(row, weight_specs, cache, cache, whole, whole, whole, row, row),
            out_specs=(row, cache, cache),
        )
        return run(x, weights, keys, values, indices[0], slot, rows, start, count)

    def _local(
        self,
        x: jax.Array,
        weights: tuple[Weight, ...],
        keys: Entries,
        values: Entries,
        layer: jax.Array,
        slot: jax.Array,
        rows: jax.Array | None,
        start: jax.Array,
        count: jax.Array,
        *,
        num_rows: int,
    ) -> tuple[jax.Array, Entries, Entries]:
        """One device's heads, and its rows of the cache's `num_rows`."""
        batch, num_new, _ = x.shape
        query_weight, key_weight, value_weight, output_weight = weights
        positions = start[:, None] + jnp.arange(num_new)[None]
        query = matmul(x, query_weight, at=(layer,)).reshape(batch, num_new, -1, self.config.head_dim)
        query = rotate(query, positions, self.config.rope_base).astype(self.dtype)
        key = rotate(self._kv_heads(matmul(x, key_weight, at=(layer,))), positions, self.config.rope_base)
        value = self._kv_heads(matmul(x, value_weight, at=(layer,)))
        is_held = None
        if rows is not None and keys.shape[1] < num_rows:
            rows, is_held = own_rows(rows, keys.shape[1], self.partitioner)
            start, count = jnp.where(is_held, start, 0), jnp.where(is_held, count, 0)
        place: dict[str, Any] = {"layer": slot, "rows": rows, "start": start, "count": count}
        with jax.named_scope("cache_write"):
            keys = write(keys, key.astype(self.dtype).swapaxes(1, 2), **place)
            values = write(values, value.astype(self.dtype).swapaxes(1, 2), **place)
        mixed = attend(
            query,
            keys,
            values,
            **place,
            multiplier=self.config.attention_multiplier,
            softcap=self.config.attention_softcap,
        )
        if is_held is not None:
            mixed = self.partitioner.psum(jnp.where(is_held[:, None, None], mixed, 0), "batch")
        out = self.partitioner.psum(matmul(mixed, output_weight, at=(layer,)), "heads")
        return out.astype(self.dtype), keys, values

    def _kv_heads(self, features: jax.Array) -> jax.Array:
        """This device's kv heads, [B, T, K, H], from its part of their features, [B, T, ...]."""
        batch, num_new, _ = features.shape
        copies = self.partitioner.kv_copies(self.config)
        if copies > 1:
            features = self.partitioner.all_gather(features, "kv_heads", dimension=2)
            own = self.partitioner.index("kv_heads") // copies
            features = lax.dynamic_slice_in_dim(features, own * self.config.head_dim, self.config.head_dim, axis=2)
        return features.reshape(batch, num_new, -1, self.config.head_dim)
