"""Who runs where and when: a bounded queue, slots, pieces of prompts, shared prefixes. Plain Python, no device."""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from grokjax.request import check_integer, is_integer


class QueueFullError(ValueError):
    """The queue holds as many requests as it may: the caller has to wait, or to send its request elsewhere."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a prompt: `count` tokens from position `start`, padded to `bucket`."""

    start: int
    count: int
    bucket: int


@dataclasses.dataclass(eq=False)
class Job:
    """One sequence to run, as far as scheduling is concerned.

    Attributes:
      prompt: token ids [n] int32, at least one.
      priority: larger goes first.
      is_scored: every position of the prompt is computed for it, alone: no shared pieces, no reused prefix.
      slot: where it runs; None while it waits and after it has ended.
      chunks: pieces of the prompt that are still to be prefilled.
      reused: tokens of the prompt whose keys and values another sequence left.
    """

    prompt: np.ndarray
    priority: int = 0
    is_scored: bool = False
    slot: int | None = dataclasses.field(default=None, init=False)
    chunks: collections.deque[Chunk] = dataclasses.field(default_factory=collections.deque, init=False)
    reused: int = dataclasses.field(default=0, init=False)


J = TypeVar("J", bound=Job)


@dataclasses.dataclass(frozen=True)
class Admission(Generic[J]):
    """A job that got a slot.

    Attributes:
      job: it, with its slot and its chunks set.
      source: slot whose row, up to `job.reused`, and logits the job's row begins with; maybe the job's own slot.
      is_complete: these are the whole prompt and the logits at its end: nothing is left to prefill.
    """

    job: J
    source: int
    is_complete: bool


@dataclasses.dataclass(frozen=True)
class PrefillGroup(Generic[J]):
    """Pieces of one bucket that are prefilled together: `chunks[i]` of `jobs[i]`."""

    jobs: tuple[J, ...]
    chunks: tuple[Chunk, ...]
    bucket: int

    def tokens(self, *, offset: int = 0) -> np.ndarray:
        """The pieces, int32 [P, T], zeros behind the end of a prompt; each shifted left by `offset` tokens."""
        padded = np.zeros((len(self.jobs), self.bucket), np.int32)
        for row, job, chunk in zip(padded, self.jobs, self.chunks, strict=True):
            piece = job.prompt[chunk.start + offset :][: self.bucket]
            row[: len(piece)] = piece
        return padded

    def place(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Real tokens of each piece, the position of its first, and its slot, each int32 [P]."""
        counts, starts = [chunk.count for chunk in self.chunks], [chunk.start for chunk in self.chunks]
        slots = [job.slot for job in self.jobs]
        return np.array(counts, np.int32), np.array(starts, np.int32), np.array(slots, np.int32)


def check_buckets(buckets: Sequence[int], max_len: int) -> tuple[int, ...]:
    """The padded lengths of pieces, ascending.

    Raises:
      ValueError: There are none, one is no length, or one exceeds the cache.
    """
    if not isinstance(buckets, Iterable):
        raise ValueError(f"prefill_buckets={buckets!r} must be a list of lengths, such as (16, 64, 256).")
    buckets = tuple(buckets)
    if not buckets:
        raise ValueError("prefill_buckets is empty: give at least one length, such as (16, 64, 256).")
    for bucket in buckets:
        if not is_integer(bucket) or not 1 <= bucket <= max_len:
            raise ValueError(
                f"the prefill bucket {bucket!r} must be an integer between 1 and the {max_len} entries of a slot."
            )
    return tuple(sorted({int(bucket) for bucket in buckets}))


def default_buckets(max_len: int) -> tuple[int, ...]:
    """Padded lengths for sequences of at most `max_len` tokens: few, for a program is compiled for each."""
    return tuple(bucket for bucket in (16, 64, 256, 1024) if bucket <= max_len) or (max_len,)


def plan_chunks(start: int, end: int, buckets: Sequence[int]) -> Iterator[Chunk]:
    """Cuts positions `start` to `end` into pieces of the largest bucket and a rest in the smallest that holds it.

    Example:
      >>> [(chunk.count, chunk.bucket) for chunk in plan_chunks(0, 21, (4, 8))]
      [(8, 8), (8, 8), (5, 8)]
    """
    for first in range(start, end, buckets[-1]):
        count = min(buckets[-1], end - first)
        yield Chunk(first, count, next(bucket for bucket in buckets if bucket >= count))


class WaitingQueue(Generic[J]):
    """Jobs by priority, then arrival.

    Args:
      max_queue: jobs that wait at most, 1 or more; `check_room` says when there are as many.

    Raises:
      ValueError: `max_queue` is below 1.
    """

    def __init__(self, max_queue: int):
        # A request waits at least until the next step.
        self._max_queue = check_integer("max_queue", max_queue, 1)
        self._heap: list[tuple[int, int, int, J]] = []
        self._waiting: set[J] = set()  # what was taken out stays in the heap until it comes up; what is held is not in
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether fewer jobs wait than may."""
        return len(self) < self._max_queue

    def check_room(self) -> None:
        """Says so where another job has no room; `push` itself never refuses.

        Raises:
          QueueFullError: As many jobs wait as may.
        """
        if not self.has_room:
            raise QueueFullError(
                f"{len(self)} samples are waiting and max_queue={self._max_queue} allows no more: run some steps "
                "first, send the request later, or make the engine with a longer queue."
            )

    def check_count(self, count: int) -> None:
        """Says so where so many samples of one request do not fit even an empty queue.

        Raises:
          ValueError: They are more than may wait.
        """
        if count > self._max_queue:
            raise ValueError(
                f"n={count} samples exceed the engine's max_queue={self._max_queue}: ask for fewer, or make the engine "
                "with a longer queue."
            )

    def push(self, job: J, *, arrival: int | None = None) -> int:
        """Adds a job and returns its arrival number; one that is given an earlier number stands at that place."""
        number = next(self._numbers)
        arrival = number if arrival is None else arrival
        self._waiting.add(job)
        heapq.heappush(self._heap, (-job.priority, arrival, number, job))
        return arrival

    def hold(self, jobs: Iterable[J]) -> None:
        """Counts jobs as waiting that cannot go yet; each is pushed later, or removed."""
        self._waiting.update(jobs)

    def pop(self) -> J | None:
        """Takes the next job out; None if there is none."""
        while self._heap:
            job = heapq.heappop(self._heap)[-1]
            if job in self._waiting:
                self._waiting.remove(job)
                return job
        return None

    def remove(self, job: J) -> None:
        """Takes a job out, if it is in."""
        self._waiting.discard(job)
        if len(self._heap) > 2 * len(self._waiting) + 16:
            self._heap = [entry for entry in self._heap if entry[-1] in self._waiting]
            heapq.heapify(self._heap)


@dataclasses.dataclass(frozen=True)
class PrefixMatch:
    """The first `length` tokens of a prompt lie in row `slot`; `is_complete`: all of it, and the logits at its end."""

    slot: int
    length: int
    is_complete: bool


class HeldRows:
    """Which tokens' keys and values each slot's row holds: what later prompts may share, at no memory of its own."""

    def __init__(self, slots: int, max_len: int):
        self.tokens = np.zeros((slots, max_len), np.int32)
        self.lengths = [0] * slots
        self.prompt_lengths = [0] * slots  # of the prompt whose last logits are kept; 0 for none

    def clear(self) -> None:
        """Forgets everything."""
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


class Scheduler(Generic[J]):
    """Gives slots to jobs and decides which pieces of prompts come next.

    Args:
      slots: B, jobs that run at once.
      max_len: S, tokens that a slot holds.
      buckets: padded lengths of pieces of prompts; `check_buckets` made them.
      prefill_rows: pieces that are prefilled together at most; a power of two is always taken.
      max_queue: jobs that wait at most.
      reuse_prefixes: begin from another job's row where at least the smallest bucket is shared; a row that holds the
        very same prompt is shared in any case.

    Raises:
      ValueError: A number is below 1.
    """

    def __init__(
        self,
        *,
        slots: int,
        max_len: int,
        buckets: Sequence[int],
        prefill_rows: int = 4,
        max_queue: int = 1024,
        reuse_prefixes: bool = True,
    ):
        slots = check_integer("slots", slots, 1)
        self.prefill_rows = check_integer("prefill_rows", prefill_rows, 1)
        self.max_len, self.buckets = max_len, check_buckets(buckets, max_len)
        self.reuse_prefixes = reuse_prefixes
        self.queue: WaitingQueue[J] = WaitingQueue(max_queue)
        self.running: list[J | None] = [None] * slots
        self.held = HeldRows(slots, max_len)
        self._free = collections.deque(range(slots))  # the longest unused first
        self._fresh: collections.deque[J] = collections.deque()  # admitted, no piece prefilled yet
        self._begun: collections.deque[J] = collections.deque()  # some pieces prefilled, not all
        self._begun_has_turn = False

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many pieces may be prefilled together: powers of two."""
        most = min(self.prefill_rows, len(self.running))
        return tuple(1 << power for power in range(most.bit_length()))

    @property
    def has_pieces(self) -> bool:
        """Whether a running job has pieces left to prefill."""
        return bool(self._fresh or self._begun)

    @property
    def occupancy(self) -> float:
        """The part of all rows that running jobs have filled."""
        filled = sum(length for length, job in zip(self.held.lengths, self.running, strict=True) if job is not None)
        return filled / (len(self.running) * self.max_len)

    def admit(self) -> list[Admission[J]]:
        """Gives free slots to waiting jobs; the copies that this asks for must be made in the order of the list."""
        admissions = []
        while self._free and (job := self.queue.pop()) is not None:
            admissions.append(self._place(job))
        return admissions

    def next_prefill(self) -> PrefillGroup[J] | None:
        """The pieces to prefill now.

        A new prompt goes first, so that it waits for one piece of a long one at most; but a long one that had to wait
        has the next turn, so that new prompts cannot keep it waiting for ever.
        """
        queues = (self._begun, self._fresh) if self._begun_has_turn else (self._fresh, self._begun)
        first = next((queue for queue in queues if queue), None)
        if first is None:
            return None
        self._begun_has_turn = first is self._fresh and bool(self._begun)
        jobs = self._group(first[0])
        chunks = tuple(job.chunks.popleft() for job in jobs)
        for job, chunk in zip(jobs, chunks, strict=True):
            self._advance(job, chunk)
        return PrefillGroup(tuple(jobs), chunks, chunks[0].bucket)

    def release(self, job: J) -> None:
        """Takes a job out of its slot or of the queue; harmless where it is in neither."""
        self.queue.remove(job)
        if job.slot is None:
            return
        for waiting in (self._fresh, self._begun):
            if job in waiting:
                waiting.remove(job)
        self.running[job.slot] = None
        self._free.append(job.slot)
        job.slot = None

    def _place(self, job: J) -> Admission[J]:
        match = self._best_match(job)
        slot = match.slot if match.slot in self._free else self._free[0]
        self._free.remove(slot)
        self.held.share(match, slot)
        job.slot, job.reused = slot, match.length
        job.chunks = collections.deque(plan_chunks(match.length, len(job.prompt), self.buckets))
        self.running[slot] = job
        if job.chunks:
            self._fresh.append(job)
        return Admission(job, match.slot, match.is_complete)

    def _best_match(self, job: J) -> PrefixMatch:
        """The longest shared prefix that is worth it; of length 0, in the longest unused slot, if there is none."""
        nothing = PrefixMatch(self._free[0], 0, is_complete=False)
        if job.is_scored:
            return nothing
        least = self.buckets[0] if self.reuse_prefixes else self.max_len
        useful = [match for match in self.held.find(job.prompt) if match.is_complete or match.length >= least]
        # Of equals a free slot saves the copy.
        return max(useful, key=lambda match: (match.length, match.slot in self._free), default=nothing)

    def _group(self, first: J) -> list[J]:
        """It and others whose one piece has the same bucket; a piece of a long prompt goes alone, to stall no more."""
        if first.is_scored or first in self._begun or len(first.chunks) > 1:
            return [first]
        others = [job for job in self._fresh if job is not first and not job.is_scored and len(job.chunks) == 1]
        jobs = [first, *(job for job in others if job.chunks[0].bucket == first.chunks[0].bucket)]
        most = min(len(jobs), self.prefill_rows)
        return jobs[: 1 << (most.bit_length() - 1)]

    def _advance(self, job: J, chunk: Chunk) -> None:
        assert job.slot is not None
        (self._fresh if job in self._fresh else self._begun).remove(job)
        self.held.extend(job.slot, job.prompt[chunk.start : chunk.start + chunk.count], chunk.count)
        if job.chunks:
            self._begun.append(job)
        else:
            self.held.prompt_lengths[job.slot] = len(job.prompt)
