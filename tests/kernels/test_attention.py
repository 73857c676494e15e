"""Attention in blocks of every size, against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import attend_row

from grokjax.kernels import CachePlace, attend
from grokjax.kernels.attention import block_sizes

MULTIPLIER, SOFTCAP = 0.125, 5.0
START = np.array([0, 900], np.int32)
ROWS = np.array([2, 0], np.int32)


def make(num_new: int, *, max_len: int = 1280, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [2, T, 4, 128] and the keys and values [2, 3, 2, S, 128] of a cache."""
    random = np.random.default_rng(num_new)
    query = random.standard_normal((2, num_new, 4, 128)) * 3
    keys, values = random.standard_normal((2, 2, 3, 2, max_len, 128))
    return tuple(jnp.asarray(array, dtype) for array in (query, keys, values))


def expected(query: jax.Array, keys: jax.Array, values: jax.Array) -> np.ndarray:
    """Attention over layer 1, [2, T, 512]."""
    scoring = {"multiplier": MULTIPLIER, "softcap": SOFTCAP}
    rows = zip(query, keys[1, ROWS], values[1, ROWS], START, strict=True)
    return np.stack([attend_row(q, k, v, start=start, **scoring) for q, k, v, start in rows])


def place(num_new: int) -> CachePlace:
    count = jnp.full(2, num_new, jnp.int32)
    return CachePlace(layer=jnp.int32(1), rows=jnp.asarray(ROWS), start=jnp.asarray(START), count=count)


@pytest.mark.parametrize("num_new", [1, 200, 300])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_blocks_of_any_size_give_the_definition(num_new: int, platform: str) -> None:
    """Any size of blocks gives the same; 1280 entries are no multiple of the large ones."""
    arrays = make(num_new, dtype=jnp.float32)
    found = attend(*arrays, place(num_new), multiplier=MULTIPLIER, softcap=SOFTCAP, platform=platform)
    np.testing.assert_allclose(np.asarray(found), expected(*arrays), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("platform", "num_heads", "num_new", "blocks"),
    [
        ("cpu", 6, 1, (256, 256)),
        ("cpu", 6, 8192, (256, 256)),
        ("gpu", 6, 1, (1, 2048)),
        ("tpu", 48, 1, (1, 2048)),
        ("gpu", 192, 1, (1, 1024)),
        ("gpu", 10000, 1, (1, 256)),
        ("gpu", 6, 8192, (1024, 1024)),
        ("gpu", 48, 8192, (128, 1024)),
        ("gpu", 10000, 8192, (64, 1024)),
    ],
)
def test_block_sizes_suit_the_platform(platform: str, num_heads: int, num_new: int, blocks: tuple[int, int]) -> None:
    assert block_sizes(platform, num_heads, num_new) == blocks
