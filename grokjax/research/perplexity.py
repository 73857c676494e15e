"""Perplexity of a text longer than a model reads at once: window after window, every token scored exactly once."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jax.typing import ArrayLike

from grokjax.model import Grok, score
from grokjax.printing import describe_fields
from grokjax.request import check_integer, check_prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Perplexity:
    """How a model takes a text of n tokens, the first of which nothing comes before: it is given, and not scored.

    Attributes:
      logprobs: float32 [n], natural log-probability of each token; 0 for the first.
      contexts: int32 [n], how many tokens before it each was scored with; 0 for the first.
      num_bytes: of the text that was scored, if it was told.
    """

    logprobs: np.ndarray
    contexts: np.ndarray
    num_bytes: int | None = None

    __repr__ = describe_fields

    @property
    def nats_per_token(self) -> float:
        """The mean of the negative log-probabilities of the scored tokens."""
        return -float(self.logprobs.sum(dtype=np.float64)) / (len(self.logprobs) - 1)

    @property
    def perplexity(self) -> float:
        """The exponential of `nats_per_token`."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Bits in which the model writes a byte of the text; other than perplexity, it compares across tokenizers.

        Raises:
          ValueError: Nobody told how many bytes the text has.
        """
        if self.num_bytes is None:
            raise ValueError("bits_per_byte needs the bytes of the text: give num_bytes to perplexity.")
        return -float(self.logprobs.sum(dtype=np.float64)) / math.log(2) / self.num_bytes


def perplexity(
    model: Grok, ids: ArrayLike, window: int, stride: int | None = None, *, num_bytes: int | None = None
) -> Perplexity:
    """How a model takes a text of any length, read in windows that overlap.

    Each window scores the tokens that no window before it did. Those of the first have all that comes before them for a
    context, the others at least `window - stride` tokens: a shorter stride takes more time and is nearer to the truth.

    Args:
      model: the model, edited or not.
      ids: integers [n] in the vocabulary, 2 or more; the first, such as the beginning-of-sequence token, is given.
      window: tokens that are read at once, 2 to `max_seq_len`.
      stride: tokens from one window to the next, 1 to `window - 1`; half a window by default.
      num_bytes: of the text that the tokens after the first stand for, such as `len(text.encode())`.

    Raises:
      ValueError: A number is out of its range, or the ids are no list of at least two tokens in the vocabulary.
    """
    config = model.config
    window = check_integer("window", window, 2, config.max_seq_len)
    stride = check_integer("stride", max(1, window // 2) if stride is None else stride, 1, window - 1)
    if num_bytes is not None:
        num_bytes = check_integer("num_bytes", num_bytes, 1)
    tokens = check_prompt(ids, vocab_size=config.vocab_size, max_len=np.iinfo(np.int32).max)
    if len(tokens) < 2:
        raise ValueError("the text has one token, and the first is given: nothing is left to score; give it more.")
    found = Perplexity(np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int32), num_bytes)
    for start, first, end in _windows(len(tokens), window, stride):
        logprobs = np.asarray(score(model, tokens[None, start:end], np.array([end - start])).logprob)[0]
        found.logprobs[first:end] = logprobs[first - start :]
        found.contexts[first:end] = np.arange(first - start, end - start)
    return found


def _windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where each window starts, which token is the first that it scores, and where it ends.

    All have one length: the last slides left, so that its tokens have a longer context.

    Example:
      >>> list(_windows(10, 4, 3))
      [(0, 1, 4), (3, 4, 7), (6, 7, 10)]
    """
    first = 1
    for end in range(min(window, num_tokens), num_tokens + stride, stride):
        end = min(end, num_tokens)
        yield max(0, end - window), first, end
        first = end
