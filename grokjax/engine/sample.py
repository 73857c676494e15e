"""One sample of a request on its way: its tokens, the text they make, when it ends, and what is reported of it."""

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Sequence

import numpy as np

from grokjax.engine.guessing import HitRate
from grokjax.engine.scheduler import Job
from grokjax.engine.stopping import StopFilter
from grokjax.model import Drawn, RowSettings, Scores
from grokjax.request import Completion, FinishReason, Piece, Request, Timings, TokenLogprob, TokenScore
from grokjax.tokenizer import StreamDecoder, Tokenizer


@dataclasses.dataclass(eq=False, repr=False)
class Handle:
    """A submitted request: what has come of it so far.

    Attributes:
      request: as it was submitted.
      pieces: of the streams of all samples, in the order they came.
      completions: of the samples that have ended, in the order they ended.
    """

    request: Request
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    completions: list[Completion] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        tokens = sum(piece.token_id is not None for piece in self.pieces)
        ended = f"{len(self.completions)} of {self.request.n} samples ended"
        return f"Handle({self.request!r}: {tokens} tokens, {ended})"

    @property
    def is_done(self) -> bool:
        """Whether all samples have ended."""
        return len(self.completions) == self.request.n

    @property
    def completion(self) -> Completion:
        """The completion of the first sample.

        Raises:
          ValueError: It has not ended.
        """
        found = next((completion for completion in self.completions if completion.sample == 0), None)
        if found is None:
            raise ValueError("the request has not ended: run the engine's steps, or call `run()`.")
        return found

    @property
    def samples(self) -> tuple[Completion, ...]:
        """The completions of all samples that have ended, sample 0 first."""
        return tuple(sorted(self.completions, key=lambda completion: completion.sample))


def check_handle(name: str, handle: object) -> None:
    """Refuses what no `submit` returned.

    Raises:
      ValueError: This is no `Handle`; `name` is the method that was given it.
    """
    if not isinstance(handle, Handle):
        raise ValueError(f"{name} takes what submit returned, not {reprlib.repr(handle)}: submit the request first.")


@dataclasses.dataclass
class Times:
    """Moments of a sample's life, in seconds of the engine's clock."""

    submitted: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def until(self, end: float) -> Timings:
        """The seconds between these moments, for a sample that ends at `end`."""
        started, first = self.admitted, self.first_token
        return Timings(
            queue=None if started is None else started - self.submitted,
            prefill=None if started is None or first is None else first - started,
            first_token=None if first is None else first - self.submitted,
            decode=None if first is None else end - first,
            total=end - self.submitted,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class CheckedRequest:
    """What all samples of a request share once it is read and checked; by default that of one that cannot be read.

    Attributes:
      prompt: token ids, int32 [n].
      limit: tokens that a sample may draw: `max_new_tokens`, or fewer where the slot ends first.
      stop_ids: tokens that end a sample, the end-of-sequence token among them unless it is ignored.
      bias: added to the logits, float32 [V]; None for nothing.
      tokenizer: for the text; None for none.
      prompt_logprobs: of the tokens of the prompt, None for the first; the first sample's prefill adds the others.
    """

    prompt: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    limit: int = 0
    stop_ids: frozenset[int] = frozenset()
    bias: np.ndarray | None = None
    tokenizer: Tokenizer | None = None
    prompt_logprobs: list[TokenScore | None] = dataclasses.field(default_factory=lambda: [None])


class LiveSample(Job):
    """A sample that has not ended.

    Args:
      handle: of its request.
      sample: its number in the request.
      checked: what it shares with the other samples.
      submitted: when the request came.

    Attributes:
      row: how the row that it runs in draws.
      dispatched: tokens that the dispatched steps draw, read or not; of one that guesses and is not read, one.
      hits: how often its guesses are right.
      ended: whether its completion is made.
    """

    def __init__(self, handle: Handle, sample: int, checked: CheckedRequest, *, submitted: float):
        request = handle.request
        super().__init__(
            checked.prompt,
            priority=request.priority,
            is_scored=request.prompt_logprobs and sample == 0,
            user=request.user,
            deadline=None if request.deadline is None else submitted + request.deadline,
        )
        self.handle, self.sample = handle, sample
        self.limit, self.stop_ids, self.bias = checked.limit, checked.stop_ids, checked.bias
        self.row = RowSettings(
            temperature=request.temperature,
            top_p=request.top_p,
            min_p=request.min_p,
            top_k=request.top_k,
            seed=(request.seed + sample) % 2**32,
            active=True,
            biased=checked.bias is not None,
            wants_top=bool(request.logprobs),
        )
        self.times = Times(submitted)
        self.dispatched, self.hits, self.ended = 0, HitRate(), False
        self.token_ids: list[int] = []
        self.prompt_logprobs = checked.prompt_logprobs
        self._logprobs: list[TokenLogprob] = []
        self._decoder = None if checked.tokenizer is None else StreamDecoder(checked.tokenizer, checked.prompt)
        self._stop = StopFilter(request.stop)
        self._text: list[str] = []
        self._text_is_over = False

    def push(self, drawn: Drawn, now: float) -> FinishReason | None:
        """Takes the next token; says why the sample ends with it, if it does.

        Raises:
          ValueError: The logits that it was drawn from are not finite, or what a tokenizer raises.
        """
        _check_finite([drawn.logprob, *drawn.top_logprobs[: self.handle.request.logprobs or 0]])
        self.times.first_token = now if self.times.first_token is None else self.times.first_token
        self.times.last_token = now
        token = drawn.token_id
        self.token_ids.append(token)
        self._note_logprob(drawn)
        text, stopped = "", token in self.stop_ids
        if not stopped and self._decoder is not None:
            checked = self._stop.push(self._decoder.push(token))
            text, stopped = checked.text, checked.stopped
            self._text_is_over = stopped
        self._emit(text, token)
        if stopped:
            return "stop"
        return "length" if len(self.token_ids) >= self.limit else None

    def push_scores(self, scores: Scores[np.ndarray], count: int) -> None:
        """Takes the first `count` scores, those of the next tokens of the prompt; what comes after its end is not one.

        Raises:
          ValueError: A log-probability is not finite.
        """
        known = len(self.prompt_logprobs)
        tokens = self.prompt[known : known + count].tolist()
        self.prompt_logprobs.extend(token_scores(tokens, scores, self.handle.request.logprobs or 0))

    def finish(self, reason: FinishReason, now: float, error: Exception | None = None) -> Completion:
        """Ends the sample: its last piece and its completion go to the handle."""
        rest, reason = self._flush(reason)
        self._emit(rest, None, reason)
        request, self.ended = self.handle.request, True
        scored = request.prompt_logprobs and len(self.prompt_logprobs) == len(self.prompt)
        completion = Completion(
            text="".join(self._text),
            token_ids=tuple(self.token_ids),
            prompt_ids=tuple(self.prompt.tolist()),
            finish_reason=reason,
            logprobs=None if request.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs) if scored else None,
            timings=self.times.until(now),
            sample=self.sample,
            error=error,
        )
        self.handle.completions.append(completion)
        return completion

    def _note_logprob(self, drawn: Drawn) -> None:
        if self.handle.request.logprobs is not None:
            top = _most_probable(drawn.top_ids, drawn.top_logprobs, self.handle.request.logprobs)
            self._logprobs.append(TokenLogprob(drawn.token_id, drawn.logprob, top))

    def _emit(self, text: str, token: int | None, reason: FinishReason | None = None) -> None:
        self._text.append(text)
        self.handle.pieces.append(Piece(text, token, self.sample, reason))

    def _flush(self, reason: FinishReason) -> tuple[str, FinishReason]:
        """The text that was held back; the rest of an unfinished character may still complete a stop string."""
        if self._text_is_over:
            return "", reason
        if self._decoder is None or reason == "error":
            return self._stop.flush(), reason
        checked = self._stop.push(self._decoder.flush())
        if checked.stopped:
            return checked.text, "stop" if reason == "length" else reason
        return checked.text + self._stop.flush(), reason


def token_scores(tokens: Sequence[int], scores: Scores[np.ndarray], num_top: int) -> list[TokenScore]:
    """What a model says of some tokens.

    Args:
      tokens: n of them.
      scores: of these, each field [n, ...]; what comes after them is passed over.
      num_top: how many of the most probable tokens are told, where there are some.

    Raises:
      ValueError: A log-probability is not finite.
    """
    fields = scores.logprob, scores.rank, scores.entropy, scores.top_id
    found = [TokenScore(*values) for values in zip(tokens, *(field.tolist() for field in fields), strict=False)]
    if scores.top_ids is not None and scores.top_logprobs is not None:
        best = (_most_probable(*both, num_top) for both in zip(scores.top_ids, scores.top_logprobs, strict=True))
        found = [dataclasses.replace(score, top=top) for score, top in zip(found, best, strict=False)]
    _check_finite(logprob for score in found for logprob in (score.logprob, *dict(score.top).values()))
    return found


def _most_probable(ids: np.ndarray, logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The first of the most probable tokens [K], with their log-probabilities."""
    return tuple(zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True))


def _check_finite(logprobs: Iterable[float]) -> None:
    """Refuses what a model with NaN or infinite values makes: of finite logits every log-probability is finite."""
    if not all(map(math.isfinite, logprobs)):
        raise ValueError(
            "the model's logits are not finite: look for NaN or infinite weights with grokjax verify --finite, or "
            "compute in float32."
        )
