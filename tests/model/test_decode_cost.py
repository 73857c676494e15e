"""The cost of a decode step follows the filled length of the cache, not what is allocated."""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from grokjax import GrokConfig, KVCache, decode, init

# Attention large against the rest, so that a walk over 8192 entries shows.
CONFIG = GrokConfig.tiny().replace(num_layers=2, num_heads=16, num_kv_heads=16, head_dim=64, max_seq_len=8192)


def test_a_decode_step_costs_what_is_filled() -> None:
    """One cache with few and with many entries, so that both lie on the same pages of memory."""
    model = init(CONFIG, dtype=jnp.float32)
    # As users compile it, whatever the other tests do: without optimisation jax 0.12 copies the cache.
    step = jax.jit(decode, donate_argnums=2, compiler_options={"xla_backend_optimization_level": 3})
    cache = KVCache.create(CONFIG, 1, 8192, dtype=jnp.float32)

    def run(filled: int) -> float:
        """Seconds of one step after `filled` entries."""
        nonlocal cache
        cache = dataclasses.replace(cache, lengths=jnp.array([filled], jnp.int32))
        start = time.perf_counter()
        logits, cache = step(model, jnp.array([7]), cache)
        logits.block_until_ready()
        return time.perf_counter() - start

    run(100)  # compiles
    # In turn, and the ratio pair by pair: the machine's speed drifts.
    ratios = [run(100) / run(8000) for _ in range(21)]
    assert statistics.median(ratios) < 0.5
