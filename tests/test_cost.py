"""The cost of a decode step follows the filled length of the cache, not what is allocated."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from grokjax import GrokConfig, KVCache, decode, init, prefill

# Attention large against the rest, so that a walk over 8192 entries would show.
CONFIG = GrokConfig.tiny().replace(num_layers=2, num_heads=16, num_kv_heads=16, head_dim=64, max_seq_len=8192)


def test_long_cache_costs_no_more_than_a_short_one() -> None:
    model = init(CONFIG, dtype=jnp.float32)
    step = jax.jit(decode, donate_argnums=2)

    @functools.cache
    def state(max_len: int) -> list[KVCache]:
        cache = KVCache.create(CONFIG, 1, max_len, dtype=jnp.float32)
        _, cache = prefill(model, np.full((1, 100), 7), np.array([100]), cache)
        return [cache]

    def run(max_len: int) -> float:
        """Seconds of one step, which leaves the cache one entry longer."""
        held = state(max_len)
        start = time.perf_counter()
        logits, held[0] = step(model, jnp.array([7]), held[0])
        logits.block_until_ready()
        return time.perf_counter() - start

    for max_len in (256, 8192):
        run(max_len)  # compiles
    # In turn, and the ratio pair by pair: the machine's speed drifts.
    ratios = [run(8192) / run(256) for _ in range(41)]
    assert statistics.median(ratios) < 1.3
