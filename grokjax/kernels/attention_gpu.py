"""Attention over the cache on GPUs, a kernel in Triton: JAX has none that knows the cap of the scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.cache import Entries
from grokjax.kernels.matmul_gpu import has_safe_offsets, tile_rows

# Keys that one step handles, and programs that keep the multiprocessors of the largest GPUs busy.
_KEYS, _PROGRAMS = 64, 256
# Largest cap c of the scores. Weights `exp(score - c)` are 1e-26 and more with it; times the scale of an int8 value,
# that is far from the smallest number, 1e-38, of float32 and bfloat16.
_LARGEST_CAP = 30


def fits(query: jax.Array, keys: Entries, softcap: float) -> bool:
    """Whether `attend` takes these: bfloat16 queries, bfloat16 or int8 entries, sizes for its tiles, a usual cap."""
    head_dim, max_len = query.shape[-1], keys.shape[3]
    types = query.dtype == jnp.bfloat16 and keys.dtype in (jnp.bfloat16, jnp.int8)
    is_safe = all(has_safe_offsets(leaf) for leaf in jax.tree.leaves(keys))
    return types and is_safe and head_dim in (64, 128) and max_len >= _KEYS and softcap <= _LARGEST_CAP


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
    interpret: bool = False,
) -> jax.Array:
    """Causal attention as `attention.attend` has it, with scores and sums in registers.

    A program has some queries of the heads that share a kv head, and walks over their keys; where there are few
    programs, the keys are shared out to several, and their sums are added. The cap bounds the scores, so weights are
    `exp(score - c)`, without a search for the largest score.

    Args:
      query: bfloat16 [P, T, N, H], after RoPE; H 64 or 128.
      keys: bfloat16 or int8 [L, B, K, S, H]; S at least 64.
      values: [L, B, K, S, H], of the same dtype.
      layer: int32 [], which layer of the cache.
      rows: int32 [P], rows of the cache that the queries belong to; all B in order by default.
      start: int32 [P], position of each row's first query.
      count: int32 [P], real queries of each row; the others' results mean nothing.
      multiplier: factor on the scores.
      softcap: c in `c * tanh(score / c)`, at most 30.
      interpret: run it as plain JAX, on any device.

    Returns:
      bfloat16 [P, T, N * H].

    Source: Dao et al., FlashAttention (arXiv 2205.14135); Dao et al., Flash-Decoding for long-context inference.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, num_new, num_heads, head_dim = query.shape
    kv_heads, max_len = keys.shape[2:4]
    group = num_heads // kv_heads
    tile = tile_rows(num_new * group)
    packed = query.reshape(batch, num_new, kv_heads, group, head_dim).swapaxes(1, 2)
    packed = packed.reshape(batch * kv_heads, num_new * group, head_dim)
    packed = jnp.pad(packed, ((0, 0), (0, -num_new * group % tile), (0, 0)))
    tiles = packed.shape[1] // tile
    splits = choose_num_splits(max_len, programs=batch * kv_heads * tiles)
    whole = [jnp.arange(batch) if rows is None else rows, start, count, layer.reshape(1)]
    entries = [*jax.tree.leaves(keys), *jax.tree.leaves(values)]
    kernel = functools.partial(
        _attend_tile,
        kv_heads=kv_heads,
        group=group,
        splits=splits,
        multiplier=multiplier,
        softcap=softcap,
    )
    shape = (splits, *packed.shape)
    mixed, total = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:-1], jnp.float32)],
        grid=(batch * kv_heads, tiles, splits),  # the last queries, which have most keys, come first
        in_specs=[
            pl.BlockSpec((1, tile, head_dim), lambda head, i, _: (head, tiles - 1 - i, 0)),
            *(pl.BlockSpec(array.shape, lambda *_, rank=array.ndim: (0,) * rank) for array in whole + entries),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, tile, head_dim), lambda head, i, split: (split, head, tiles - 1 - i, 0)),
            pl.BlockSpec((1, 1, tile), lambda head, i, split: (split, head, tiles - 1 - i)),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3 if tile <= 16 else 2),
        interpret=interpret,
        name="attend",
    )(packed, *[array.astype(jnp.int32) for array in whole], *entries)
    # A row without any keys has the total 0; its result, never read, is 0 too.
    out = mixed.sum(axis=0) / jnp.maximum(total.sum(axis=0), jnp.finfo(jnp.float32).tiny)[..., None]
    out = out.astype(query.dtype)[:, : num_new * group].reshape(batch, kv_heads, num_new, group * head_dim)
    return out.swapaxes(1, 2).reshape(batch, num_new, num_heads * head_dim)


def choose_num_splits(max_len: int, *, programs: int) -> int:
    """Programs that share the keys of a tile of queries: a power of two, each with 128 keys or more of a full row.

    Args:
      max_len: S, keys of a full row.
      programs: that there are for all keys, one for each tile and kv head.
    """
    most = max(1, min(_PROGRAMS // programs, max_len // (2 * _KEYS)))
    return 1 << most.bit_length() - 1


def _attend_tile(
    query_ref: Any,
    rows_ref: Any,
    start_ref: Any,
    count_ref: Any,
    layer_ref: Any,
    *entries_and_outs: Any,
    kv_heads: int,
    group: int,
    splits: int,
    multiplier: float,
    softcap: float,
) -> None:
    """The weighted sum of values of one tile of queries over the keys of one split, and the sum of the weights."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *entries, mixed_ref, total_ref = entries_and_outs
    (keys_ref, *key_scales), (values_ref, *value_scales) = (
        entries[: len(entries) // 2],
        entries[len(entries) // 2 :],
    )
    number, head = pl.program_id(0) // kv_heads, pl.program_id(0) % kv_heads
    place = (layer_ref[0], rows_ref[number], head)
    tile, max_len = query_ref.shape[1], keys_ref.shape[3]
    first = (pl.num_programs(1) - 1 - pl.program_id(1)) * tile
    start = start_ref[number]
    positions = start + (first + jnp.arange(tile)) // group
    count = count_ref[number]
    filled = jnp.where(count > 0, start + jnp.minimum((first + tile - 1) // group + 1, count), 0)
    num_blocks = (filled + _KEYS - 1) // _KEYS
    share = (num_blocks + splits - 1) // splits
    query = query_ref[0]

    def add_keys(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, mixed = carry
        begin = jnp.minimum(i * _KEYS, max_len - _KEYS)  # the last block slides left and masks what was seen before
        these = (*place, pl.ds(begin, _KEYS))
        scores = triton.dot(query, keys_ref[(*these, slice(None))].astype(query.dtype).T)
        for scales_ref in key_scales:
            scores = scores * scales_ref[these][None]
        # score - c for score = c * tanh(x) is -2 c / (exp(2 x) + 1).
        scores = -2 * softcap / (jnp.exp(scores * (2 * multiplier / softcap)) + 1)
        entry = begin + jnp.arange(_KEYS)
        is_seen = (entry[None] <= positions[:, None]) & (entry >= i * _KEYS)[None]
        weights = jnp.where(is_seen, jnp.exp(scores), 0)
        total = total + weights.sum(axis=1)
        for scales_ref in value_scales:
            weights = weights * scales_ref[these][None]
        value = values_ref[(*these, slice(None))].astype(query.dtype)
        return total, mixed + triton.dot(weights.astype(query.dtype), value)

    begin = pl.program_id(2) * share
    empty = (jnp.zeros(tile, jnp.float32), jnp.zeros(query.shape, jnp.float32))
    total_ref[0, 0], mixed_ref[0, 0] = lax.fori_loop(begin, jnp.minimum(begin + share, num_blocks), add_keys, empty)
