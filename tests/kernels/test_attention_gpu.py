"""Attention for GPUs, run as plain JAX, against NumPy in float64; and the whole model with all kernels for GPUs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import MULTIPLIER, ROWS, SOFTCAP, AttentionCase
from builders import program_for

from grokjax import GrokConfig, decode, init, prefill
from grokjax.cache import Entries, QuantizedEntries
from grokjax.kernels import attend, attention_gpu, matmul_gpu
from grokjax.sharding import Partitioner

CASE = AttentionCase(num_heads=6, head_dim=64, start=(0, 150))
run = functools.partial(attention_gpu.attend, multiplier=MULTIPLIER, softcap=SOFTCAP, interpret=True)


@pytest.mark.parametrize(("num_new", "max_len"), [(1, 192), (1, 1000), (5, 200), (50, 320)])
@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("softcap", [5.0, 30.0])
def test_attention_is_its_definition(num_new: int, max_len: int, is_quantized: bool, softcap: float) -> None:
    """As exact as bfloat16 queries, weights and results are; with one program for the keys of a row, and with more."""
    query, keys, values = CASE.make(num_new, max_len=max_len)
    exact, stacks = CASE.expected(query, keys, values, softcap), [keys, values]
    if is_quantized:
        stacks: list[Entries] = [QuantizedEntries.of(stack) for stack in stacks]
        exact = CASE.expected(query, *(s.numbers.astype(jnp.float32) * s.scales[..., None] for s in stacks), softcap)
    assert attention_gpu.fits(query, stacks[0], softcap)
    found = run(query, *stacks, CASE.place(num_new), softcap=softcap)
    assert (found.shape, found.dtype) == ((2, num_new, 384), jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=0.02, rtol=0)


def test_takes_all_rows_in_order_and_rows_of_nothing() -> None:
    query, keys, values = CASE.make(3, max_len=160)
    where = dataclasses.replace(CASE.place(3), rows=None, count=jnp.array([0, 3]))
    found = run(query, keys[:, ROWS], values[:, ROWS], where)
    np.testing.assert_allclose(np.asarray(found[1]), CASE.expected(query, keys, values, 5.0)[1], atol=0.02, rtol=0)
    assert np.isfinite(np.asarray(found, np.float32)).all()


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"softcap": 50}, False),
        ({"max_len": 48}, False),
        ({"dtype": jnp.float32}, False),
        ({"cache_dtype": jnp.float32}, False),
        ({"cache_dtype": jnp.int8}, True),
    ],
)
def test_fits_says_what_the_kernel_takes(change: dict[str, Any], fits: bool) -> None:
    values = {"softcap": 30, "max_len": 160, "dtype": jnp.bfloat16, "cache_dtype": jnp.bfloat16} | change
    query, keys, _ = CASE.make(1, max_len=values["max_len"])
    arrays = query.astype(values["dtype"]), keys.astype(values["cache_dtype"])
    assert attention_gpu.fits(*arrays, values["softcap"]) == fits


@pytest.mark.parametrize(("rows", "fits"), [(32, True), (33, False), (64, False), (65, True)])
def test_caches_whose_offsets_are_not_safe_do_not_fit(rows: int, fits: bool) -> None:
    """Grok-1 in int8 on each of 8 devices, rows of 8192 tokens."""
    shape = (64, rows, 1, 8192, 128)
    cache = QuantizedEntries(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(shape[:-1], jnp.float32))
    query = jax.ShapeDtypeStruct((rows, 1, 6, 128), jnp.bfloat16)
    assert attention_gpu.fits(query, cache, 30) == fits


@pytest.mark.parametrize("is_quantized", [False, True])
def test_scores_at_the_cap_lose_nothing(is_quantized: bool) -> None:
    """Where every score is the least there can be, and values are small, the weights are far from nothing."""
    query, keys, values = CASE.make(1, max_len=192)
    where = dataclasses.replace(CASE.place(1), start=jnp.zeros(2, jnp.int32))
    keys, values = -jnp.broadcast_to(query[0, 0, :1] * 10, keys.shape), values * 1e-3
    query = jnp.broadcast_to(query[0, 0, :1] * 10, query.shape)
    stacks = [QuantizedEntries.of(stack) if is_quantized else stack for stack in (keys, values)]
    found = run(query, *stacks, where, multiplier=50.0, softcap=30.0)
    alone = np.asarray(values[1, ROWS, :, 0], np.float64)  # the only entry that each sees
    exact = np.repeat(alone, 3, axis=1).reshape(2, 1, -1)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=0.02 * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize("num_new", [1, 30])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_programs_for_gpus_hold_the_kernel(num_new: int, is_quantized: bool) -> None:
    query, keys, values = CASE.make(num_new, max_len=320)
    stacks = [QuantizedEntries.of(stack) if is_quantized else stack for stack in (keys, values)]
    on_gpu = functools.partial(attend, place=CASE.place(num_new), multiplier=MULTIPLIER, softcap=5.0, platform="gpu")
    text = program_for("gpu", on_gpu, query, *stacks)
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize(("max_len", "programs", "splits"), [(8192, 8, 32), (8192, 64, 4), (512, 8, 4), (128, 1, 1)])
def test_few_programs_share_out_the_keys(max_len: int, programs: int, splits: int) -> None:
    assert attention_gpu.choose_num_splits(max_len, programs=programs) == splits


@pytest.mark.thorough
def test_a_model_with_all_kernels_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program for GPUs computes is what one for CPUs does: prefill and two steps."""
    sizes = {"model_dim": 128, "ffn_dim": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "num_layers": 2}
    config = GrokConfig.tiny().replace(**sizes)
    model = init(config, dtype=jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (2, 40))

    def logits() -> np.ndarray:
        cache = model.new_cache(2, 96, dtype="int8")
        out, cache = prefill(model, tokens, [40, 33], cache)
        outs = [out]
        for step in range(2):
            out, cache = decode(model, tokens[:, step], cache)
            outs.append(out)
        return np.asarray(jnp.stack(outs))

    plain = logits()
    names = {(matmul_gpu, "stack_matmul"): [], (attention_gpu, "attend"): []}
    for (module, name), calls in names.items():
        kernel = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, lambda *a, k=kernel, c=calls, **kw: c.append(1) or k(*a, **kw))
    monkeypatch.setattr(Partitioner, "platform", "gpu")
    jax.clear_caches()
    try:
        found = logits()
    finally:
        jax.clear_caches()  # what was traced for another platform
    assert all(names.values())
    assert np.sqrt(np.mean((found - plain) ** 2)) < 0.02 * plain.std()
