"""Attention backwards: weights are computed again, block by block, so that no [T, S] matrix exists."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.cache import Entries, QuantizedEntries
from grokjax.kernels.attention_blocks import cap_scores, query_positions
from grokjax.kernels.cpu_features import product_dtype
from grokjax.kernels.entries import CachePlace, read
from grokjax.kernels.slices import float_precision


def pull_in_blocks(
    operands: tuple[jax.Array, Entries, Entries, CachePlace],
    saved: tuple[jax.Array, jax.Array],
    out: jax.Array,
    *,
    blocks: tuple[int, int],
    platform: str,
    multiplier: float,
    softcap: float,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """The cotangents of attention's query, keys and values.

    Args:
      operands: query, keys, values and place.
      saved: the result [P, T, N * H], and the logarithms of the sums of each query's weights [P, K, G, T].
      out: [P, T, N * H], the cotangent of the result.
      blocks: queries and keys of one step.
      platform: "cpu", "gpu" or "tpu", where it will run.
      multiplier: factor on the scores.
      softcap: c in `c * tanh(score / c)`.

    Source: Dao et al., FlashAttention (arXiv 2205.14135).
    """
    query, keys, values, place = operands
    assert not isinstance(keys, QuantizedEntries)
    assert not isinstance(values, QuantizedEntries)
    (batch, num_new, num_heads, head_dim), (kv_heads, max_len) = query.shape, keys.shape[2:4]
    dtype = product_dtype(query.dtype) if platform == "cpu" else query.dtype
    query_block, key_block = min(blocks[0], num_new), min(blocks[1], max_len)
    num_blocks = -(-num_new // query_block)
    product = functools.partial(jnp.einsum, precision=float_precision(dtype), preferred_element_type=jnp.float32)

    def grouped(x: jax.Array) -> jax.Array:
        """[P, T, N * H] as [P, T, K, G, H], with as many queries as there is room for in the blocks."""
        x = x.reshape(batch, num_new, kv_heads, num_heads // kv_heads, head_dim)
        return jnp.pad(x, ((0, 0), (0, num_blocks * query_block - num_new), (0, 0), (0, 0), (0, 0)))

    result, log_totals = saved
    pulled = (out.astype(jnp.float32) * result.astype(jnp.float32)).reshape(batch, num_new, num_heads, head_dim)
    pulled = pulled.sum(axis=-1).reshape(batch, num_new, kv_heads, -1).transpose(0, 2, 3, 1)  # [P, K, G, T]
    room = ((0, 0), (0, 0), (0, 0), (0, num_blocks * query_block - num_new))
    by_query = grouped(query.astype(dtype)), grouped(out.astype(dtype))
    by_score = jnp.pad(pulled, room), jnp.pad(log_totals, room)

    def add_queries(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=i * query_block, slice_size=query_block)
        own_query, own_out = (cut(x, axis=1) for x in by_query)
        own_pulled, own_log_totals = (cut(x, axis=3)[..., None] for x in by_score)
        own = dataclasses.replace(place, start=place.start + i * query_block)
        positions = query_positions(own, query_block)
        filled = jnp.max(place.start + jnp.minimum(place.count, (i + 1) * query_block))

        def add_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            of_query, of_keys, of_values = carry
            begin = jnp.minimum(j * key_block, max_len - key_block)  # as `attend_in_blocks` has it
            key, value = (read(part, place, begin=begin, size=key_block, dtype=dtype)[0] for part in (keys, values))
            scores = cap_scores(
                product("btkgh,bksh->bkgts", own_query, key),
                positions=positions,
                begin=begin,
                unseen=j * key_block,
                multiplier=multiplier,
                softcap=softcap,
            )
            weights = jnp.exp(scores - own_log_totals)
            slope = jnp.where(scores > -softcap - 1, 1 - (scores / softcap) ** 2, 0) * multiplier
            of_weights = product("btkgh,bksh->bkgts", own_out, value) - own_pulled
            of_scores = (weights * of_weights * slope).astype(dtype)
            block = functools.partial(_add_block, begin=begin)
            return (
                of_query + product("bkgts,bksh->btkgh", of_scores, key),
                block(of_keys, product("bkgts,btkgh->bksh", of_scores, own_query)),
                block(of_values, product("bkgts,btkgh->bksh", weights.astype(dtype), own_out)),
            )

        of_query, *of_entries = carry
        nothing = jnp.zeros(own_query.shape, jnp.float32)
        part, *of_entries = lax.fori_loop(0, -(-filled // key_block), add_keys, (nothing, *of_entries))
        return lax.dynamic_update_slice_in_dim(of_query, part, i * query_block, axis=1), *of_entries

    of_entries = jnp.zeros((batch, kv_heads, max_len, head_dim), jnp.float32)
    nothing = (jnp.zeros(by_query[0].shape, jnp.float32), of_entries, of_entries)
    of_query, of_keys, of_values = lax.fori_loop(0, num_blocks, add_queries, nothing)
    of_query = of_query[:, :num_new].reshape(query.shape).astype(query.dtype)
    return of_query, _placed(of_keys, keys, place), _placed(of_values, values, place), None


def _add_block(of_entries: jax.Array, part: jax.Array, begin: jax.Array) -> jax.Array:
    """The cotangents of entries [P, K, S, H] with those of a block that begins at `begin` added."""
    old = lax.dynamic_slice_in_dim(of_entries, begin, part.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(of_entries, old + part, begin, axis=2)


def _placed(of_entries: jax.Array, stack: jax.Array, place: CachePlace) -> jax.Array:
    """The cotangent of a stack of entries, in which those of a place [P, K, S, H] lie in one layer."""
    rows = jnp.arange(stack.shape[1], dtype=jnp.int32) if place.rows is None else place.rows
    return jnp.zeros_like(stack).at[place.layer, rows].add(of_entries.astype(stack.dtype))
