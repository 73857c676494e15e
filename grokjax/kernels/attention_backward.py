"""Attention backwards: weights are computed again, block by block, so that no [T, S] matrix exists."""

import dataclasses
import functools
from typing import Self

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
    (num_new, max_len), kv_heads = (query.shape[1], keys.shape[3]), keys.shape[2]
    dtype = product_dtype(query.dtype) if platform == "cpu" else query.dtype
    query_block, key_block = min(blocks[0], num_new), min(blocks[1], max_len)
    num_blocks = -(-num_new // query_block)
    product = functools.partial(jnp.einsum, precision=float_precision(dtype), preferred_element_type=jnp.float32)
    cap = functools.partial(cap_scores, multiplier=multiplier, softcap=softcap)
    queries = _Queries.of(query, saved, out, kv_heads, length=num_blocks * query_block, dtype=dtype)

    def add_queries(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        own = queries.block(i * query_block, query_block)
        positions = query_positions(dataclasses.replace(place, start=place.start + i * query_block), query_block)
        filled = jnp.max(place.start + jnp.minimum(place.count, (i + 1) * query_block))

        def add_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            of_query, of_keys, of_values = carry
            begin = jnp.minimum(j * key_block, max_len - key_block)  # as `attend_in_blocks` has it
            key, value = (read(part, place, begin=begin, size=key_block, dtype=dtype)[0] for part in (keys, values))
            scores = product("btkgh,bksh->bkgts", own.query, key)
            scores = cap(scores, positions=positions, begin=begin, unseen=j * key_block)
            weights = jnp.exp(scores - own.log_totals)
            slope = jnp.where(scores > -softcap - 1, 1 - (scores / softcap) ** 2, 0) * multiplier
            of_weights = product("btkgh,bksh->bkgts", own.out, value) - own.pulled
            of_scores = (weights * of_weights * slope).astype(dtype)
            block = functools.partial(_add_block, begin=begin)
            return (
                of_query + product("bkgts,bksh->btkgh", of_scores, key),
                block(of_keys, product("bkgts,btkgh->bksh", of_scores, own.query)),
                block(of_values, product("bkgts,btkgh->bksh", weights.astype(dtype), own.out)),
            )

        of_query, *of_entries = carry
        nothing = jnp.zeros(own.query.shape, jnp.float32)
        part, *of_entries = lax.fori_loop(0, -(-filled // key_block), add_keys, (nothing, *of_entries))
        return lax.dynamic_update_slice_in_dim(of_query, part, i * query_block, axis=1), *of_entries

    of_entries = jnp.zeros((query.shape[0], kv_heads, max_len, query.shape[3]), jnp.float32)
    nothing = (jnp.zeros(queries.query.shape, jnp.float32), of_entries, of_entries)
    of_query, of_keys, of_values = lax.fori_loop(0, num_blocks, add_queries, nothing)
    of_query = of_query[:, :num_new].reshape(query.shape).astype(query.dtype)
    return of_query, _placed(of_keys, keys, place), _placed(of_values, values, place), None


@dataclasses.dataclass(frozen=True)
class _Queries:
    """Queries, grouped by the kv head that they share, and what goes back through them.

    Attributes:
      query: [P, T, K, G, H].
      out: [P, T, K, G, H], the cotangent of the result.
      pulled: float32 [P, K, G, T], the products of the result and its cotangent; of a block, [P, K, G, T, 1].
      log_totals: float32, the logarithms of the sums of each query's weights, of the same shape.
    """

    query: jax.Array
    out: jax.Array
    pulled: jax.Array
    log_totals: jax.Array

    @classmethod
    def of(
        cls,
        query: jax.Array,
        saved: tuple[jax.Array, jax.Array],
        out: jax.Array,
        kv_heads: int,
        *,
        length: int,
        dtype: jnp.dtype,
    ) -> Self:
        """What `pull_in_blocks` is given, of `length` queries: zeros stand behind those that there are."""
        result, log_totals = saved
        (batch, num_new, num_heads, head_dim), room = query.shape, (0, length - query.shape[1])
        pulled = (out.astype(jnp.float32) * result.astype(jnp.float32)).reshape(query.shape)
        pulled = pulled.sum(axis=-1).reshape(batch, num_new, kv_heads, -1).transpose(0, 2, 3, 1)

        def grouped(x: jax.Array) -> jax.Array:
            x = x.reshape(batch, num_new, kv_heads, num_heads // kv_heads, head_dim)
            return jnp.pad(x, ((0, 0), room, (0, 0), (0, 0), (0, 0)))

        by_query = grouped(query.astype(dtype)), grouped(out.astype(dtype))
        by_score = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), room)) for x in (pulled, log_totals))
        return cls(*by_query, *by_score)

    def block(self, begin: jax.Array, size: int) -> Self:
        """The `size` queries from `begin` on."""
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=begin, slice_size=size)
        by_query = (cut(x, axis=1) for x in (self.query, self.out))
        by_score = (cut(x, axis=3)[..., None] for x in (self.pulled, self.log_totals))
        return type(self)(*by_query, *by_score)


def _add_block(of_entries: jax.Array, part: jax.Array, begin: jax.Array) -> jax.Array:
    """The cotangents of entries [P, K, S, H] with those of a block that begins at `begin` added."""
    old = lax.dynamic_slice_in_dim(of_entries, begin, part.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(of_entries, old + part, begin, axis=2)


def _placed(of_entries: jax.Array, stack: jax.Array, place: CachePlace) -> jax.Array:
    """The cotangent of a stack of entries, in which those of a place [P, K, S, H] lie in one layer."""
    rows = jnp.arange(stack.shape[1], dtype=jnp.int32) if place.rows is None else place.rows
    return jnp.zeros_like(stack).at[place.layer, rows].add(of_entries.astype(stack.dtype))
