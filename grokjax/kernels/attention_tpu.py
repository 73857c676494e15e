"""Attention over the cache on TPUs, of many new tokens: JAX's splash kernel, row by row."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.cache import Entries
from grokjax.kernels.entries import CachePlace, read

# A vector of a TPU; sizes that the kernel takes are multiples of it.
_LANES = 128


def fits(query: jax.Array, keys: Entries) -> bool:
    """Whether `attend` takes these: bfloat16, a vector of queries at least, sizes in whole vectors."""
    (_, num_new, _, head_dim), max_len = query.shape, keys.shape[3]
    return query.dtype == jnp.bfloat16 and num_new >= _LANES and max_len % _LANES == 0 and head_dim % _LANES == 0


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
    """Causal attention as `attention.attend` has it: scores, maxima and sums stay in the chip's fast memory.

    Blocks of keys behind a block of queries are neither fetched nor multiplied. The queries are scaled first, and so
    rounded to bfloat16 once more; the weights of the values are not rounded.

    Args:
      query: bfloat16 [P, T, N, H], after RoPE; H a multiple of 128.
      keys: [L, B, K, S, H]; S a multiple of 128.
      values: [L, B, K, S, H].
      place: of the queries; results of those that are not real mean nothing.
      multiplier: factor on the scores.
      softcap: c in `c * tanh(score / c)`.
      interpret: run it as plain JAX, on any device.

    Returns:
      bfloat16 [P, T, N * H].

    Source: Dao et al., FlashAttention (arXiv 2205.14135); `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    batch, num_new, num_heads, head_dim = query.shape
    query_block = min(512, -(-num_new // _LANES) * _LANES)
    padded = -(-num_new // query_block) * query_block
    query = (query.astype(jnp.float32) * multiplier).astype(query.dtype)
    query = jnp.pad(query.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - num_new), (0, 0)))

    def attend_row(i: jax.Array) -> jax.Array:
        positions = place.start[i] + jnp.arange(padded, dtype=jnp.int32)
        kernel = _make_kernel(positions, keys.shape[3], query_block=query_block, softcap=softcap, interpret=interpret)
        row = dataclasses.replace(place, rows=(i if place.rows is None else place.rows[i])[None])
        key, value = (_read_row(entries, row, query.dtype) for entries in (keys, values))
        # JAX's kernel is written for its default settings, and does not compile with numbers of 64 bits.
        with jax.enable_x64(False), jax.default_matmul_precision("default"):
            out: jax.Array = kernel(query[i], key, value)
        return out

    out = lax.map(attend_row, jnp.arange(batch, dtype=jnp.int32))  # [P, N, T, H]
    return out[:, :, :num_new].swapaxes(1, 2).reshape(batch, num_new, num_heads * head_dim)


def _make_kernel(positions: Any, max_len: int, *, query_block: int, softcap: float, interpret: bool) -> Any:
    """The kernel for queries at `positions`, int32 [T], over `max_len` keys: each sees those up to its own position."""
    # Imported where it is used: importing grokjax must not take the time, and other devices never need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask_info

    key_block = math.gcd(max_len, 1024)
    last = jnp.minimum(positions[query_block - 1 :: query_block], max_len - 1)[:, None] // key_block
    number = jnp.arange(max_len // key_block, dtype=jnp.int32)[None]
    mask = splash_attention_mask_info.MaskInfo(
        data_next=jnp.minimum(number, last)[None],
        mask_next=None,
        block_mask=(number <= last).astype(jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=positions,
    )
    return splash_attention_kernel.SplashAttentionKernel(
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


def _read_row(stack: Entries, place: CachePlace, dtype: jnp.dtype) -> jax.Array:
    """All entries [K, S, H] of the only row of a place."""
    entries, scales = read(stack, place, begin=jnp.zeros((), jnp.int32), size=stack.shape[3], dtype=dtype)
    if scales is not None:
        entries = (entries.astype(jnp.float32) * scales[..., None]).astype(dtype)
    return entries[0]
