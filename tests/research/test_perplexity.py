"""Perplexity in windows, against the logits of `forward`."""

import functools

import jax
import numpy as np
import pytest
from looked_into import CONFIG, make

from grokjax import forward
from grokjax.research import perplexity

IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, 23)


@functools.cache
def logprobs_within(start: int, window: int = 9) -> np.ndarray:
    """The log-probabilities of the tokens of one window, 0 for its first."""
    tokens = IDS[start : start + window]
    table = np.asarray(jax.nn.log_softmax(forward(make(), tokens[None])[0]))
    return np.r_[0, table[np.arange(len(tokens) - 1), tokens[1:]]]


@pytest.mark.parametrize("stride", [1, 5, 8, None])
def test_every_token_is_scored_once_with_the_context_that_is_told(stride: int | None) -> None:
    found = perplexity(make(), IDS, 9, stride, num_bytes=40)
    assert found.contexts[0] == found.logprobs[0] == 0
    assert found.contexts[:9].tolist() == list(range(9))
    assert (found.contexts[9:] >= 9 - (stride or 4)).all()
    assert (found.contexts < 9).all()
    expected = [logprobs_within(i - context)[context] for i, context in enumerate(found.contexts.tolist())]
    np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)
    assert found.nats_per_token == pytest.approx(-np.sum(expected) / 22, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(-np.sum(expected) / 22), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(-np.sum(expected) / np.log(2) / 40, rel=1e-5)


def test_a_text_of_one_window_has_all_its_context() -> None:
    found = perplexity(make(), IDS[:9], 20)
    assert found.contexts.tolist() == list(range(9))
    np.testing.assert_allclose(found.logprobs, logprobs_within(0), atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([5], {"window": 8}, r"nothing is left to score; give it more\."),
        ([], {"window": 8}, "is empty"),
        ([5, 6], {"window": 1}, r"window=1 must be an integer between 2 and 32\."),
        ([5, 6], {"window": 33}, r"window=33 must be an integer between 2 and 32\."),
        ([5, 6], {"window": 8, "stride": 8}, r"stride=8 must be an integer between 1 and 7\."),
        ([5, 6], {"window": 8, "num_bytes": 0}, r"num_bytes=0 must be an integer, 1 or more\."),
        ([5, 264], {"window": 8}, "outside the vocabulary of 264 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(ids: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(make(), ids, **options)


def test_bits_need_bytes() -> None:
    with pytest.raises(ValueError, match="give num_bytes to perplexity"):
        perplexity(make(), IDS[:9], 9).bits_per_byte  # noqa: B018
