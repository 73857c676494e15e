"""Attention in blocks of every size, and as the kernel for TPUs run as plain JAX, against NumPy in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import program_for
from reference import attend_row

from grokjax.cache import Entries, QuantizedEntries
from grokjax.model import attend
from grokjax.model.attention import block_sizes, fits_kernel, fused_attend

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


def place(num_new: int) -> dict[str, Any]:
    scoring = {"multiplier": MULTIPLIER, "softcap": SOFTCAP}
    count = jnp.full(2, num_new, jnp.int32)
    return {"layer": jnp.int32(1), "rows": jnp.asarray(ROWS), "start": jnp.asarray(START), "count": count} | scoring


@pytest.mark.parametrize("num_new", [1, 200, 300])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_blocks_of_any_size_give_the_definition(num_new: int, platform: str) -> None:
    """Any size of blocks gives the same; 1280 entries are no multiple of the large ones."""
    arrays = make(num_new, dtype=jnp.float32)
    found = attend(*arrays, **place(num_new), platform=platform)
    np.testing.assert_allclose(np.asarray(found), expected(*arrays), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_new", "max_len"), [(128, 1024), (200, 1280), (300, 2048), (600, 1536)])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_kernel_gives_the_definition(num_new: int, max_len: int, is_quantized: bool) -> None:
    """As exact as bfloat16 queries and results are."""
    query, keys, values = make(num_new, max_len=max_len)
    exact = expected(query, keys, values)
    stacks: list[Entries] = [keys, values]
    if is_quantized:
        stacks = [QuantizedEntries.of(stack) for stack in stacks]
        restored = [stack.numbers.astype(jnp.float32) * stack.scales[..., None] for stack in stacks]
        exact = expected(query, *restored)
    where = place(num_new)
    del where["count"]
    found = fused_attend(query, *stacks, **where, interpret=True)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=0.04, rtol=0)


def test_kernel_reads_all_rows_in_order() -> None:
    query, keys, values = make(128)
    where = place(128)
    del where["count"], where["rows"]
    found = fused_attend(query, keys[:, ROWS], values[:, ROWS], **where, interpret=True)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected(query, keys, values), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("num_new", "max_len", "dtype", "fits"),
    [
        (128, 1024, jnp.bfloat16, True),
        (127, 1024, jnp.bfloat16, False),
        (128, 1000, jnp.bfloat16, False),
        (128, 1024, jnp.float32, False),
    ],
)
def test_programs_for_tpus_hold_the_kernel_where_it_fits(num_new: int, max_len: int, dtype: Any, fits: bool) -> None:
    """A prefill that the kernel takes holds it; other programs, and those for other devices, do not."""
    arrays = make(num_new, max_len=max_len, dtype=dtype)
    assert fits_kernel(arrays[0], arrays[1]) == fits
    for platform in ("tpu", "gpu", "cpu"):
        text = program_for(platform, functools.partial(attend, **place(num_new), platform=platform), *arrays)
        assert text.count("tpu_custom_call") == (fits and platform == "tpu")


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
