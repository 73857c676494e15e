"""Which prompts share a prefix with what the rows of the cache hold. Plain Python, no device."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PrefixMatch:
    """The first `length` tokens of a prompt lie in row `slot`; `is_complete`: all of it, and the logits at its end."""

    slot: int
    length: int
    is_complete: bool


class HeldRows:
    """Which tokens' keys and values each slot's row holds: what later prompts may share, at no memory of its own.

    Args:
      slots: B, rows of the cache.
      max_len: S, tokens that a row holds.

    Attributes:
      tokens: int32 [B, S]; of each row the first `lengths[slot]` mean something.
      lengths: tokens that each row holds.
      prompt_lengths: tokens of the prompt whose last logits are kept with each row; 0 for none.
    """

    def __init__(self, slots: int, max_len: int):
        self.tokens = np.zeros((slots, max_len), np.int32)
        self.lengths = [0] * slots
        self.prompt_lengths = [0] * slots

    def clear(self) -> None:
        """Forgets what every row holds."""
        self.lengths = [0] * len(self.lengths)
        self.prompt_lengths = [0] * len(self.lengths)

    def share(self, match: PrefixMatch, target: int) -> None:
        """Notes that row `target` holds what matches, copied from another row or its own, and nothing else."""
        self.tokens[target, : match.length] = self.tokens[match.slot, : match.length]
        self.lengths[target] = match.length
        self.prompt_lengths[target] = match.length if match.is_complete else 0

    def extend(self, slot: int, tokens: np.ndarray | int, count: int = 1) -> None:
        """Notes that `count` more tokens went into the row."""
        start = self.lengths[slot]
        self.tokens[slot, start : start + count] = tokens
        self.lengths[slot] = start + count

    def keep_logits(self, slot: int) -> None:
        """Notes that the row ends with a prompt, and that the logits at its end are kept with it."""
        self.prompt_lengths[slot] = self.lengths[slot]

    def find(self, prompt: np.ndarray) -> list[PrefixMatch]:
        """What each slot shares with a prompt: at most all but its last token, whose logits must be computed."""
        matches = []
        for slot, held in enumerate(self.lengths):
            if self.prompt_lengths[slot] == len(prompt) and np.array_equal(self.tokens[slot, : len(prompt)], prompt):
                matches.append(PrefixMatch(slot, len(prompt), is_complete=True))
                continue
            most = min(held, len(prompt) - 1)
            differs = np.flatnonzero(self.tokens[slot, :most] != prompt[:most])
            matches.append(PrefixMatch(slot, int(differs[0]) if differs.size else most, is_complete=False))
        return matches
