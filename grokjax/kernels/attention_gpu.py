"""Attention over the cache on GPUs, a kernel in Triton: JAX has none that knows the cap of the scores."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.cache import Entries
from grokjax.kernels.entries import CachePlace
from grokjax.kernels.matmul_gpu import has_safe_offsets, tile_rows
from grokjax.kernels.slices import float_precision

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
    place: CachePlace,
    *,
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
      place: of the queries; results of those that are not real mean nothing.
      multiplier: factor on the scores.
      softcap: c in `c * tanh(score / c)`, at most 30.
      interpret: run it as plain JAX, on any device.

    Returns:
      bfloat16 [P, T, N * H].

    Source: Dao et al., FlashAttention (arXiv 2205.14135); Dao et al., Flash-Decoding for long-context inference.
    """
    batch, num_new, num_heads, head_dim = query.shape
    kv_heads, max_len = keys.shape[2:4]
    group = num_heads // kv_heads
    tile = tile_rows(num_new * group)
    packed = query.reshape(batch, num_new, kv_heads, group, head_dim).swapaxes(1, 2)
    packed = packed.reshape(batch * kv_heads, num_new * group, head_dim)
    packed = jnp.pad(packed, ((0, 0), (0, -num_new * group % tile), (0, 0)))
    splits = choose_num_splits(max_len, programs=batch * kv_heads * packed.shape[1] // tile)
    scheme = _Scheme(tile, kv_heads, group, splits, multiplier, softcap)
    mixed, total = _run_programs(packed, keys, values, place, scheme, interpret=interpret)
    # A row without any keys has the total 0; its result, never read, is 0 too.
    out = mixed.sum(axis=0) / jnp.maximum(total.sum(axis=0), jnp.finfo(jnp.float32).tiny)[..., None]
    out = out.astype(query.dtype)[:, : num_new * group].reshape(batch, kv_heads, num_new, group * head_dim)
    return out.swapaxes(1, 2).reshape(batch, num_new, num_heads * head_dim)


@dataclasses.dataclass(frozen=True)
class _Scheme:
    """How the work is cut into programs, and what each does with its scores.

    Attributes:
      tile: queries of one program, of all heads that share a kv head.
      kv_heads: K.
      group: G, query heads that share a kv head.
      splits: programs that share the keys of a tile of queries.
      multiplier: factor on the scores.
      softcap: c in `c * tanh(score / c)`.
    """

    tile: int
    kv_heads: int
    group: int
    splits: int
    multiplier: float
    softcap: float


def _run_programs(
    packed: jax.Array, keys: Entries, values: Entries, place: CachePlace, scheme: _Scheme, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The kernel, for queries [P * K, T * G, H] in whole tiles.

    Returns:
      Weighted sums of values, float32 [splits, P * K, T * G, H], and sums of weights, float32 [splits, P * K, T * G].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (heads, _, head_dim), tile = packed.shape, scheme.tile
    tiles = packed.shape[1] // tile
    rows = jnp.arange(heads // scheme.kv_heads, dtype=jnp.int32) if place.rows is None else place.rows
    numbers = tuple(a.astype(jnp.int32) for a in (rows, place.start, place.count, place.layer.reshape(1)))
    shape = (scheme.splits, *packed.shape)

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    mixed, total = pl.pallas_call(
        functools.partial(_attend_tile, scheme=scheme),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:-1], jnp.float32)],
        grid=(heads, tiles, scheme.splits),  # the last queries, which have most keys, come first
        in_specs=[
            pl.BlockSpec((1, tile, head_dim), lambda head, i, _: (head, tiles - 1 - i, 0)),
            *jax.tree.map(whole, (numbers, keys, values)),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, tile, head_dim), lambda head, i, split: (split, head, tiles - 1 - i, 0)),
            pl.BlockSpec((1, 1, tile), lambda head, i, split: (split, head, tiles - 1 - i)),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3 if tile <= 16 else 2),
        interpret=interpret,
        name="attend",
    )(packed, numbers, keys, values)
    return mixed, total


def choose_num_splits(max_len: int, *, programs: int) -> int:
    """Programs that share the keys of a tile of queries: a power of two, each with 128 keys or more of a full row.

    Args:
      max_len: S, keys of a full row.
      programs: that there are for all keys, one for each tile and kv head.
    """
    most = max(1, min(_PROGRAMS // programs, max_len // (2 * _KEYS)))
    return 1 << most.bit_length() - 1


def _attend_tile(
    query_ref: Any, number_refs: Any, keys: Any, values: Any, mixed_ref: Any, total_ref: Any, *, scheme: _Scheme
) -> None:
    """The weighted sum of values of one tile of queries over the keys of one split, and the sum of the weights."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (keys_ref, *key_scales), (values_ref, *value_scales) = jax.tree.leaves(keys), jax.tree.leaves(values)
    rows_ref, start_ref, count_ref, layer_ref = number_refs
    number, head = pl.program_id(0) // scheme.kv_heads, pl.program_id(0) % scheme.kv_heads
    place = (layer_ref[0], rows_ref[number], head)
    max_len = keys_ref.shape[3]
    first = (pl.num_programs(1) - 1 - pl.program_id(1)) * scheme.tile
    start = start_ref[number]
    positions = start + (first + jnp.arange(scheme.tile, dtype=jnp.int32)) // scheme.group
    count = count_ref[number]
    filled = jnp.where(count > 0, start + jnp.minimum((first + scheme.tile - 1) // scheme.group + 1, count), 0)
    num_blocks = (filled + _KEYS - 1) // _KEYS
    share = (num_blocks + scheme.splits - 1) // scheme.splits
    query = query_ref[0]
    product = functools.partial(triton.dot, precision=float_precision(query.dtype))

    def add_keys(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, mixed = carry
        begin = jnp.minimum(i * _KEYS, max_len - _KEYS)  # the last block slides left and masks what was seen before
        these = (*place, pl.ds(begin, _KEYS))
        scores = product(query, keys_ref[(*these, slice(None))].astype(query.dtype).T)
        for scales_ref in key_scales:
            scores = scores * scales_ref[these][None]
        # score - c for score = c * tanh(x) is -2 c / (exp(2 x) + 1).
        scores = -2 * scheme.softcap / (jnp.exp(scores * (2 * scheme.multiplier / scheme.softcap)) + 1)
        entry = begin + jnp.arange(_KEYS, dtype=jnp.int32)
        is_seen = (entry[None] <= positions[:, None]) & (entry >= i * _KEYS)[None]
        weights = jnp.where(is_seen, jnp.exp(scores), 0)
        total = total + weights.sum(axis=1)
        for scales_ref in value_scales:
            weights = weights * scales_ref[these][None]
        value = values_ref[(*these, slice(None))].astype(query.dtype)
        return total, mixed + product(weights.astype(query.dtype), value)

    begin = pl.program_id(2) * share
    empty = (jnp.zeros(scheme.tile, jnp.float32), jnp.zeros(query.shape, jnp.float32))
    total_ref[0, 0], mixed_ref[0, 0] = lax.fori_loop(begin, jnp.minimum(begin + share, num_blocks), add_keys, empty)
