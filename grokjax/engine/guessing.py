"""How many tokens a step guesses: as many as pay, and none where the text does not repeat itself. Plain Python."""

import collections
import statistics
from collections.abc import Sequence

# Guesses for which a step is compiled, as far as they are allowed: few, for each takes a compilation.
_COUNTS = (3, 7, 15)
# What the guesses of a row weigh, each against the next one.
_MEMORY = 0.9
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

    Example:
      >>> hits = HitRate()
      >>> for right in (0, 0, 7, 7):
      ...     hits.note(looked=7, right=right)
      >>> 6 < hits.expected(7) < 7
      True
    """

    def __init__(self) -> None:
        self._right, self._seen = [0.0, 0.0], [0.0, 0.0]  # after a wrong one, after a right one
        self._was_right = False

    def note(self, *, looked: int, right: int) -> None:
        """Notes a step: how many guesses were looked at, and how many of them, from the first on, were right.

        That there was none to look at, because nothing like the end of the text came before, counts as a wrong one.
        """
        for _ in range(right):
            self._add(True)
        if right < looked or not looked:
            self._add(False)

    def expected(self, count: int) -> float:
        """How many of the next `count` guesses are right, from the first on, as far as this can be known."""
        after_wrong, after_right = map(self._rate, (0, 1))
        first = after_right if self._was_right else after_wrong
        return first * (1 - after_right**count) / (1 - after_right)

    def _rate(self, kind: int) -> float:
        """With a quarter of a right guess and of a wrong one that nobody saw, so that it is never 0 or 1."""
        return (self._right[kind] + 0.25) / (self._seen[kind] + 0.5)

    def _add(self, is_right: bool) -> None:
        kind = int(self._was_right)
        self._right[kind] = _MEMORY * self._right[kind] + is_right
        self._seen[kind] = _MEMORY * self._seen[kind] + 1
        self._was_right = is_right


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
        self._read = experts_per_token
        self._times: dict[tuple[int, int], collections.deque[float]] = {}
        self._noted = 0

    def choose(self, rows: Sequence[tuple[HitRate, int]]) -> tuple[int, list[int]]:
        """The guesses of the next step: those of its program, and how many each row tries.

        Args:
          rows: of each the rate, and how many guesses it may try.
        """
        best, chosen, best_rate = 0, frozenset[int](), (1 + _LEAST_GAIN) * len(rows) / self._seconds(0, len(rows))
        for count in self.counts[1:]:
            gains = [hits.expected(min(count, most)) for hits, most in rows]
            order = sorted((row for row, gain in enumerate(gains) if gain > _LEAST_GAIN), key=lambda row: -gains[row])
            made, computed = float(len(rows)), len(rows)
            for place, row in enumerate(order):
                made, computed = made + gains[row], computed + min(count, rows[row][1])
                rate = made / self._seconds(count, computed)
                if rate > best_rate:
                    best, chosen, best_rate = count, frozenset(order[: place + 1]), rate
        return best, [min(best, most) if row in chosen else 0 for row, (_, most) in enumerate(rows)]

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
