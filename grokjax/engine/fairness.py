"""Whose turn it is: how many tokens each user was given while requests waited. Plain Python."""

import collections

# What a token costs its user: a drawn one a row of a decode step, one of a prompt a place in a chunk of many.
# Source: the weights of the experiments of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024).
_PROMPT_TOKEN, _DRAWN_TOKEN = 1, 2
# Users of whom no request waits and whose counts are kept all the same.
_MOST_ABSENT = 4096


class Shares:
    """Counts the tokens that each user is given, so that the next slot can go to the user who was given the fewest.

    A count matters only while others wait. So tokens count while any request waits, and all counts end when none does.
    A user who comes to those that wait, from idleness or for the first time, begins at the least of their counts, and
    at the own one if that is larger: nobody saves turns up by asking for nothing, and nobody loses a debt by leaving.

    Source: the virtual token counter of Sheng et al. (OSDI 2024), with its counts forgotten between busy times.
    """

    def __init__(self) -> None:
        self._given: collections.Counter[str | None] = collections.Counter()
        self._waiting: collections.Counter[str | None] = collections.Counter()

    def given(self, user: str | None) -> int:
        """What a user was given since requests wait, in tokens of prompts."""
        return self._given[user]

    def enter(self, user: str | None, count: int = 1) -> None:
        """Notes that so many more requests of a user wait."""
        if user not in self._waiting:
            least = min((self._given[other] for other in self._waiting), default=0)
            self._given[user] = max(self._given[user], least)
        self._waiting[user] += count

    def leave(self, user: str | None) -> None:
        """Notes that a request of a user waits no longer, for it has a slot or was cancelled."""
        self._waiting[user] -= 1
        if not self._waiting[user]:
            del self._waiting[user]
        if not self._waiting or len(self._given) > len(self._waiting) + _MOST_ABSENT:
            self._given = collections.Counter({other: self._given[other] for other in self._waiting})

    def charge(self, user: str | None, *, prompt_tokens: int = 0, drawn_tokens: int = 0) -> None:
        """Counts what a user is given."""
        if self._waiting:
            self._given[user] += _PROMPT_TOKEN * prompt_tokens + _DRAWN_TOKEN * drawn_tokens
