"""How requests come in: what depends on the tokenizer and the model is checked, and samples are made of them."""

import dataclasses
import functools
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from grokjax.config import GrokConfig
from grokjax.engine.sample import CheckedRequest, Handle, LiveSample
from grokjax.request import Request, bias_row, check_prompt, check_stop_ids, is_integer, most_tokens
from grokjax.sampling import EXCLUDED
from grokjax.tokenizer import Tokenizer

# Characters for each token that a slot holds, of which a longer text's beginning is looked at first.
_CHARACTERS = 16


@dataclasses.dataclass(frozen=True)
class Intake:
    """Turns requests into samples: what depends on the tokenizer and the model is checked here.

    Attributes:
      tokenizer: None where requests give and get token ids.
      config: of the model.
      max_len: S, tokens that a slot holds.
      max_logprobs: most probable tokens that a request may ask for.
      add_bos: whether prompts that are text begin with the beginning-of-sequence token.

    Raises:
      ValueError: A number is out of range, or the tokenizer is none, or has more tokens than the model.
    """

    tokenizer: Tokenizer | None
    _: dataclasses.KW_ONLY
    config: GrokConfig
    max_len: int
    max_logprobs: int
    add_bos: bool

    def __post_init__(self) -> None:
        config, tokenizer = self.config, self.tokenizer
        if tokenizer is not None and not hasattr(tokenizer, "vocab_size"):
            raise ValueError(
                f"the tokenizer must be one such as load_tokenizer(path) makes, not {reprlib.repr(tokenizer)}."
            )
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: use the model's own."
            )
        if not is_integer(self.max_len) or not 2 <= self.max_len <= config.max_seq_len:
            shown = reprlib.repr(self.max_len)
            raise ValueError(f"max_len={shown} must be between 2 and max_seq_len={config.max_seq_len}.")
        if not is_integer(self.max_logprobs) or not 0 <= self.max_logprobs <= config.vocab_size:
            shown = reprlib.repr(self.max_logprobs)
            raise ValueError(f"max_logprobs={shown} must be between 0 and the {config.vocab_size} tokens there are.")

    def check(self, request: object) -> None:
        """Refuses what is no request of this engine at all, as `submit` does before it takes any.

        Raises:
          ValueError: It is something else, such as a prompt; or it has text and there is no tokenizer.
        """
        if not isinstance(request, Request):
            raise ValueError(f"submit takes a request, not {reprlib.repr(request)}: make one with Request(prompt).")
        if isinstance(request.prompt, str):
            self._tokenizer_for_prompts()
        if self.tokenizer is None and request.stop:
            raise ValueError("stop strings need a tokenizer: give one to the engine, or stop at `stop_ids`.")

    def encode(self, prompt: str | Sequence[int], *, is_continued: bool = True) -> np.ndarray:
        """The tokens of a prompt, int32 [n]; those of a text begin with the beginning-of-sequence token if `add_bos`.

        Raises:
          ValueError: There are none, or more than leave room for a continuation if it is continued, else than a slot
            holds; one is outside the vocabulary; or the prompt is text and there is no tokenizer.
          Exception: Whatever the tokenizer raises.
        """
        if isinstance(prompt, str):
            tokenizer = self._tokenizer_for_prompts()
            self._check_beginning(tokenizer, prompt, is_continued=is_continued)
            prompt = [tokenizer.bos_id] * self.add_bos + tokenizer.encode(prompt)
        return check_prompt(prompt, vocab_size=self.config.vocab_size, max_len=self.max_len, is_continued=is_continued)

    def _check_beginning(self, tokenizer: Tokenizer, text: str, *, is_continued: bool) -> None:
        """Refuses a text by its beginning where that is too long by far: to encode all of it may take minutes."""
        size = _CHARACTERS * self.max_len
        while size < len(text):
            count = len(tokenizer.encode(text[:size]))
            if count > 2 * self.max_len:  # a cut adds or takes a few tokens
                raise ValueError(
                    f"the first {size} of the prompt's {len(text)} characters have {count} tokens and "
                    f"{most_tokens(self.max_len, is_continued=is_continued)}: shorten it."
                )
            size *= 4

    @functools.cached_property
    def _standing_bias(self) -> np.ndarray | None:
        """What excludes the ids of a padded vocabulary, which no tokenizer knows, float32 [V]; None if there are none.

        All requests share this one row.
        """
        known, vocab_size = (self.tokenizer or self.config).vocab_size, self.config.vocab_size
        return None if known == vocab_size else np.where(np.arange(vocab_size) < known, 0, EXCLUDED).astype(np.float32)

    def samples(self, handle: Handle, now: float) -> list[LiveSample]:
        """The samples of a checked request that came now.

        Raises:
          ValueError: The prompt, the mask, the bias or a stop id does not fit.
          Exception: Whatever the tokenizer raises.
        """
        request = handle.request
        self.check_logprobs(request)
        vocab_size, eos_id = self.config.vocab_size, (self.tokenizer or self.config).eos_id
        prompt = self.encode(request.prompt, is_continued=request.max_new_tokens > 0)
        ends = frozenset() if request.ignore_eos else frozenset({eos_id})
        checked = CheckedRequest(
            prompt=prompt,
            limit=min(request.max_new_tokens, self.max_len - len(prompt)),
            stop_ids=check_stop_ids(request.stop_ids, vocab_size) | ends,
            bias=bias_row(request, vocab_size, self._standing_bias),
            tokenizer=self.tokenizer,
        )
        return [LiveSample(handle, number, checked, submitted=now) for number in range(request.n)]

    def check_logprobs(self, request: Request) -> None:
        """Checks that a request asks for no more of the most probable tokens than there may be.

        Raises:
          ValueError: It asks for more.
        """
        if request.logprobs is not None and request.logprobs > self.max_logprobs:
            shown = reprlib.repr(request.logprobs)
            raise ValueError(f"logprobs={shown} exceeds the engine's max_logprobs={self.max_logprobs}: ask for fewer.")

    def _tokenizer_for_prompts(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("the prompt is text and the engine has no tokenizer: give it one, or token ids.")
        return self.tokenizer


def iterate_requests(requests: object) -> Iterator[Any]:
    """What several requests are taken from, one by one.

    Raises:
      ValueError: It is nothing to take requests from.
    """
    if not isinstance(requests, Iterable):
        raise ValueError(f"as_completed takes requests in a list, not {reprlib.repr(requests)}.")
    return iter(requests)


def list_prompts(prompts: object) -> list[Any]:
    """Several prompts in a list.

    Raises:
      ValueError: It is one prompt alone, each of whose letters or tokens would be taken for a prompt.
    """
    if not isinstance(prompts, str) and isinstance(prompts, Iterable):
        listed = list(prompts)
        if not any(is_integer(prompt) for prompt in listed):
            return listed
    raise ValueError(
        f"generate takes a list of prompts, not {reprlib.repr(prompts)}: put the text, or the list of token ids, into "
        "a list."
    )
