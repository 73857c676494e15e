"""Attention of new tokens over one layer of the cache: chooses the form for the device."""

import functools

import jax

from grokjax.cache import Entries
from grokjax.kernels import attention_gpu, attention_tpu
from grokjax.kernels.attention_backward import pull_in_blocks
from grokjax.kernels.attention_blocks import attend_in_blocks
from grokjax.kernels.cpu_features import product_dtype
from grokjax.kernels.derivatives import with_rule
from grokjax.kernels.entries import CachePlace


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

    On TPUs a prefill is one kernel, on GPUs whatever `attention_gpu.fits`; all else is
    `attention_blocks.attend_in_blocks`.

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
    batch, num_new, num_heads, _ = query.shape
    blocks = block_sizes(platform, batch * num_heads, num_new)

    def run(query: jax.Array, keys: Entries, values: Entries, place: CachePlace) -> jax.Array:
        if platform == "tpu" and attention_tpu.fits(query, keys):
            return attention_tpu.attend(query, keys, values, place, multiplier=multiplier, softcap=softcap)
        if platform == "gpu" and attention_gpu.fits(query, keys, softcap):
            return attention_gpu.attend(query, keys, values, place, multiplier=multiplier, softcap=softcap)
        return in_blocks(query, keys, values, place)

    def in_blocks(query: jax.Array, keys: Entries, values: Entries, place: CachePlace) -> jax.Array:
        return saving(query, keys, values, place)[0]

    def saving(
        query: jax.Array, keys: Entries, values: Entries, place: CachePlace
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        cast = query.astype(product_dtype(query.dtype)) if platform == "cpu" else query
        out, log_totals = attend_in_blocks(
            cast, keys, values, place, blocks=blocks, multiplier=multiplier, softcap=softcap
        )
        out = out.astype(query.dtype)
        return out, (out, log_totals)

    pull = functools.partial(pull_in_blocks, blocks=blocks, platform=platform, multiplier=multiplier, softcap=softcap)
    out: jax.Array = with_rule(run, pull, saving=saving, smooth=in_blocks)(query, keys, values, place)
    return out


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
