"""How probable a continuation is behind a context, for many of them: batches of texts of about one length."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from grokjax.model import Grok, Scores, pad_texts, score
from grokjax.request import check_integer
from grokjax.sharding import to_host


@dataclasses.dataclass(frozen=True)
class ContinuationScore:
    """How a model takes a continuation behind its context.

    Attributes:
      logprob: the sum of the natural log-probabilities of its tokens; 0 where it has none.
      is_greedy: whether each of its tokens was the most probable one in its place.
    """

    logprob: float
    is_greedy: bool


def score_continuations(
    model: Grok,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
    max_len: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[ContinuationScore]:
    """How probable each continuation is behind its context.

    Texts of about one length are read together, the longest first. Of a context that is too long the beginning is left
    out, as evaluations do it.

    Args:
      model: the model, edited or not.
      pairs: the tokens of a context, at least one, and those of its continuation; in the vocabulary.
      batch_size: texts that are read at once.
      max_len: tokens of context and continuation that are read, 2 to `max_seq_len`, which is the default.
      progress: called after each batch with the number of its texts.

    Returns:
      The scores in the order of the pairs.

    Raises:
      ValueError: A number is out of its range, a token is outside the vocabulary, a context is empty, or a continuation
        leaves no room for a token of its context.
    """
    longest = model.config.max_seq_len
    batch_size = check_integer("batch_size", batch_size, 1)
    max_len = check_integer("max_len", longest if max_len is None else max_len, 2, longest)
    for number, (context, continuation) in enumerate(pairs):
        _check_pair(number, len(context), len(continuation), max_len)
    texts = [[*context, *continuation][-max_len:] for context, continuation in pairs]
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    num_rows = min(batch_size, len(texts))
    found: dict[int, ContinuationScore] = {}
    for start in range(0, len(texts), batch_size):
        batch = order[start : start + batch_size]
        tokens, lengths = pad_texts(model.config, [texts[number] for number in batch], num_rows, max_len)
        scores: Scores[np.ndarray] = to_host(score(model, tokens, lengths))
        for row, number in enumerate(batch):
            end = len(texts[number])
            own = row, slice(end - len(pairs[number][1]), end)
            found[number] = ContinuationScore(
                logprob=float(scores.logprob[own].sum(dtype=np.float64)),
                is_greedy=bool((scores.top_id[own] == tokens[own]).all()),
            )
        if progress is not None:
            progress(len(batch))
    return [found[number] for number in range(len(texts))]


def _check_pair(number: int, context: int, continuation: int, max_len: int) -> None:
    if not context:
        raise ValueError(
            f"the context of pair {number} is empty: let it begin with a token that nothing is asked about, such as "
            "the beginning-of-sequence token."
        )
    if continuation >= max_len:
        raise ValueError(
            f"the continuation of pair {number} has {continuation} tokens, and with max_len={max_len} at most "
            f"{max_len - 1} are scored behind a context: shorten it, or score it in parts."
        )
