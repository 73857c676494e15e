"""Attention over the cache: of new tokens over one layer of it, and the module of a stack of layers."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.cache import CACHE_AXES, Entries
from grokjax.config import GrokConfig
from grokjax.kernels import attention_gpu, float_precision, matmul, matmuls, own_rows, product_dtype, read, write
from grokjax.model.layers import gather_embed, rotate, weight_param
from grokjax.quantization import Weight, specs
from grokjax.sharding import Partitioner

# A vector of a TPU; sizes that its kernel takes are multiples of it.
_LANES = 128


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
    platform: str = "cpu",
) -> jax.Array:
    """Causal attention of new tokens over one layer of a cache that holds them already.

    Blocks of keys are taken one after the other, up to the longest filled row, with a running maximum and sum, so the
    cost follows the filled length and no [T, S] matrix exists. On TPUs a prefill is one kernel (see `fused_attend`), on
    GPUs whatever `attention_gpu.fits`.

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
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      The compute dtype, [P, T, N * H].

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867).
    """
    if platform == "tpu" and fits_kernel(query, keys):
        return fused_attend(
            query, keys, values, layer=layer, rows=rows, start=start, multiplier=multiplier, softcap=softcap
        )
    if platform == "gpu" and attention_gpu.fits(query, keys, softcap):
        place: dict[str, Any] = {"layer": layer, "rows": rows, "start": start, "count": count}
        return attention_gpu.attend(query, keys, values, **place, multiplier=multiplier, softcap=softcap)
    batch, num_new, num_heads, _ = query.shape
    dtype = query.dtype
    if platform == "cpu":
        query = query.astype(product_dtype(dtype))
    query_block, key_block = block_sizes(platform, batch * num_heads, num_new)
    block = min(query_block, num_new)
    num_blocks = -(-num_new // block)
    padded = jnp.pad(query, ((0, 0), (0, num_blocks * block - num_new), (0, 0), (0, 0)))
    one_block = functools.partial(
        _attend_block,
        keys=keys,
        values=values,
        layer=layer,
        rows=rows,
        key_block=key_block,
        multiplier=multiplier,
        softcap=softcap,
    )

    def run(i: jax.Array) -> jax.Array:
        queries = lax.dynamic_slice_in_dim(padded, i * block, block, axis=1)
        filled = jnp.max(start + jnp.minimum(count, (i + 1) * block))
        return one_block(queries, first=start + i * block, filled=filled)

    if num_blocks == 1:
        return run(jnp.zeros((), jnp.int32)).astype(dtype)
    out = lax.map(run, jnp.arange(num_blocks))  # [blocks, B, block, N * H]
    return out.swapaxes(0, 1).reshape(batch, num_blocks * block, -1)[:, :num_new].astype(dtype)


def block_sizes(platform: str, num_heads: int, num_new: int) -> tuple[int, int]:
    """Queries and keys that one step of blocked attention handles.

    On CPUs their scores should stay in the caches. On TPUs, and on GPUs where there is no kernel, a step has a price of
    its own, some microseconds: there it is large, many keys of a single query, or scores of 32 MiB.

    Args:
      platform: "cpu", "gpu" or "tpu".
      num_heads: query heads of all rows, on one device.
      num_new: T, queries of each row.
    """
    if platform == "cpu":
        return 256, 256
    if num_new == 1:
        return 1, _power_of_two(2**18 // num_heads, 256, 2048)
    return _power_of_two(2**23 // (1024 * num_heads), 64, 1024), 1024


def _power_of_two(size: int, least: int, most: int) -> int:
    """The largest power of two up to `size`, kept between two others."""
    return min(max(1 << size.bit_length() - 1 if size else 1, least), most)


def _attend_block(
    query: jax.Array,
    keys: Entries,
    values: Entries,
    *,
    layer: jax.Array,
    rows: jax.Array | None,
    first: jax.Array,
    filled: jax.Array,
    key_block: int,
    multiplier: float,
    softcap: float,
) -> jax.Array:
    """Attention of a block of queries [B, T, N, H] at positions `first [B] + 0 ... T` over `filled` entries."""
    batch, num_new, num_heads, head_dim = query.shape
    num_kv_heads, max_len = keys.shape[2:4]
    grouped = query.reshape(batch, num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)
    block = min(key_block, max_len)
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


def fits_kernel(query: jax.Array, keys: Entries) -> bool:
    """Whether `fused_attend` takes these: bfloat16, a vector of queries at least, sizes in whole vectors."""
    (_, num_new, _, head_dim), max_len = query.shape, keys.shape[3]
    return query.dtype == jnp.bfloat16 and num_new >= _LANES and max_len % _LANES == 0 and head_dim % _LANES == 0


def fused_attend(
    query: jax.Array,
    keys: Entries,
    values: Entries,
    *,
    layer: jax.Array,
    rows: jax.Array | None = None,
    start: jax.Array,
    multiplier: float,
    softcap: float,
    interpret: bool = False,
) -> jax.Array:
    """`attend` as JAX's kernel for TPUs, row by row: scores, maxima and sums stay in the chip's fast memory.

    Blocks of keys behind a block of queries are neither fetched nor multiplied. The queries are scaled first, and so
    rounded to bfloat16 once more; the weights of the values are not rounded.

    Args:
      query: bfloat16 [P, T, N, H], after RoPE; H a multiple of 128.
      keys: [L, B, K, S, H]; S a multiple of 128.
      values: [L, B, K, S, H].
      layer: int32 [].
      rows: int32 [P]; all B in order by default.
      start: int32 [P].
      multiplier: factor on the scores.
      softcap: c in `c * tanh(score / c)`.
      interpret: run it as plain JAX, on any device.

    Returns:
      bfloat16 [P, T, N * H].

    Source: Dao et al., FlashAttention (arXiv 2205.14135); `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    # Imported where it is used: importing grokjax must not take the time, and other devices never need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask_info

    batch, num_new, num_heads, head_dim = query.shape
    max_len = keys.shape[3]
    query_block = min(512, -(-num_new // _LANES) * _LANES)
    key_block = math.gcd(max_len, 1024)
    padded = -(-num_new // query_block) * query_block
    query = (query.astype(jnp.float32) * multiplier).astype(query.dtype)
    query = jnp.pad(query.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - num_new), (0, 0)))

    def attend_row(i: jax.Array) -> jax.Array:
        positions: Any = start[i] + jnp.arange(padded)
        last = jnp.minimum(positions[query_block - 1 :: query_block], max_len - 1)[:, None] // key_block
        number = jnp.arange(max_len // key_block)[None]
        mask = splash_attention_mask_info.MaskInfo(
            data_next=jnp.minimum(number, last)[None],
            mask_next=None,
            block_mask=(number <= last).astype(jnp.int32)[None],
            partial_mask_blocks=None,
            q_sequence=positions,
        )
        kernel = splash_attention_kernel.SplashAttentionKernel(
            mask,
            None,
            None,
            is_mqa=False,
            block_sizes=splash_attention_kernel.BlockSizes(query_block, key_block),
            save_residuals=False,
            mask_value=-1e30,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=None,
            mask_function=lambda position, entry: entry <= position,
            interpret=interpret,
        )
        row = (i if rows is None else rows[i])[None]
        key, value = (_one_row(entries, layer, row, query.dtype) for entries in (keys, values))
        out: Any = kernel(query[i], key, value)
        return out

    out = lax.map(attend_row, jnp.arange(batch))  # [P, N, T, H]
    return out[:, :, :num_new].swapaxes(1, 2).reshape(batch, num_new, num_heads * head_dim)


def _one_row(stack: Entries, layer: jax.Array, row: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """All entries [K, S, H] of one row, int32 [1]."""
    zero = jnp.zeros((), jnp.int32)
    entries, scales = read(stack, layer=layer, rows=row, begin=zero, size=stack.shape[3], dtype=dtype)
    if scales is not None:
        entries = (entries.astype(jnp.float32) * scales[..., None]).astype(dtype)
    return entries[0]


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
        project: dict[str, Any] = {"at": (layer,), "platform": self.partitioner.platform}
        query, key, value = matmuls(x, (query_weight, key_weight, value_weight), **project)
        query = query.reshape(batch, num_new, -1, self.config.head_dim)
        query = rotate(query, positions, self.config.rope_base).astype(self.dtype)
        key = rotate(self._kv_heads(key), positions, self.config.rope_base)
        value = self._kv_heads(value)
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
            platform=self.partitioner.platform,
        )
        if is_held is not None:
            mixed = self.partitioner.psum(jnp.where(is_held[:, None, None], mixed, 0), "batch")
        out = self.partitioner.psum(matmul(mixed, output_weight, **project), "heads")
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
