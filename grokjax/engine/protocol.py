"""Between an engine and a model: the steps that it asks for, what they are given and what they give back."""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np

from grokjax.model import DrawnRuns, DrawnTokens, Grok, Scores, SlotOptions, SlotSettings


class Pending(Protocol):
    """The tokens that a dispatched step draws."""

    def read(self) -> DrawnTokens:
        """Waits for the step; gives what its rows drew."""


class PendingRuns(Protocol):
    """The runs of tokens that a dispatched step draws which guesses."""

    def read(self) -> DrawnRuns:
        """Waits for the step; gives what its rows drew."""


class PendingScores(Protocol):
    """The scores of a chunk of a prompt, which a dispatched step computes."""

    def read(self) -> Scores[np.ndarray]:
        """Waits for the step; gives the scores, each field [T]."""


class Steps(Protocol):
    """What an engine asks of a model: rows that hold samples, and steps that are dispatched and read later.

    Attributes:
      slots: B, rows.
      vocab_size: V.
      num_top: K, most probable tokens that a request may ask for.
    """

    slots: int
    vocab_size: int
    num_top: int

    @property
    def has_decoded(self) -> bool:
        """Whether a step of `decode` or `decode_guesses` was dispatched; the first may have to be compiled."""

    def prefill(self, tokens: np.ndarray, counts: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> None:
        """Cuts some rows back to `starts` and adds chunks of prompts; keeps the logits at each chunk's end.

        Args:
          tokens: int32 [P, T], right-padded.
          counts: int32 [P], real tokens of each chunk.
          starts: int32 [P], entries that the row holds before.
          rows: int32 [P], different slots.
        """

    def score(
        self, tokens: np.ndarray, targets: np.ndarray, count: int, start: int, row: int, *, wants_top: bool
    ) -> PendingScores:
        """`prefill` of one chunk of one prompt that also scores the token behind each of its positions.

        Args:
          tokens: int32 [T], right-padded.
          targets: int32 [T], the token behind each of these.
          count: how many of the tokens are real.
          start: the position of the first.
          row: which row takes them.
          wants_top: also give the most probable tokens there, as many as a request may ask for.
        """

    def share(self, source: int, target: int, length: int) -> None:
        """Makes row `target` hold the first `length` entries of row `source` and its logits; they may be one row."""

    def set_bias(self, row: int, bias: np.ndarray) -> None:
        """Keeps what is added to a row's logits, float32 [V], for as long as its settings say that it is biased."""

    def begin(self, settings: SlotSettings) -> Pending:
        """Draws the first token of each active row, from the logits that its prefill kept."""

    def decode(self, settings: SlotSettings) -> Pending:
        """Adds the last drawn token of each active row to it, and draws the next."""

    def decode_guesses(self, settings: SlotSettings, limits: np.ndarray, num_guesses: int) -> PendingRuns:
        """Adds the last drawn token of each active row to it, and draws the next and those behind right guesses.

        The tokens are those of as many steps of `decode`. Only for steps that were made with `max_guesses`.

        Args:
          settings: as for `decode`.
          limits: int32 [B, 2], tokens of prompt and continuation that each row may have in all, at most S, and guesses
            that it tries at most, up to G. A row that has all its tokens draws none.
          num_guesses: G, 0 to `max_guesses`; with 0 it only tells whether a guess would have been right.
        """

    def lower(self, name: str, shape: tuple[int, ...]) -> Callable[[], object]:
        """What compiles a step before its first run, as far as that helps; any thread may call it.

        Args:
          name: of the step, such as "prefill".
          shape: as in `WarmedStep`.
        """

    def wait(self) -> None:
        """Waits until the device has done all that was dispatched."""

    def close(self) -> None:
        """Ends what the steps hold beyond this process; nothing is called after it."""


# What makes the steps of a model for an engine.
MakeSteps: TypeAlias = Callable[[Grok, SlotOptions], Steps]
