"""The samples that wait for a slot, and which of them is next. Plain Python."""

import heapq
import itertools
from typing import Generic, Protocol, TypeAlias, TypeVar

from grokjax.engine.fairness import Shares
from grokjax.request import check_integer


class QueueFullError(ValueError):
    """The queue holds as many requests as it may: the caller has to wait, or to send its request elsewhere."""


class Waiting(Protocol):
    """What the queue asks of a job: who goes before it."""

    priority: int
    user: str | None


J = TypeVar("J", bound=Waiting)
_Line: TypeAlias = list[tuple[int, int, J]]  # a heap of arrivals, with numbers that differ, and their jobs


class WaitingQueue(Generic[J]):
    """Jobs that wait for a slot: by priority, then the fewest tokens given to their user, then arrival.

    Args:
      max_queue: jobs that wait at most, 1 or more; `check_room` says when there are as many.

    Attributes:
      shares: what the users were given; the queue tells it who waits, and its owner what they get.

    Raises:
      ValueError: `max_queue` is below 1.
    """

    def __init__(self, max_queue: int):
        # A request waits at least until the next step.
        self._max_queue = check_integer("max_queue", max_queue, 1)
        self.shares = Shares()
        self._lines: dict[tuple[int, str | None], _Line[J]] = {}  # of each priority and user, none of them empty
        self._waiting: set[J] = set()  # what was removed stays in its line until it comes up
        self._siblings: dict[J, tuple[int, tuple[J, ...]]] = {}  # job -> its place, and who may not go before it
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether fewer jobs wait than may."""
        return len(self) < self._max_queue

    def check_room(self) -> None:
        """Says so where another job has no room; `push` takes it all the same.

        Raises:
          QueueFullError: As many jobs wait as may.
        """
        if not self.has_room:
            raise QueueFullError(
                f"{len(self)} samples are waiting and max_queue={self._max_queue} allows no more: run some steps "
                "first, send the request later, or make the engine with a longer queue."
            )

    def push(self, job: J, *siblings: J) -> None:
        """Adds a job; its siblings wait as it does and cannot go before `let_follow`, then stand where it stood.

        Raises:
          ValueError: Together they are more than may wait.
        """
        count = 1 + len(siblings)
        if count > self._max_queue:
            raise ValueError(
                f"n={count} samples exceed the engine's max_queue={self._max_queue}: ask for fewer, or make the engine "
                "with a longer queue."
            )
        self._waiting.update((job, *siblings))
        self.shares.enter(job.user, count)
        arrival = next(self._numbers)
        self._stand(job, arrival)
        if siblings:
            self._siblings[job] = arrival, siblings

    def let_follow(self, job: J) -> None:
        """Lets the siblings of a job go that have not been removed; harmless where it has none."""
        arrival, siblings = self._siblings.pop(job, (0, ()))
        for sibling in siblings:
            self._stand(sibling, arrival)

    def pop(self) -> J | None:
        """Takes the next job out; None if there is none."""
        while self._lines:
            first = min(self._lines, key=self._turn)
            job = heapq.heappop(self._lines[first])[-1]
            if not self._lines[first]:
                del self._lines[first]
            if job in self._waiting:
                self._leave(job)
                return job
        return None

    def remove(self, job: J) -> None:
        """Takes a job out, if it is in; siblings that have not followed it stay until they are removed themselves."""
        if job in self._waiting:
            self._leave(job)
        self._siblings.pop(job, None)
        if sum(map(len, self._lines.values())) > 2 * len(self._waiting) + 16:
            # A sorted list is a heap.
            kept = {key: sorted(e for e in line if e[-1] in self._waiting) for key, line in self._lines.items()}
            self._lines = {key: line for key, line in kept.items() if line}

    def _stand(self, job: J, arrival: int) -> None:
        line = self._lines.setdefault((job.priority, job.user), [])
        heapq.heappush(line, (arrival, next(self._numbers), job))

    def _turn(self, key: tuple[int, str | None]) -> tuple[int, int, int]:
        priority, user = key
        return -priority, self.shares.given(user), self._lines[key][0][0]

    def _leave(self, job: J) -> None:
        self._waiting.remove(job)
        self.shares.leave(job.user)
