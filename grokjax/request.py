"""What an engine is asked for and what it answers: requests, pieces of a stream, completions."""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import ArrayLike

from grokjax.printing import describe
from grokjax.sampling import EXCLUDED

FinishReason = Literal["stop", "length", "deadline", "cancelled", "error"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Request:
    """A prompt and how to continue it.

    The options are checked here; the prompt, and what depends on the tokenizer and the model, when it is submitted.

    Attributes:
      prompt: text, or token ids in a list or an array.
      max_new_tokens: tokens drawn at most, 0 or more; fewer where something stops them or the slot is full.
      temperature: divisor of the logits, finite, 0 or more; 0 is greedy.
      top_p: probability mass kept, 0 to 1.
      top_k: tokens kept; 0 keeps all.
      min_p: least probability kept, as a fraction of the largest, 0 to 1.
      seed: of the draws, 0 to 2**32 - 1; the draw at position p uses `fold_in(key(seed), p)`.
      allowed_tokens: bool [V], or 0 and 1, true where a token may be drawn; all by default.
      logit_bias: token id -> what is added to its logit before anything else, at most 1e10; minus infinity excludes it.
      stop: strings that end the text, one or several; the text ends before them.
      stop_ids: token ids that end the continuation, as the end-of-sequence token does; any integers, in an array too.
      ignore_eos: go on past the end-of-sequence token.
      logprobs: report each token's log-probability and those of so many most probable tokens; None reports none.
      prompt_logprobs: report how probable each token of the prompt is, and as many of the most probable tokens in its
        place as `logprobs` says. Such a prompt is computed alone.
      n: samples, at most 1024 and the engine's `max_queue`; they share the prefill, and sample i draws as a request
        with the seed `seed + i` would.
      priority: waiting requests of larger priority go first.
      user: any text that names whose request it is. Among requests of one priority that wait, the next slot goes to the
        user who was given the fewest tokens; those without a user count as one user's.
      deadline: seconds from its submission, more than 0, after which it ends with what it has; None for no end.
      guesses: tokens that a step may guess for it, 0 or more, at most the engine's `max_guesses`; None for as many as
        those. Guesses change how fast tokens come, never which.

    Raises:
      ValueError: A number is out of its range, a stop string is empty, or a value is of another kind.
    """

    prompt: str | Sequence[int]
    _: dataclasses.KW_ONLY
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    allowed_tokens: ArrayLike | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    n: int = 1
    priority: int = 0
    user: str | None = None
    deadline: float | None = None
    guesses: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in _INTEGERS:
            if name not in ("logprobs", "guesses") or getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least, most)
        for name, largest in _NUMBERS:
            _check_number(name, getattr(self, name), largest)
        for name in ("ignore_eos", "prompt_logprobs"):
            object.__setattr__(self, name, _boolean(name, getattr(self, name)))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_ids", _integers("stop_ids", self.stop_ids))
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                f"logit_bias={reprlib.repr(self.logit_bias)} must map token ids to numbers, such as {{42: -1.5}}."
            )
        if self.user is not None and not isinstance(self.user, str):
            raise ValueError(f"user={reprlib.repr(self.user)} must be a text, or None.")
        object.__setattr__(self, "deadline", _deadline(self.deadline))

    def __repr__(self) -> str:
        """What is asked for otherwise than by default, each field in short."""
        return _short_repr(self)


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """How probable a token was under the model itself: temperature 1, no mask, no bias, no filter.

    Attributes:
      token_id: the token.
      logprob: its natural log-probability.
      top: the most probable tokens with theirs, best first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """How probable a token of a prompt is under the model itself: temperature 1, no mask, no bias, no filter.

    Attributes:
      token_id: the token.
      logprob: its natural log-probability, given the tokens before it.
      rank: how many tokens are more probable than it.
      entropy: of the distribution that it was expected by, in nats.
      top_id: the token that was most probable in its place.
      top: the most probable tokens in its place with their log-probabilities, best first; as many as the request's
        `logprobs` says.
    """

    token_id: int
    logprob: float
    rank: int
    entropy: float
    top_id: int
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a stream yields: a drawn token with the text that became certain by it, or the text at a sample's end.

    Attributes:
      text: never a part of a character, never a part of a stop string; maybe empty.
      token_id: the token; None in the last piece of a sample.
      sample: which of the request's samples.
      finish_reason: in the last piece of a sample, why it ended.
    """

    text: str
    token_id: int | None
    sample: int = 0
    finish_reason: FinishReason | None = None


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of a completion; None where it did not come so far.

    Attributes:
      queue: from its submission until it had a slot.
      prefill: from there until its first token was read.
      first_token: from its submission until its first token was read.
      decode: from there until its end.
      total: from its submission to its end.
    """

    queue: float | None
    prefill: float | None
    first_token: float | None
    decode: float | None
    total: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Completion:
    """One finished sample of a request.

    Attributes:
      text: decoded behind the prompt, so that it begins with a space where the first word does; without the token or
        string that stopped it; empty where there is no tokenizer.
      token_ids: all tokens drawn, those that stopped it included.
      prompt_ids: the tokens of the prompt; empty if it could not be read.
      finish_reason: "stop" at the end-of-sequence token, a stop id or a stop string; "length" at `max_new_tokens` or
        the end of the slot; "deadline" at its deadline; "cancelled"; "error".
      logprobs: one for each token, if asked for.
      prompt_logprobs: how probable each token of the prompt is given those before, None for the first; as a whole None
        if not asked for, or if the request ended before.
      timings: where the time went.
      sample: which of the request's samples this is.
      error: what ended it, if something failed.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[TokenScore | None, ...] | None
    timings: Timings
    sample: int
    error: Exception | None

    def __repr__(self) -> str:
        """What there is of it, each field in short."""
        return _short_repr(self)


def check_prompt(prompt: object, *, vocab_size: int, max_len: int, is_continued: bool = True) -> np.ndarray:
    """The tokens of a prompt, int32 [n].

    Raises:
      ValueError: It is no list of integers, there are none, one is outside the vocabulary, they exceed `max_len`, or
        they leave no room for a continuation though it is continued.
    """
    given = _array(prompt)
    if given.ndim != 1:
        raise ValueError(f"the prompt must be text or a list of token ids, not {reprlib.repr(prompt)}.")
    if not len(given):
        raise ValueError("the prompt is empty: give it some text, or begin with the beginning-of-sequence token.")
    if len(given) > max_len - is_continued:
        limit = most_tokens(max_len, is_continued=is_continued)
        raise ValueError(f"the prompt has {len(given)} tokens and {limit}: shorten it.")
    # One by one: NumPy takes booleans among integers for integers, and integers of more than 64 bits for objects.
    is_array = np.issubdtype(given.dtype, np.integer) and not isinstance(prompt, list | tuple)
    ids = given if is_array else np.array(_integers("the prompt", prompt), object)
    _check_ids("the prompt", ids, vocab_size)
    return ids.astype(np.int32)


def most_tokens(max_len: int, *, is_continued: bool) -> str:
    """How many tokens a prompt may have where prompt and continuation have `max_len`, for the middle of a sentence."""
    return f"at most {max_len - 1} leave room for a continuation" if is_continued else f"a slot holds {max_len}"


def bias_row(request: Request, vocab_size: int, standing: np.ndarray | None = None) -> np.ndarray | None:
    """What is added to the logits: `logit_bias`, and -1e10 for a token that is not allowed; float32 [V] or None.

    Args:
      request: has the bias and the mask.
      vocab_size: V.
      standing: of every request, float32 [V], 0 or, for tokens that are never drawn, -1e10; None for nothing.

    Raises:
      ValueError: The mask does not fit the vocabulary, a biased token lies outside it, a bias is no number, or no
        token is left.
    """
    if request.allowed_tokens is None and not request.logit_bias:
        return standing
    row = np.zeros(vocab_size, np.float32)
    biases = request.logit_bias or {}
    _check_ids("logit_bias", np.array(_integers("logit_bias", biases), object), vocab_size)
    for token, bias in biases.items():
        if not _is_number(bias) or not _plain(bias) <= -EXCLUDED:
            shown = reprlib.repr(bias)
            raise ValueError(f"logit_bias of token {token} is {shown}: give a number up to 1e10, or minus infinity.")
        row[token] = max(_plain(bias), EXCLUDED)
    if request.allowed_tokens is not None:
        row[~_allowed(request.allowed_tokens, vocab_size)] = EXCLUDED
    if standing is not None:
        row[standing <= EXCLUDED] = EXCLUDED
    if (row <= EXCLUDED).all():
        raise ValueError("the mask and the bias leave no token: at least one must remain to be drawn.")
    return row


def check_stop_ids(stop_ids: Sequence[int], vocab_size: int) -> frozenset[int]:
    """The stop ids as a set.

    Raises:
      ValueError: One is outside the vocabulary: it would never come.
    """
    _check_ids("stop_ids", np.array(stop_ids, object), vocab_size)
    return frozenset(stop_ids)


def _short_repr(value: "Request | Completion") -> str:
    """The fields that say something; of long texts and lists the beginning and the end."""
    given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    defaults = {field.name: field.default for field in dataclasses.fields(value)}
    said = (name for name in given if given[name] is not None and given[name] is not defaults[name])
    return f"{type(value).__name__}({', '.join(f'{name}={reprlib.repr(given[name])}' for name in said)})"


def _array(values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:  # lists of several lengths in a list, which NumPy refuses
        return np.fromiter(values, object)


def _allowed(mask: ArrayLike, vocab_size: int) -> np.ndarray:
    allowed = _array(mask)
    if allowed.shape != (vocab_size,):
        raise ValueError(
            f"allowed_tokens has shape {allowed.shape}: give one value for each of the {vocab_size} tokens."
        )
    wrong = allowed[(allowed != 0) & (allowed != 1)].tolist()
    if wrong:
        raise ValueError(f"allowed_tokens has {reprlib.repr(wrong[0])}: give true or false, or 1 or 0, for each token.")
    return allowed == 1


def _check_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        shown = reprlib.repr(int(wrong[0]))
        raise ValueError(
            f"{name} has the token id {shown}, outside the vocabulary of {vocab_size} tokens: give 0 to "
            f"{vocab_size - 1}."
        )


# Field, least, largest. Without 64-bit types JAX keeps the low half of a seed, so two seeds would give one text.
_INTEGERS = (
    ("max_new_tokens", 0, None),
    ("top_k", 0, 2**31 - 1),
    ("seed", 0, 2**32 - 1),
    ("n", 1, 1024),
    ("priority", None, None),
    ("logprobs", 0, None),
    ("guesses", 0, None),
)
_NUMBERS = (("temperature", float(np.finfo(np.float32).max)), ("top_p", 1.0), ("min_p", 1.0))


def check_integer(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """The value as an `int`; NumPy's integers are taken, booleans are not.

    Raises:
      ValueError: It is no integer, or outside the limits.
    """
    if is_integer(value) and (least is None or value >= least) and (most is None or value <= most):
        return int(value)
    limits = "" if least is None else f", {least} or more" if most is None else f" between {least} and {most}"
    shown = describe(value) if hasattr(value, "dtype") else reprlib.repr(value)
    raise ValueError(f"{name}={shown} must be an integer{limits}.")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, NumPy's among them; booleans are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={reprlib.repr(value)} must be true or false.")
    return bool(value)


def _is_number(value: object) -> TypeGuard[float]:
    return is_integer(value) or isinstance(value, float | np.floating)


def _plain(value: float) -> float:
    """A number as Python's own; an integer stays one, which may be too large for a float."""
    return value if isinstance(value, int) else float(value)


def _integers(name: str, values: object) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={reprlib.repr(values)} must be token ids: give a list of integers.")
    listed = tuple(values)
    wrong = [value for value in listed if not is_integer(value)]
    if wrong:
        raise ValueError(f"{name} has {reprlib.repr(wrong[0])}: token ids are integers.")
    return tuple(int(value) for value in listed)


def _stop_strings(stop: object) -> tuple[str, ...]:
    """Stop strings, given as one or several.

    Raises:
      ValueError: One is empty, or no string.
    """
    listed = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if not all(isinstance(one, str) and one for one in listed):
        shown = reprlib.repr(stop)
        raise ValueError(f"stop={shown} must be strings of at least one character, in a list if there are several.")
    return listed


def _check_number(name: str, value: object, largest: float) -> None:
    if not _is_number(value) or not 0 <= _plain(value) <= largest:
        limits = "from 0 to 1" if largest == 1 else "finite, 0 (greedy) or more"
        raise ValueError(f"{name}={reprlib.repr(value)} must be a number, {limits}.")


def _deadline(seconds: object) -> float | None:
    if seconds is None:
        return None
    if not _is_number(seconds) or not 0 < _plain(seconds) <= float(np.finfo(np.float32).max):
        shown = reprlib.repr(seconds)
        raise ValueError(f"deadline={shown} must be a number of seconds, finite and more than 0, or None.")
    return _plain(seconds)
