"""Attention of new tokens over one layer of the cache: chooses the form for the device, and has that in blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.cache import Entries
from grokjax.kernels import attention_gpu, attention_tpu
from grokjax.kernels.cpu_features import product_dtype
from grokjax.kernels.entries import CachePlace, read
from grokjax.kernels.slices import float_precision


def attend(
    query: jax.Array,
    keys: Entries,
    values: Entries,
    place: CachePlace,
    *,
    multiplier: float,
    softcap: float,
    platform: str,
) -> jax.Array:
    """Causal attention of new tokens over one layer of a cache that holds them already.

    On TPUs a prefill is one kernel, on GPUs whatever `attention_gpu.fits`; all else is `attend_in_blocks`.

    Args:
      query: [P, T, N, H], after RoPE, in the compute dtype.
      keys: [L, B, K, S, H].
      values: [L, B, K, S, H].
      place: of the queries; results of those that are not real mean nothing.
      multiplier: factor on the scores.
      softcap: c in `c * tanh(score / c)`.
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      The compute dtype, [P, T, N * H].
    """
    if platform == "tpu" and attention_tpu.fits(query, keys):
        return attention_tpu.attend(query, keys, values, place, multiplier=multiplier, softcap=softcap)
    if platform == "gpu" and attention_gpu.fits(query, keys, softcap):
        return attention_gpu.attend(query, keys, values, place, multiplier=multiplier, softcap=softcap)
    batch, num_new, num_heads, _ = query.shape
    blocks = block_sizes(platform, batch * num_heads, num_new)
    cast = query.astype(product_dtype(query.dtype)) if platform == "cpu" else query
    out = attend_in_blocks(cast, keys, values, place, blocks=blocks, multiplier=multiplier, softcap=softcap)
    return out.astype(query.dtype)


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


def attend_in_blocks(
    query: jax.Array,
    keys: Entries,
    values: Entries,
    place: CachePlace,
    *,
    blocks: tuple[int, int],
    multiplier: float,
    softcap: float,
) -> jax.Array:
    """`attend` on any device: blocks of keys one after the other, with a running maximum and sum.

    They are taken up to the longest filled row, so the cost follows the filled length and no [T, S] matrix exists.
    Arguments and result are those of `attend`, and `blocks`, the queries and keys of one step.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867).
    """
    batch, num_new, _, _ = query.shape
    block = min(blocks[0], num_new)
    num_blocks = -(-num_new // block)
    padded = jnp.pad(query, ((0, 0), (0, num_blocks * block - num_new), (0, 0), (0, 0)))

    def run(i: jax.Array) -> jax.Array:
        queries = lax.dynamic_slice_in_dim(padded, i * block, block, axis=1)
        filled = jnp.max(place.start + jnp.minimum(place.count, (i + 1) * block))
        own = dataclasses.replace(place, start=place.start + i * block)
        return _attend_block(
            queries, keys, values, own, filled=filled, key_block=blocks[1], multiplier=multiplier, softcap=softcap
        )

    if num_blocks == 1:
        return run(jnp.zeros((), jnp.int32))
    out = lax.map(run, jnp.arange(num_blocks, dtype=jnp.int32))  # [blocks, P, block, N * H]
    return out.swapaxes(0, 1).reshape(batch, num_blocks * block, -1)[:, :num_new]


def _attend_block(
    query: jax.Array,
    keys: Entries,
    values: Entries,
    place: CachePlace,
    *,
    filled: jax.Array,
    key_block: int,
    multiplier: float,
    softcap: float,
) -> jax.Array:
    """Attention of a block of queries [P, T, N, H], the first at `place.start`, over `filled` entries."""
    batch, num_new, num_heads, head_dim = query.shape
    num_kv_heads, max_len = keys.shape[2:4]
    grouped = query.reshape(batch, num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)
    block = min(key_block, max_len)
    positions = place.start[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None]
    positions = positions[:, None, None, :, None]  # [P, 1, 1, T, 1]
    product = functools.partial(jnp.einsum, precision=float_precision(query.dtype), preferred_element_type=jnp.float32)

    def add_keys(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, mixed = carry
        begin = jnp.minimum(i * block, max_len - block)  # the last block slides left and masks what was seen before
        block_of = functools.partial(read, place=place, begin=begin, size=block, dtype=query.dtype)
        (key, key_scales), (value, value_scales) = block_of(keys), block_of(values)
        scores = _scaled(product("btkgh,bksh->bkgts", grouped, key), key_scales)
        scores = softcap * jnp.tanh(scores * (multiplier / softcap))
        entry = (begin + jnp.arange(block, dtype=jnp.int32))[None, None, None, None]
        scores = jnp.where((entry <= positions) & (entry >= i * block), scores, -1e30)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        part = product("bkgts,bksh->bkgth", _scaled(weights, value_scales).astype(query.dtype), value)
        return new_peak, total * decay + weights.sum(axis=-1), mixed * decay[..., None] + part

    shape = (batch, num_kv_heads, num_heads // num_kv_heads, num_new)
    nothing = (
        jnp.full(shape, -1e30, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    _, total, mixed = lax.fori_loop(0, -(-filled // block), add_keys, nothing)
    # A batch of empty rows runs no step at all: its total is 0 and its result, never read, is 0 too.
    out = mixed / jnp.maximum(total, 1e-30)[..., None]  # [P, K, G, T, H]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, num_new, num_heads * head_dim).astype(query.dtype)


def _scaled(scores: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Scores, or weights, [P, K, G, T, S] times the scales of the entries [P, K, S]."""
    return scores if scales is None else scores * scales[:, :, None, None]
