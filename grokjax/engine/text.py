"""Text in, text out: a tokenizer and a model, one prompt at a time."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jax.typing import DTypeLike

from grokjax.cache import KVCache
from grokjax.engine.scheduler import default_buckets, plan_chunks
from grokjax.engine.stopping import CheckedText, StopFilter
from grokjax.model import Grok, decode_and_sample, prefill
from grokjax.request import stop_strings
from grokjax.sampling import SampleSettings, row_keys, sample_token
from grokjax.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """One continuation.

    Attributes:
      text: decoded, without the end-of-sequence token or the stop string.
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

    Args:
      model: the model.
      tokenizer: its tokenizer.
      max_len: tokens of prompt and continuation together, by default the configuration's longest sequence.
      add_bos: put the beginning-of-sequence token before every prompt; the release does not.
      cache_dtype: of the cache, as in `Grok.new_cache`.

    Raises:
      ValueError: The tokenizer has more tokens than the model, or `max_len` exceeds the longest sequence.
    """

    def __init__(
        self,
        model: Grok,
        tokenizer: Tokenizer,
        *,
        max_len: int | None = None,
        add_bos: bool = False,
        cache_dtype: DTypeLike | None = None,
    ):
        config = model.config
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: use the model's own."
            )
        self.max_len = config.max_seq_len if max_len is None else max_len
        if not 2 <= self.max_len <= config.max_seq_len:
            raise ValueError(f"max_len={max_len} must be between 2 and max_seq_len={config.max_seq_len}.")
        self.model, self.tokenizer, self.add_bos, self.cache_dtype = model, tokenizer, add_bos, cache_dtype

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt, with the beginning-of-sequence token where it is asked for.

        Raises:
          ValueError: There are none, or more than leave room for a continuation.
        """
        return encode_prompt(self.tokenizer, prompt, max_len=self.max_len, add_bos=self.add_bos)

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
        prompt_ids = self.encode(prompt)
        check_limits(max_new_tokens=max_new_tokens, seed=seed)
        settings = SampleSettings.create(1, temperature=temperature, nucleus_p=top_p, top_k=top_k, min_p=min_p)
        ids: list[int] = []
        tokens = _noted(self._tokens(prompt_ids, settings, max_new_tokens, seed, ignore_eos), ids)
        pieces = list(self._pieces(tokens, ignore_eos, stop_strings(stop)))
        stopped = pieces[-1].stopped or (ids[-1] == self.tokenizer.eos_id and not ignore_eos)
        text = "".join(piece.text for piece in pieces)
        return GeneratedText(text, tuple(ids), tuple(prompt_ids), "stop" if stopped else "length")

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
          max_new_tokens: most tokens to draw; fewer at the end-of-sequence token or where `max_len` is reached.
          temperature: divisor of the logits; 0 is greedy.
          top_p: probability mass kept.
          top_k: tokens kept; 0 keeps all.
          min_p: least probability kept, as a fraction of the largest.
          seed: of the draws, 0 to 2**32 - 1; the draw at position p uses `fold_in(key(seed), p)`.
          ignore_eos: go on past the end-of-sequence token.
          stop: strings that end the text, one or several; the text ends before them.

        Raises:
          ValueError: The prompt is empty or too long, a setting is out of range, or a stop string is empty; before any
            work.
        """
        prompt_ids = self.encode(prompt)
        check_limits(max_new_tokens=max_new_tokens, seed=seed)
        settings = SampleSettings.create(1, temperature=temperature, nucleus_p=top_p, top_k=top_k, min_p=min_p)
        tokens = self._tokens(prompt_ids, settings, max_new_tokens, seed, ignore_eos)
        pieces = self._pieces(tokens, ignore_eos, stop_strings(stop))
        return (piece.text for piece in pieces)

    def _pieces(self, ids: Iterator[int], ignore_eos: bool, stop: Sequence[str]) -> Iterator[CheckedText]:
        """The text that each token makes certain, and last what was held back; after a stop string that is nothing."""
        decoder, stops = StreamDecoder(self.tokenizer), StopFilter(stop)
        for token in ids:
            # An empty piece still tells the caller that a token was made.
            piece = stops.push("" if token == self.tokenizer.eos_id and not ignore_eos else decoder.push(token))
            yield piece
            if piece.stopped:
                yield CheckedText("", stopped=True)
                return
        rest = stops.push(decoder.flush())
        yield CheckedText(rest.text + stops.flush(), stopped=rest.stopped)

    def _tokens(
        self, prompt_ids: Sequence[int], settings: SampleSettings, max_new_tokens: int, seed: int, ignore_eos: bool
    ) -> Iterator[int]:
        return self._run(prompt_ids, settings, min(max_new_tokens, self.max_len - len(prompt_ids)), seed, ignore_eos)

    def _run(
        self, prompt_ids: Sequence[int], settings: SampleSettings, num_tokens: int, seed: int, ignore_eos: bool
    ) -> Iterator[int]:
        keys = jax.random.key(seed)[None]
        logits, cache = self._prefill(prompt_ids)
        whole = self.model.whole_rows(logits)
        next_id = sample_token(row_keys(keys, cache.lengths), logits, settings, whole=whole).token_id
        for number in range(num_tokens):
            current = next_id
            if number + 1 < num_tokens:
                # The next step is under way before this step's token is read.
                output, cache = decode_and_sample(self.model, current, cache, settings, keys)
                next_id = output.token_id
            # Indexed here: on the devices that would be a program behind the next step's.
            token = int(np.asarray(current)[0])
            yield token
            if token == self.tokenizer.eos_id and not ignore_eos:
                return

    def _prefill(self, ids: Sequence[int]) -> tuple[jax.Array, KVCache]:
        model = self.model
        cache = model.new_cache(1, self.max_len, dtype=self.cache_dtype)
        logits = None
        for chunk in plan_chunks(0, len(ids), default_buckets(self.max_len)):
            tokens = np.full((1, chunk.bucket), model.config.pad_id)
            tokens[0, : chunk.count] = ids[chunk.start :][: chunk.count]
            logits, cache = prefill(model, tokens, np.array([chunk.count]), cache)
        assert logits is not None
        return logits, cache


def _noted(tokens: Iterator[int], ids: list[int]) -> Iterator[int]:
    """The tokens; those that were taken are appended to `ids`."""
    for token in tokens:
        ids.append(token)
        yield token


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, max_len: int, add_bos: bool) -> list[int]:
    """The tokens of a prompt that is to be continued within `max_len` tokens.

    Raises:
      ValueError: There are none, or more than leave room for a continuation.
    """
    ids = [tokenizer.bos_id] * add_bos + tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty: give it some text, or ask for the beginning-of-sequence token.")
    if len(ids) >= max_len:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and at most {max_len - 1} leave room for a continuation: shorten it."
        )
    return ids


def check_limits(*, max_new_tokens: int, seed: int) -> None:
    """Refuses what a request may not ask for.

    Raises:
      ValueError: There is no token to draw, or the seed has more than 32 bits.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
    # Without 64-bit types JAX keeps the low half of a seed, so two seeds would silently give one text.
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be between 0 and 2**32 - 1.")
