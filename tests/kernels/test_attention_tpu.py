"""Attention by the kernel for TPUs, run as plain JAX, against NumPy in float64; and which programs hold it."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LONG, MULTIPLIER, ROWS, SOFTCAP
from builders import or_thorough, program_for

from grokjax.cache import Entries, QuantizedEntries
from grokjax.kernels import attend, attention_tpu

run = functools.partial(attention_tpu.attend, multiplier=MULTIPLIER, softcap=SOFTCAP, interpret=True)


@pytest.mark.parametrize(
    ("num_new", "max_len", "is_quantized"),
    or_thorough(
        [
            (*sizes, is_quantized)
            for sizes in ((128, 1024), (200, 1280), (300, 2048), (600, 1536))
            for is_quantized in (False, True)
        ],
        [(200, 1280, True), (300, 2048, False)],
    ),
)
def test_kernel_gives_the_definition(num_new: int, max_len: int, is_quantized: bool) -> None:
    """As exact as bfloat16 queries and results are."""
    query, keys, values = LONG.make(num_new, max_len=max_len)
    exact = LONG.expected(query, keys, values)
    stacks: list[Entries] = [keys, values]
    if is_quantized:
        stacks = [QuantizedEntries.of(stack) for stack in stacks]
        restored = [stack.numbers.astype(jnp.float32) * stack.scales[..., None] for stack in stacks]
        exact = LONG.expected(query, *restored)
    found = run(query, *stacks, LONG.place(num_new))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=0.04, rtol=0)


def test_kernel_reads_all_rows_in_order() -> None:
    query, keys, values = LONG.make(128, max_len=1280)
    found = run(query, keys[:, ROWS], values[:, ROWS], dataclasses.replace(LONG.place(128), rows=None))
    np.testing.assert_allclose(np.asarray(found, np.float64), LONG.expected(query, keys, values), atol=0.04, rtol=0)


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
    arrays = LONG.make(num_new, max_len=max_len, dtype=dtype)
    assert attention_tpu.fits(arrays[0], arrays[1]) == fits
    options = {"place": LONG.place(num_new), "multiplier": MULTIPLIER, "softcap": SOFTCAP}
    for platform in ("tpu", "gpu", "cpu"):
        text = program_for(platform, functools.partial(attend, **options, platform=platform), *arrays)
        assert text.count("tpu_custom_call") == (fits and platform == "tpu")
