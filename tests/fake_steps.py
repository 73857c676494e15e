"""A model whose tokens can be computed by hand, behind the same steps as the real one.

Its cache is honest: an entry depends on all tokens before it, and the next token is computed from what the row really
holds, so a wrong copy, a wrong length or a neighbour's token gives a wrong continuation.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from grokjax.config import GrokConfig
from grokjax.engine import Engine
from grokjax.model import DrawnRuns, DrawnTokens, Scores, SlotOptions, SlotSettings
from grokjax.request import Completion

VOCAB = 32
EOS = 2


@dataclasses.dataclass(eq=False)
class FakeModel:
    """Stands where a `Grok` stands; `steps` are those that an engine made of it, the last one if there are several.

    Attributes:
      repeats: whether its text repeats itself for most of the time.
    """

    config: GrokConfig = dataclasses.field(
        default_factory=lambda: GrokConfig.tiny().replace(vocab_size=VOCAB, eos_id=EOS, max_seq_len=256)
    )
    repeats: bool = False
    steps: "FakeSteps" = dataclasses.field(init=False, repr=False)


def entry_after(entry: int, token: int) -> int:
    """What a row holds for a token whose predecessor's entry is given; 1 before the first."""
    return (entry * 31 + token + 7) % 1_000_003


def draw(entry: int, seed: int, position: int, bias: np.ndarray | None = None, *, repeats: bool = False) -> int:
    """The token at `position`, after a row that ends with `entry`; as a rule the next of three, if it repeats."""
    token = (entry + 13 * seed + 5 * position) % VOCAB
    if repeats and token % 16:
        token = 10 + position % 3
    while bias is not None and bias[token] <= -1e9:
        token = (token + 1) % VOCAB
    return token


def continuation(
    prompt: Sequence[int], count: int, *, seed: int = 0, bias: np.ndarray | None = None, repeats: bool = False
) -> list[int]:
    """`count` tokens after a prompt, by hand."""
    entry, tokens = 1, []
    for token in prompt:
        entry = entry_after(entry, token)
    for position in range(len(prompt), len(prompt) + count):
        tokens.append(draw(entry, seed, position, bias, repeats=repeats))
        entry = entry_after(entry, tokens[-1])
    return tokens


def looked_up(text: list[int], count: int) -> list[int]:
    """The next tokens as a reader would guess them: what came where the end of the text was before; maybe nothing.

    Without its last token, if that came nowhere: it may be what was changed in a copy.
    """
    for size, changed in ((3, 0), (2, 0), (3, 1)):
        end = len(text) - changed
        for place in range(len(text) - 1, size + changed - 1, -1):
            if text[place - changed - size : place - changed] == text[:end][-size:]:
                copied = list(text)
                for i in range(count):
                    copied.append(copied[place + i])
                return copied[len(text) :]
    return []


@dataclasses.dataclass
class FakePending:
    """What a step drew; `read` notes when the engine looked at it."""

    steps: "FakeSteps"
    drawn: DrawnTokens | DrawnRuns
    number: int

    def read(self) -> DrawnTokens | DrawnRuns:
        self.steps.note_read(self.number)
        return self.drawn


@dataclasses.dataclass
class FakeScores:
    """The scores of a chunk of a prompt; `read` notes the same."""

    steps: "FakeSteps"
    scores: Scores[np.ndarray]
    number: int

    def read(self) -> Scores[np.ndarray]:
        self.steps.note_read(self.number)
        return self.scores


class FakeSteps:
    """`Steps` in plain Python.

    Attributes:
      rows: what each slot's row holds, as `entry_after` gives it.
      texts: the tokens of each row, the last drawn one included.
      log: what was dispatched and read, in order; kept short.
      unread: numbers of the steps whose tokens or scores the engine has not read.
      error: raised by the next step, if set.
      has_decoded: see `Steps`.
    """

    def __init__(self, model: FakeModel, options: SlotOptions):
        model.steps = self
        self.repeats = model.repeats
        slots, self.max_len, self.num_top = options.slots, options.max_len, options.num_top
        self.slots, self.vocab_size = slots, model.config.vocab_size
        self.rows: list[list[int]] = [[] for _ in range(slots)]
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self.prompt_ends = [1] * slots
        self.tokens = [0] * slots
        self.bias = np.zeros((slots, self.vocab_size), np.float32)
        self.log: list[tuple] = []
        self.unread: set[int] = set()
        self.error: Exception | None = None
        self.programs = 0
        self.compiled: list[tuple[str, tuple[int, ...]]] = []
        self.is_closed = self.has_decoded = False

    def prefill(self, tokens: np.ndarray, counts: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> None:
        self._dispatch("prefill", tokens.shape)
        assert len(set(rows.tolist())) == len(rows)
        for chunk, count, start, row in zip(tokens, counts, starts, rows, strict=True):
            self._fill(chunk, int(count), int(start), int(row))

    def score(
        self, tokens: np.ndarray, targets: np.ndarray, count: int, start: int, row: int, *, wants_top: bool
    ) -> FakeScores:
        number = self._dispatch("score", tokens.shape)
        self._fill(tokens, count, start, row)
        self.unread.add(number)
        surprise = targets + start + np.arange(len(targets))
        scores = Scores(-surprise.astype(np.float32), surprise, surprise.astype(np.float32) / 2, targets + 1)
        if wants_top:
            top = (targets[:, None] + 1 + np.arange(self.num_top)) % self.vocab_size
            scores = dataclasses.replace(scores, top_ids=top, top_logprobs=-(top / 8).astype(np.float32))
        return FakeScores(self, scores, number)

    def share(self, source: int, target: int, length: int) -> None:
        self._dispatch("share", (source, target, length))
        assert len(self.rows[source]) >= length
        self.rows[target] = self.rows[source][:length]
        self.texts[target] = self.texts[source][:length]
        self.prompt_ends[target] = self.prompt_ends[source]

    def set_bias(self, row: int, bias: np.ndarray) -> None:
        self.bias[row] = bias

    def begin(self, settings: SlotSettings) -> FakePending:
        number = self._dispatch("begin", settings)
        return self.draw_rows(settings, self.prompt_ends, number)

    def decode(self, settings: SlotSettings) -> FakePending:
        return self._decode_rows(settings, self._dispatch("decode", settings))

    def decode_guesses(self, settings: SlotSettings, limits: np.ndarray, num_guesses: int) -> FakePending:
        number = self._dispatch("decode_guesses", (limits.tolist(), num_guesses))
        left = limits[:, 0] - np.array([len(row) for row in self.rows]) - 1
        running = settings.active & (left > 0)
        found = [looked_up(text, max(1, num_guesses)) for text in self.texts]
        tried = np.minimum([len(own) for own in found], np.minimum(limits[:, 1], np.maximum(left - 1, 0)))
        looked = np.where(running, np.minimum([len(own) for own in found], tried + 1), 0)
        made, right, tokens = np.zeros(self.slots, int), np.zeros(self.slots, int), []
        for place in range(1 + num_guesses):
            drawn = self._decode_rows(dataclasses.replace(settings, active=running), number).drawn
            tokens.append(drawn)
            made += running
            is_right = running & (place < looked)
            for row in np.flatnonzero(is_right).tolist():
                is_right[row] = found[row][place] == drawn.token_ids[row]
            right += is_right
            running = is_right & (place < tried)
        self.unread.add(number)
        return FakePending(self, DrawnRuns(tuple(tokens), np.stack([made, tried, looked, right], axis=1)), number)

    def _decode_rows(self, settings: SlotSettings, number: int) -> FakePending:
        ends = [0] * self.slots
        for row in np.flatnonzero(settings.active).tolist():
            assert 0 < len(self.rows[row]) < self.max_len
            self.rows[row].append(entry_after(self.rows[row][-1], self.tokens[row]))
            ends[row] = self.rows[row][-1]
        return self.draw_rows(settings, ends, number)

    def draw_rows(self, settings: SlotSettings, ends: list[int], number: int) -> FakePending:
        """The next token of each active row, which ends with the entry of `ends`; what a test lets a model draw."""
        self.unread.add(number)
        ids = np.zeros(self.slots, np.int32)
        for row in np.flatnonzero(settings.active).tolist():
            bias = self.bias[row] if settings.biased[row] else None
            position = len(self.rows[row])
            token = draw(ends[row], int(settings.seed[row]), position, bias, repeats=self.repeats)
            ids[row] = self.tokens[row] = token
            self.texts[row][position:] = [token]
        top = (ids[:, None] + np.arange(self.num_top)) % self.vocab_size
        logprobs = -(ids / 8).astype(np.float32)
        return FakePending(self, DrawnTokens(ids, logprobs, top, -(top / 8).astype(np.float32)), number)

    def lower(self, name: str, shape: tuple[int, ...]) -> Callable[[], object]:
        return lambda: self.compiled.append((name, shape))

    def wait(self) -> None:
        self.log.append(("wait", self.programs))

    def close(self) -> None:
        self.is_closed = True

    def note_read(self, number: int) -> None:
        self.unread.discard(number)
        self.log.append(("read", number))

    def _dispatch(self, name: str, what: object) -> int:
        if self.error is not None:
            raise self.error
        self.programs += 1
        self.has_decoded |= name.startswith("decode")
        self.log.append((name, self.programs, what))
        del self.log[:-50]
        return self.programs

    def _fill(self, chunk: np.ndarray, count: int, start: int, row: int) -> None:
        assert 1 <= count <= len(chunk)
        assert start + count <= self.max_len
        assert len(self.rows[row]) >= start
        del self.rows[row][start:]
        self.texts[row][start:] = chunk[:count].tolist()
        for token in chunk[:count].tolist():
            self.rows[row].append(entry_after(self.rows[row][-1] if self.rows[row] else 1, token))
        self.prompt_ends[row] = self.rows[row][-1]


class Letters:
    """Token t is the letter number t; 30 and 31 are the two halves of an accented one, told apart only together."""

    vocab_size, pad_id, bos_id, eos_id = VOCAB, 0, 1, EOS

    def encode(self, text: str) -> list[int]:
        if text == "?":
            raise KeyError("no such letter")
        return [ord(letter) - ord("a") + 3 for letter in text]

    def decode(self, ids) -> str:
        data = b"".join(
            {30: b"\xc3", 31: b"\xa9"}.get(token, bytes([token - 3 + ord("a")]) if token > 2 else b"") for token in ids
        )
        return data.decode(errors="replace")


def make_engine(tokenizer=None, *, model: FakeModel | None = None, **options) -> Engine:
    """An engine of three slots of 64 entries, unless the options say otherwise, over the fake model."""
    defaults = {"slots": 3, "max_len": 64, "prefill_buckets": (4, 8), "make_steps": FakeSteps}
    return Engine(model or FakeModel(), tokenizer, **{**defaults, **options})


def expected(prompt: list[int], *, limit: int, seed: int = 0, stop_ids: tuple[int, ...] = (EOS,)) -> list[int]:
    """The tokens that follow a prompt by hand, up to the first of `stop_ids`."""
    tokens = continuation(prompt, limit, seed=seed)
    ends = [number for number, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def prompt_logprobs(done: Completion) -> list[float | None]:
    """The log-probabilities of a prompt's tokens, None for the first."""
    return [score and score.logprob for score in done.prompt_logprobs]


def scripted(tokens: list[int]):
    """Steps that draw given tokens, whatever the prompt."""

    class Scripted(FakeSteps):
        def draw_rows(self, settings, ends, number):
            pending = super().draw_rows(settings, ends, number)
            for row, entries in enumerate(self.rows):
                at = len(entries) - 1  # prompts of one token
                pending.drawn.token_ids[row] = tokens[at] if 0 <= at < len(tokens) else 3
            return pending

    return Scripted
