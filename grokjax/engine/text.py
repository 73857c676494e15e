"""Text in, text out: one prompt at a time, each alone in an engine of one slot."""

import dataclasses
from collections.abc import Iterator, Sequence

from jax.typing import DTypeLike

from grokjax.engine.engine import Engine
from grokjax.engine.intake import Intake
from grokjax.model import Grok
from grokjax.request import Completion, FinishReason, Request, check_integer
from grokjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """One continuation of a prompt.

    Attributes:
      text: decoded behind the prompt, so that both together are what the model continued; without the end-of-sequence
        token or the stop string.
      token_ids: the tokens drawn, the end-of-sequence token included.
      prompt_ids: the tokens of the prompt.
      finish_reason: "stop" at the end-of-sequence token or a stop string, "length" at the token limit or the end of the
        cache.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: FinishReason


class TextGenerator:
    """Continues prompts with a model and its tokenizer.

    Every call makes an engine of one slot and closes it at its end, so nothing is kept from one to the next. Where the
    model spans processes, the first makes the calls, and for each of them the others call `follow`.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      max_len: tokens of prompt and continuation together, by default the configuration's longest sequence.
      max_guesses: tokens that a step may guess, as of `Engine`.
      add_bos: put the beginning-of-sequence token before every prompt; the release does not.
      cache_dtype: of the cache, as in `Grok.new_cache`.
      allow_oom: try it even where the devices have too little memory left for the cache.

    Raises:
      ValueError: The tokenizer has more tokens than the model, or `max_len` exceeds the longest sequence.
    """

    def __init__(
        self,
        model: Grok,
        tokenizer: Tokenizer,
        *,
        max_len: int | None = None,
        max_guesses: int = 0,
        add_bos: bool = False,
        cache_dtype: DTypeLike | None = None,
        allow_oom: bool = False,
    ):
        self.model, self.tokenizer, self.add_bos = model, tokenizer, add_bos
        self.max_guesses, self.cache_dtype, self.allow_oom = max_guesses, cache_dtype, allow_oom
        self.max_len = model.config.max_seq_len if max_len is None else max_len
        self._intake = Intake(tokenizer, config=model.config, max_len=self.max_len, max_logprobs=0, add_bos=add_bos)

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt, with the beginning-of-sequence token where it is asked for.

        Raises:
          ValueError: There are none, or more than leave room for a continuation.
        """
        return self._intake.encode(prompt).tolist()

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = False,
        stop: str | Sequence[str] = (),
    ) -> GeneratedText:
        """The whole continuation of a prompt; the arguments are those of `stream`."""
        request = Request(
            self.encode(prompt),
            max_new_tokens=check_integer("max_new_tokens", max_new_tokens, 1),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            ignore_eos=ignore_eos,
            stop=stop,
        )
        with self.engine() as engine:
            handle = engine.submit(request)
            engine.run()
        done = _without_error(handle.completion)
        return GeneratedText(done.text, done.token_ids, done.prompt_ids, done.finish_reason)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = False,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Pieces of the continuation as they are made, one for each token, never a part of a character.

        Args:
          prompt: the text to continue.
          max_new_tokens: most tokens to draw, 1 or more; fewer at the end-of-sequence token or where `max_len` is
            reached.
          temperature: divisor of the logits; 0 is greedy.
          top_p: probability mass kept.
          top_k: tokens kept; 0 keeps all.
          min_p: least probability kept, as a fraction of the largest.
          seed: of the draws, 0 to 2**32 - 1; the draw at position p uses `fold_in(key(seed), p)`.
          ignore_eos: go on past the end-of-sequence token.
          stop: strings that end the text, one or several; the text ends before them.

        Raises:
          ValueError: The prompt is empty or too long, a setting is out of range, or a stop string is empty: before any
            work. In the course of it: the logits are not finite.
        """
        request = Request(
            self.encode(prompt),
            max_new_tokens=check_integer("max_new_tokens", max_new_tokens, 1),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            ignore_eos=ignore_eos,
            stop=stop,
        )
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[str]:
        with self.engine() as engine:
            handle = engine.submit(request)
            for piece in engine.stream(handle):
                yield piece.text
        _without_error(handle.completion)

    def engine(self) -> Engine:
        """A new engine such as each call makes: of one slot, for prompts that are encoded; close it at its end."""
        return Engine(
            self.model,
            self.tokenizer,
            slots=1,
            max_len=self.max_len,
            prefill_rows=1,
            max_logprobs=0,
            max_guesses=self.max_guesses,
            cache_dtype=self.cache_dtype,
            allow_oom=self.allow_oom,
        )


def _without_error(completion: Completion) -> Completion:
    if completion.error is not None:
        raise completion.error
    return completion
