"""A row's result is its own: whatever its neighbours, its slot, its padding, or the chunks its prompt came in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY_DENSE, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from grokjax import GrokConfig, KVCache, SampleSettings, decode, forward, generate, make_mesh, prefill

CONFIG = GrokConfig.tiny().replace(num_layers=2, max_seq_len=32)
ROWS, CHUNK, LONGEST = 4, 6, 18
MESHES = [pytest.param((1, 1), marks=pytest.mark.thorough), (2, 4)]


@functools.cache
def model(mesh: tuple[int, int]):
    return random_model(CONFIG, dtype=jnp.float32, mesh=make_mesh(mesh))


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, CONFIG.vocab_size, (16, LONGEST))


@functools.cache
def alone(mesh: tuple[int, int]) -> np.ndarray:
    """The logits [16, LONGEST, V] of 16 texts at every position, in one pass without a cache."""
    return np.asarray(forward(model(mesh), tokens()))


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Which texts fill the rows, and for each call how many tokens each row takes (0 leaves it out)."""
    texts = draw(st.lists(st.integers(0, 15), min_size=ROWS, max_size=ROWS))
    calls = draw(st.lists(st.lists(st.integers(0, CHUNK), min_size=ROWS, max_size=ROWS), min_size=1, max_size=3))
    return texts, calls


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@settings(max_examples=15)
@given(schedule=schedules(), pad=st.integers(0, CONFIG.vocab_size - 1))
def test_any_schedule_gives_each_row_its_own_logits(
    mesh: tuple[int, int], schedule: tuple[list[int], list[list[int]]], pad: int
) -> None:
    texts, calls = schedule
    cache = KVCache.create(CONFIG, ROWS, 24, mesh=make_mesh(mesh))
    done = np.zeros(ROWS, int)
    for counts in calls:
        chunk = np.full((ROWS, CHUNK), pad)
        for row, count in enumerate(counts):
            chunk[row, :count] = tokens()[texts[row], done[row] : done[row] + count]
        logits, cache = prefill(model(mesh), chunk, np.array(counts), cache)
        done += counts
        check(logits, texts, done, [count > 0 for count in counts], mesh)
    active = [bool(0 < d < LONGEST) for d in done]
    following = [tokens()[text, d % LONGEST] for text, d in zip(texts, done, strict=True)]
    logits, cache = decode(model(mesh), following, cache, active=active)
    check(logits, texts, done + active, active, mesh)
    np.testing.assert_array_equal(cache.lengths, done + active)


def check(logits, texts: list[int], done: np.ndarray, rows: list[bool], mesh: tuple[int, int]) -> None:
    for row in np.flatnonzero(rows):
        expected = alone(mesh)[texts[row], done[row] - 1]
        np.testing.assert_allclose(np.asarray(logits)[row], expected, atol=2e-5)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_row_moved_to_another_slot_goes_on(mesh: tuple[int, int]) -> None:
    place = {"mesh": make_mesh(mesh)}
    _, one = prefill(model(mesh), tokens()[5:6, :CHUNK], np.array([CHUNK]), KVCache.create(CONFIG, 1, 24, **place))
    others = np.full(ROWS, CHUNK)
    _, cache = prefill(model(mesh), tokens()[:ROWS, :CHUNK], others, KVCache.create(CONFIG, ROWS, 24, **place))
    cache = cache.insert(one, 2)
    following = tokens()[[0, 1, 5, 3], CHUNK]
    logits, _ = decode(model(mesh), following, cache)
    np.testing.assert_allclose(logits, alone(mesh)[[0, 1, 5, 3], CHUNK], atol=2e-5)


@settings(max_examples=8)
@given(
    texts=st.lists(st.integers(0, 15), min_size=ROWS, max_size=ROWS),
    lengths=st.lists(st.integers(1, CHUNK), min_size=ROWS, max_size=ROWS),
    pad=st.integers(0, CONFIG.vocab_size - 1),
)
def test_a_drawn_continuation_is_the_rows_own(texts: list[int], lengths: list[int], pad: int) -> None:
    """The same prompt, key and temperature give the same tokens in any company and slot."""
    prompts = np.where(np.arange(CHUNK) < np.array(lengths)[:, None], tokens()[texts, :CHUNK], pad)
    together = draw_continuations(prompts, lengths, texts)
    order = [2, 0, 3, 1]
    company = [(text + 1) % 16 for text in texts]
    for slot, row in enumerate(order):
        others = tokens()[company, :CHUNK].copy()
        others[slot] = tokens()[texts[row], :CHUNK]  # the row's own padding is other tokens now
        mixed_lengths = [1] * ROWS
        mixed_lengths[slot] = lengths[row]
        keys = [*company[:slot], texts[row], *company[slot + 1 :]]
        np.testing.assert_array_equal(draw_continuations(others, mixed_lengths, keys)[slot], together[row])


def draw_continuations(prompts: np.ndarray, lengths: list[int], seeds: list[int]) -> np.ndarray:
    """Four tokens for each row [ROWS, 4], drawn with the keys of `seeds`."""
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    drawing = SampleSettings.create(ROWS, temperature=0.8, top_p=0.95)
    made = generate(model((1, 1)), prompts, lengths, max_new_tokens=4, settings=drawing, keys=keys)
    return np.asarray(made.tokens)


def test_rows_that_the_data_axis_does_not_divide_give_the_same() -> None:
    """Three rows on two rows of devices: computed on both, and the same."""
    mesh, lengths = make_mesh((2, 4)), np.array([6, 2, 4])
    cache = KVCache.create(CONFIG, 3, 24, mesh=mesh)
    logits, cache = prefill(model((2, 4)), tokens()[:3, :CHUNK], lengths, cache)
    np.testing.assert_allclose(logits, alone((2, 4))[np.arange(3), lengths - 1], atol=2e-5)
    logits, _ = decode(model((2, 4)), tokens()[np.arange(3), lengths], cache)
    np.testing.assert_allclose(logits, alone((2, 4))[np.arange(3), lengths], atol=2e-5)


def test_blocks_of_attention_join_exactly() -> None:
    """Texts longer than a block of queries and of keys, in a cache that the block does not divide."""
    config = TINY_DENSE.replace(max_seq_len=700)
    long_model = random_model(config, dtype=jnp.float32)
    text = np.random.default_rng(1).integers(3, config.vocab_size, (1, 600))
    expected = np.asarray(forward(long_model, text))[0]
    cache = KVCache.create(config, 1, 611)
    logits, cache = prefill(long_model, text[:, :300], np.array([300]), cache)
    np.testing.assert_allclose(logits[0], expected[299], atol=2e-5)
    logits, cache = prefill(long_model, text[:, 300:], np.array([299]), cache)
    np.testing.assert_allclose(logits[0], expected[598], atol=2e-5)
    logits, cache = decode(long_model, text[:, 599], cache)
    np.testing.assert_allclose(logits[0], expected[599], atol=2e-5)
