"""Attention over the cache on any device, in blocks of queries and of keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.cache import Entries
from grokjax.kernels.entries import CachePlace, read
from grokjax.kernels.slices import float_precision


def attend_in_blocks(
    query: jax.Array,
    keys: Entries,
    values: Entries,
    place: CachePlace,
    *,
    blocks: tuple[int, int],
    multiplier: float,
    softcap: float,
) -> tuple[jax.Array, jax.Array]:
    """`attention.attend` on any device: blocks of keys one after the other, with a running maximum and sum.

    They are taken up to the longest filled row, so the cost follows the filled length and no [T, S] matrix exists.
    Arguments are those of `attend`, and `blocks`, the queries and keys of one step.

    Returns:
      What `attend` returns, and the logarithms of the sums of each query's weights, float32 [P, K, G, T].

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867).
    """
    batch, num_new, _, _ = query.shape
    block = min(blocks[0], num_new)
    num_blocks = -(-num_new // block)
    padded = jnp.pad(query, ((0, 0), (0, num_blocks * block - num_new), (0, 0), (0, 0)))

    def run(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        queries = lax.dynamic_slice_in_dim(padded, i * block, block, axis=1)
        filled = jnp.max(place.start + jnp.minimum(place.count, (i + 1) * block))
        own = dataclasses.replace(place, start=place.start + i * block)
        return _attend_block(
            queries, keys, values, own, filled=filled, key_block=blocks[1], multiplier=multiplier, softcap=softcap
        )

    if num_blocks == 1:
        return run(jnp.zeros((), jnp.int32))
    out, log_totals = lax.map(
        run, jnp.arange(num_blocks, dtype=jnp.int32)
    )  # [blocks, P, block, N * H] and [blocks, P, K, G, block]
    log_totals = jnp.moveaxis(log_totals, 0, 3).reshape(*log_totals.shape[1:4], -1)
    return out.swapaxes(0, 1).reshape(batch, num_blocks * block, -1)[:, :num_new], log_totals[..., :num_new]


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
) -> tuple[jax.Array, jax.Array]:
    """Attention of a block of queries [P, T, N, H], the first at `place.start`, over `filled` entries."""
    batch, num_new, num_heads, head_dim = query.shape
    num_kv_heads, max_len = keys.shape[2:4]
    grouped = query.reshape(batch, num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)
    block = min(key_block, max_len)
    product = functools.partial(jnp.einsum, precision=float_precision(query.dtype), preferred_element_type=jnp.float32)
    capped = functools.partial(
        cap_scores, positions=query_positions(place, num_new), multiplier=multiplier, softcap=softcap
    )

    def add_keys(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, mixed = carry
        begin = jnp.minimum(i * block, max_len - block)  # the last block slides left and masks what was seen before
        block_of = functools.partial(read, place=place, begin=begin, size=block, dtype=query.dtype)
        (key, key_scales), (value, value_scales) = block_of(keys), block_of(values)
        scores = _scaled(product("btkgh,bksh->bkgts", grouped, key), key_scales)
        scores = capped(scores, begin=begin, unseen=i * block)
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
    peak, total, mixed = lax.fori_loop(0, -(-filled // block), add_keys, nothing)
    # A batch of empty rows runs no step at all: its total is 0 and its result, never read, is 0 too.
    total = jnp.maximum(total, 1e-30)
    out = mixed / total[..., None]  # [P, K, G, T, H]
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, num_new, num_heads * head_dim).astype(query.dtype)
    return out, peak + jnp.log(total)


def query_positions(place: CachePlace, num_new: int) -> jax.Array:
    """The positions of queries, int32 [P, 1, 1, T, 1], the first of each row at `place.start`."""
    positions = place.start[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None]
    return positions[:, None, None, :, None]


def cap_scores(
    scores: jax.Array,
    *,
    positions: jax.Array,
    begin: jax.Array,
    unseen: jax.Array,
    multiplier: float,
    softcap: float,
) -> jax.Array:
    """Scores of queries with a block of entries, capped, and -1e30 where a query does not see an entry.

    Args:
      scores: float32 [P, K, G, T, S], products.
      positions: int32 [P, 1, 1, T, 1], of the queries.
      begin: int32 [], position of the block's first entry.
      unseen: int32 [], position of the first entry that no block before had.
      multiplier: factor on the scores.
      softcap: c in `c * tanh(score / c)`.

    Returns:
      float32 [P, K, G, T, S].
    """
    scores = softcap * jnp.tanh(scores * (multiplier / softcap))
    entry = (begin + jnp.arange(scores.shape[-1], dtype=jnp.int32))[None, None, None, None]
    return jnp.where((entry <= positions) & (entry >= unseen), scores, -1e30)


def _scaled(scores: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Scores, or weights, [P, K, G, T, S] times the scales of the entries [P, K, S]."""
    return scores if scales is None else scores * scales[:, :, None, None]
