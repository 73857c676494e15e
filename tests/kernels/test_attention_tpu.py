"""Attention by the kernel for TPUs, run as plain JAX, against NumPy in float64; and which programs hold it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import program_for
from reference import attend_row

from grokjax.cache import Entries, QuantizedEntries
from grokjax.kernels import CachePlace, attend, attention_tpu

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


run = functools.partial(attention_tpu.attend, multiplier=MULTIPLIER, softcap=SOFTCAP, interpret=True)


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
    found = run(query, *stacks, place(num_new))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=0.04, rtol=0)


def test_kernel_reads_all_rows_in_order() -> None:
    query, keys, values = make(128)
    found = run(query, keys[:, ROWS], values[:, ROWS], dataclasses.replace(place(128), rows=None))
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
    assert attention_tpu.fits(arrays[0], arrays[1]) == fits
    options = {"place": place(num_new), "multiplier": MULTIPLIER, "softcap": SOFTCAP}
    for platform in ("tpu", "gpu", "cpu"):
        text = program_for(platform, functools.partial(attend, **options, platform=platform), *arrays)
        assert text.count("tpu_custom_call") == (fits and platform == "tpu")
