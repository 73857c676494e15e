"""Continuations behind their contexts, against the logits of `forward`."""

import jax
import numpy as np
import pytest
from looked_into import COMPILED, CONFIG, make

from grokjax import forward
from grokjax.research import score_continuations

RANDOM = np.random.default_rng(0)
# Contexts and continuations, the longest neither first nor last; more than two batches of three.
PAIRS = [
    (RANDOM.integers(3, CONFIG.vocab_size, context).tolist(), RANDOM.integers(3, CONFIG.vocab_size, count).tolist())
    for context, count in ((1, 1), (5, 2), (12, 11), (2, 7), (9, 0), (1, 14), (6, 1), (3, 3))
]


def by_hand(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """What is expected of a pair, each of its texts run alone."""
    text, count = [*context, *continuation], len(continuation)
    table = np.asarray(jax.nn.log_softmax(forward(make(), np.pad(text, (0, 32 - len(text)))[None])[0]))
    rows = table[len(context) - 1 : len(text) - 1]
    return rows[np.arange(count), continuation].sum(), (rows.argmax(axis=-1) == continuation).all()


@pytest.mark.parametrize("batch_size", [3, 8])
def test_each_pair_has_its_own_score_in_any_batch(batch_size: int) -> None:
    done: list[int] = []
    found = score_continuations(make(), PAIRS, batch_size=batch_size, progress=done.append)
    assert sum(done) == len(found) == len(PAIRS)
    for score, pair in zip(found, PAIRS, strict=True):
        logprob, is_greedy = by_hand(*pair)
        assert score.logprob == pytest.approx(logprob, abs=1e-4)
        assert score.is_greedy == is_greedy


def test_a_continuation_is_greedy_as_long_as_each_of_its_tokens_is_the_most_probable() -> None:
    text = [5, 6, 7]
    for _ in range(3):
        text.append(int(forward(make(), np.pad(text, (0, 32 - len(text)))[None])[0, len(text) - 1].argmax()))
    almost = [*text[:-1], text[-1] ^ 1]
    found = score_continuations(make(), [(text[:3], text[3:]), (text[:3], almost[3:]), (almost, [])])
    assert [score.is_greedy for score in found] == [True, False, True]
    assert found[2].logprob == 0


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    context, continuation = PAIRS[2]
    (short,) = score_continuations(make(), [(context, continuation[:3])], max_len=8)
    assert short.logprob == pytest.approx(by_hand(context[-5:], continuation[:3])[0], abs=1e-4)


def test_texts_of_many_lengths_take_few_programs() -> None:
    pairs = [([3] * count, [4]) for count in range(1, 32)]
    score_continuations(make(), pairs[::-1], batch_size=8)
    before = len(COMPILED)
    score_continuations(make(), pairs[3:], batch_size=8)
    assert len(COMPILED) == before
    assert score_continuations(make(), []) == []


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([([5], [6]), ([], [6])], {}, "the context of pair 1 is empty: let it begin with"),
        ([([5], [6] * 8)], {"max_len": 8}, "pair 0 has 8 tokens, and with max_len=8 at most 7 are scored"),
        ([([5], [264])], {}, "tokens must be between 0 and 263"),
        ([([5], [6])], {"max_len": 33}, "max_len=33 must be an integer between 2 and 32"),
        ([([5], [6])], {"batch_size": 0}, "batch_size=0 must be an integer, 1 or more"),
    ],
)
def test_what_cannot_be_scored_is_refused(pairs: list, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_continuations(make(), pairs, **options)
