"""How many tokens a step guesses: as many as pay, and none where the text does not repeat itself. Plain Python."""

import collections
import statistics
from collections.abc import Sequence

# Guesses for which a step is compiled, as far as they are allowed: few, for each takes a compilation.
_COUNTS = (3, 7, 15)
# What the guesses of a row weigh, each against the next one; and those of all rows, by which a new one is judged.
_MEMORY, _MEMORY_OF_ALL = 0.9, 0.99
# Guesses of which less is expected are not tried, nor does a step guess that gains less over one that does not.
_LEAST_GAIN = 0.05
# Steps of each kind whose time is remembered, and steps after which the oldest of each kind is forgotten, so that one
# that was slow by chance is tried again.
_TIMES, _FORGOTTEN_AFTER = 8, 256
# Tokens whose products take as long as reading the weights does, roughly and on any device.
_FREE_TOKENS = 128


class HitRate:
    """How often the guesses of one row are right, lately: after one that was, and after one that was not.

    The two differ: where a text repeats, right guesses come in long runs.

    Args:
      memory: what a guess weighs against the next one, above 0 and below 1.

    Example:
      >>> hits = HitRate()
      >>> for right in (0, 0, 7, 7):
      ...     hits.note(looked=7, right=right)
      >>> 6 < hits.expected(7) < 7
      True
    """

    def __init__(self, memory: float = _MEMORY) -> None:
        self._memory = memory
        self._right, self._seen = [0.0, 0.0], [0.0, 0.0]  # after a wrong one, after a right one
        self._was_right = False

    def note(self, *, looked: int, right: int, others: "HitRate | None" = None) -> None:
        """Notes a step: how many guesses were looked at, and how many of them, from the first on, were right.

        That there was none to look at, because nothing like the end of the text came before, counts as a wrong one.

        Args:
          looked: guesses that were looked at.
          right: of them, from the first on, those that were right.
          others: the rate of all rows, which notes the same.
        """
        for is_right in [True] * right + [False] * (right < looked or not looked):
            for rate in (self,) if others is None else (self, others):
                rate.add(is_right, after_right=self._was_right)
            self._was_right = is_right

    def expected(self, count: int, others: "HitRate | None" = None) -> float:
        """How many of the next `count` guesses are right, from the first on, as far as this can be known.

        Args:
          count: guesses.
          others: what the row is like as long as little is known of it; by default half of its guesses would be right.
        """
        after_wrong, after_right = (self.rate(after_right=kind, others=others) for kind in (False, True))
        first = after_right if self._was_right else after_wrong
        return first * (1 - after_right**count) / (1 - after_right)

    def rate(self, *, after_right: bool, others: "HitRate | None" = None) -> float:
        """How many of the guesses after one that was right, or was not, are right: of 1, and never all or none.

        Half of a guess that nobody saw is added, as right as those of `others`.
        """
        unseen = 0.5 if others is None else others.rate(after_right=after_right)
        return (self._right[after_right] + 0.5 * unseen) / (self._seen[after_right] + 0.5)

    def add(self, is_right: bool, *, after_right: bool) -> None:
        """Notes one guess, and whether the one before it was right."""
        self._right[after_right] = self._memory * self._right[after_right] + is_right
        self._seen[after_right] = self._memory * self._seen[after_right] + 1


class Guessing:
    """Chooses how many tokens a step guesses, by what its rows had right and by what such steps took.

    What it chooses changes how fast tokens come, never which.

    Args:
      max_guesses: most tokens that a step may guess, 1 or more.
      experts_per_token: as a part of all experts: what one token reads of them.

    Attributes:
      counts: guesses for which there is a step, from 0 to `max_guesses`.
    """

    def __init__(self, max_guesses: int, experts_per_token: float):
        self.counts = (0, *(count for count in _COUNTS if count < max_guesses), max_guesses)
        self._read, self._all = experts_per_token, HitRate(_MEMORY_OF_ALL)
        self._times: dict[tuple[int, int], collections.deque[float]] = {}
        self._noted = 0

    def choose(self, rows: Sequence[tuple[HitRate, int]]) -> tuple[int, list[int]]:
        """The guesses of the next step: those of its program, and how many each row tries.

        Args:
          rows: of each the rate, and how many guesses it may try.
        """
        best, chosen, best_rate = 0, frozenset[int](), (1 + _LEAST_GAIN) * len(rows) / self._seconds(0, len(rows))
        for count in self.counts[1:]:
            gains = [hits.expected(min(count, most), self._all) for hits, most in rows]
            order = sorted((row for row, gain in enumerate(gains) if gain > _LEAST_GAIN), key=lambda row: -gains[row])
            made, computed = float(len(rows)), len(rows)
            for place, row in enumerate(order):
                made, computed = made + gains[row], computed + min(count, rows[row][1])
                rate = made / self._seconds(count, computed)
                if rate > best_rate:
                    best, chosen, best_rate = count, frozenset(order[: place + 1]), rate
        return best, [min(best, most) if row in chosen else 0 for row, (_, most) in enumerate(rows)]

    def note_guesses(self, hits: HitRate, *, looked: int, right: int) -> None:
        """Notes what a row had right in a step, as `HitRate.note` says, for it and for those that come."""
        hits.note(looked=looked, right=right, others=self._all)

    def note_seconds(self, count: int, computed: int, seconds: float) -> None:
        """Notes what a step took that computed so many tokens: those of its rows, and the guesses that they tried."""
        if seconds > 0:
            times = self._times.setdefault(_kind(count, computed), collections.deque(maxlen=_TIMES))
            times.append(seconds / self._usual(computed))
        self._noted += 1
        if self._noted % _FORGOTTEN_AFTER == 0:
            for times in self._times.values():
                times.popleft()
            self._times = {kind: times for kind, times in self._times.items() if times}

    def _seconds(self, count: int, computed: int) -> float:
        """What a step takes: by those of its kind, or by what is known of the kind that is most like it."""
        kind = _kind(count, computed)
        if kind not in self._times and self._times:
            kind = min(self._times, key=lambda known: (abs(known[1] - kind[1]), abs(known[0] - kind[0])))
        return self._usual(computed) * statistics.median(self._times.get(kind, (1.0,)))

    def _usual(self, computed: int) -> float:
        """What a step takes, against another: it reads the experts that a token uses, and multiplies each token."""
        return (1 - (1 - self._read) ** computed) * (1 + computed / _FREE_TOKENS)


def _kind(count: int, computed: int) -> tuple[int, int]:
    """Steps of one kind take about the same for each token that they compute."""
    return count, computed.bit_length()
