"""Attention in blocks of every size, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LONG, MULTIPLIER, SOFTCAP

from grokjax.kernels import attend
from grokjax.kernels.attention import block_sizes


@pytest.mark.parametrize("num_new", [1, 200, 300])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_blocks_of_any_size_give_the_definition(num_new: int, platform: str) -> None:
    """Any size of blocks gives the same; 1280 entries are no multiple of the large ones."""
    arrays = LONG.make(num_new, max_len=1280, dtype=jnp.float32)
    found = attend(*arrays, LONG.place(num_new), multiplier=MULTIPLIER, softcap=SOFTCAP, platform=platform)
    np.testing.assert_allclose(np.asarray(found), LONG.expected(*arrays), atol=1e-5, rtol=0)


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
