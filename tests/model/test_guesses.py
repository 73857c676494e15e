"""Guessing: what is looked up, that a right guess saves a step, and that no guess changes what is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY_DENSE, or_thorough, random_model
from fake_steps import looked_up
from hypothesis import given
from hypothesis import strategies as st

from grokjax import KVCache, SampleSettings, generate, make_mesh, prefill
from grokjax.model import Generated
from grokjax.model.guesses import Checked, check_guesses, look_up

CONFIG = TINY_DENSE.replace(max_seq_len=64)
NEW, GUESSES, LONGEST = 24, 5, 16


@functools.cache
def model(mesh: tuple[int, int] = (1, 1)):
    return random_model(CONFIG, dtype=jnp.float32, mesh=make_mesh(mesh))


@functools.cache
def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Prompts [4, LONGEST] of which the last three repeat themselves, and their lengths."""
    made = np.random.default_rng(0).integers(3, 500, (4, LONGEST))
    for row, period in ((1, 1), (2, 3), (3, 5)):
        made[row] = np.resize(made[row, :period], LONGEST)
    return made, np.array([LONGEST, 9, 12, LONGEST])


@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=3, max_size=3),
    beyond=st.integers(0, 3),
)
def test_the_latest_place_of_the_last_tokens_is_found(texts: list[list[int]], beyond: int) -> None:
    """Whatever lies behind the end of a text."""
    padded = np.full((3, 20), beyond, np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    guesses, found = _look_up(padded, np.array([len(text) for text in texts], np.int32), num_guesses=6)
    for text, own, count in zip(texts, np.asarray(guesses), np.asarray(found), strict=True):
        assert own[:count].tolist() == looked_up(text, 6)


_look_up = jax.jit(look_up, static_argnames="num_guesses")


MIXED = SampleSettings.create(4, temperature=[0, 0, 0.4, 0.8], active=[True, True, True, False])


def plain(settings: SampleSettings, **options) -> Generated:
    """What is drawn without guesses."""
    return generate(model(), *prompts(), max_new_tokens=NEW, settings=settings, **options)


@functools.cache
def greedy() -> np.ndarray:
    """Of every row, [4, NEW]; each soon repeats itself."""
    return np.asarray(plain(SampleSettings.create(4, temperature=0)).tokens)


@pytest.mark.parametrize(
    ("mesh", "cache_dtype"), or_thorough([((1, 1), "float32"), ((2, 4), "int8")], [((1, 1), "float32")]), ids=str
)
def test_guesses_change_no_token(mesh: tuple[int, int], cache_dtype: str) -> None:
    """Greedy rows, a drawn one that ends early, and one that does not run."""
    drawn = np.asarray(plain(MIXED).tokens)[2].tolist()
    end = next(token for i, token in enumerate(drawn) if i > 3 and token not in drawn[:i])
    expected = plain(MIXED, eos_id=end, cache_dtype=cache_dtype)
    assert 4 < expected.lengths[2] < NEW
    guessed = generate(
        model(mesh),
        *prompts(),
        max_new_tokens=NEW,
        settings=MIXED,
        eos_id=end,
        guesses=GUESSES,
        cache_dtype=cache_dtype,
    )
    np.testing.assert_array_equal(guessed.tokens, expected.tokens)
    np.testing.assert_array_equal(guessed.lengths, expected.lengths)
    np.testing.assert_allclose(guessed.logprobs, expected.logprobs, atol=1e-4)


def test_guesses_may_exceed_what_is_left_to_draw() -> None:
    guessed = generate(model(), *prompts(), max_new_tokens=2, guesses=100)
    np.testing.assert_array_equal(guessed.tokens, greedy()[:, :2])


@pytest.mark.parametrize("guesses", [-1, 1.5])
def test_a_number_of_guesses_that_is_none_is_refused(guesses: float) -> None:
    with pytest.raises(ValueError, match=rf"guesses={guesses} must be an integer, 0 or more"):
        generate(model(), *prompts(), max_new_tokens=2, guesses=guesses)


def test_a_step_makes_one_token_more_than_it_guessed_right() -> None:
    """With any guesser: here one that knows the text, up to a token."""
    tokens, lengths = prompts()
    drawn, num_guesses = greedy(), 3
    texts = np.zeros((4, CONFIG.max_seq_len), np.int32)
    for row, length in enumerate(lengths):
        texts[row, : length + 1] = [*tokens[row, :length], drawn[row, 0]]
    _, cache = prefill(model(), tokens, lengths, model().new_cache(4))
    right = jnp.asarray(drawn[:, 1 : 1 + num_guesses])
    # The second row tries one guess only, the third has room for one more token, and the fourth for none.
    most, ends = jnp.array([3, 1, 3, 3]), jnp.array([64, 64, lengths[2] + 2, lengths[3] + 1])

    def draw(logits: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return logits.argmax(axis=-1).astype(jnp.int32), positions

    @jax.jit
    def check(num_right: jax.Array) -> tuple[Checked, jax.Array, KVCache]:
        def guess(texts: jax.Array, lengths: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
            is_right = jnp.arange(count)[None] < num_right
            return jnp.where(is_right, right, right + 1), jnp.full_like(lengths, count)

        return check_guesses(model(), texts, cache, draw, ends=ends, most=most, num_guesses=num_guesses, guesser=guess)

    for num_right in range(num_guesses + 1):
        checked, after, cache_after = check(num_right)
        made = [num_right + 1, min(num_right, 1) + 1, 1, 0]
        assert checked.made.tolist() == made
        # Of a guess that was not tried it is seen all the same whether it would have been right.
        assert checked.looked.tolist() == [3, 2, 1, 0]
        assert checked.right.tolist() == [num_right, min(num_right, 2), min(num_right, 1), 0]
        assert cache_after.lengths.tolist() == (lengths + made).tolist()
        for row, (length, count) in enumerate(zip(lengths, made, strict=True)):
            assert checked.tokens[row, :count].tolist() == drawn[row, 1 : 1 + count].tolist()
            assert checked.drawn[row, :count].tolist() == list(range(length + 1, length + 1 + count))
            assert after[row, : length + 1 + count].tolist() == [*tokens[row, :length], *drawn[row, : 1 + count]]
