"""Who runs where and when: slots, prompts in chunks, shared prefixes, deadlines. Plain Python."""

import collections
import dataclasses
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from grokjax.cache import MOST_ROWS
from grokjax.engine.prefixes import HeldRows, PrefixMatch
from grokjax.engine.queue import WaitingQueue
from grokjax.request import check_integer, is_integer


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a prompt: `count` tokens from position `start`, padded to `bucket`."""

    start: int
    count: int
    bucket: int


@dataclasses.dataclass(eq=False)
class Job:
    """One sample to run, as far as scheduling is concerned.

    Attributes:
      prompt: token ids [n] int32, at least one.
      priority: larger goes first.
      is_scored: every position of the prompt is computed for it, alone: in no group, with no reused prefix.
      user: whose it is; None counts as one more user.
      deadline: when it must have ended, in seconds of the caller's clock; None for never.
      slot: where it runs; None while it waits and after it has ended.
      chunks: those of the prompt that are still to be prefilled.
      reused: tokens of the prompt whose keys and values another sample left.
    """

    prompt: np.ndarray
    priority: int = 0
    is_scored: bool = False
    user: str | None = None
    deadline: float | None = None
    slot: int | None = dataclasses.field(default=None, init=False)
    chunks: collections.deque[Chunk] = dataclasses.field(default_factory=collections.deque, init=False)
    reused: int = dataclasses.field(default=0, init=False)


J = TypeVar("J", bound=Job)


@dataclasses.dataclass(frozen=True)
class Admission(Generic[J]):
    """A job that got a slot.

    Attributes:
      job: the one that got it, with its slot and its chunks set.
      source: slot whose row, up to `job.reused`, and logits the job's row begins with; maybe the job's own slot.
      is_complete: these are the whole prompt and the logits at its end: nothing is left to prefill.
    """

    job: J
    source: int
    is_complete: bool


@dataclasses.dataclass(frozen=True)
class PrefillGroup(Generic[J]):
    """Chunks of one bucket that are prefilled together: `chunks[i]` of `jobs[i]`."""

    jobs: tuple[J, ...]
    chunks: tuple[Chunk, ...]
    bucket: int

    def tokens(self, *, offset: int = 0) -> np.ndarray:
        """The tokens of the chunks, int32 [P, T], each `offset` further on; zeros behind the end of a prompt."""
        padded = np.zeros((len(self.jobs), self.bucket), np.int32)
        for row, job, chunk in zip(padded, self.jobs, self.chunks, strict=True):
            tokens = job.prompt[chunk.start + offset :][: self.bucket]
            row[: len(tokens)] = tokens
        return padded

    def place(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Real tokens of each chunk, the position of its first, and its slot, each int32 [P]."""
        counts, starts = [chunk.count for chunk in self.chunks], [chunk.start for chunk in self.chunks]
        slots = [job.slot for job in self.jobs]
        return np.array(counts, np.int32), np.array(starts, np.int32), np.array(slots, np.int32)


def check_buckets(buckets: Sequence[int], max_len: int) -> tuple[int, ...]:
    """The padded lengths of chunks, ascending.

    Raises:
      ValueError: There are none, one is no length, or one exceeds the cache.
    """
    if not isinstance(buckets, Iterable):
        raise ValueError(f"prefill_buckets={reprlib.repr(buckets)} must be a list of lengths, such as (16, 64, 256).")
    buckets = tuple(buckets)
    if not buckets:
        raise ValueError("prefill_buckets is empty: give at least one length, such as (16, 64, 256).")
    for bucket in buckets:
        if not is_integer(bucket) or not 1 <= bucket <= max_len:
            shown = reprlib.repr(bucket)
            raise ValueError(
                f"the prefill bucket {shown} must be an integer between 1 and the {max_len} entries of a slot."
            )
    return tuple(sorted({int(bucket) for bucket in buckets}))


def default_buckets(max_len: int) -> tuple[int, ...]:
    """Padded lengths of chunks for samples of at most `max_len` tokens: few, for a program is compiled for each."""
    return tuple(bucket for bucket in (16, 64, 256, 1024) if bucket <= max_len) or (max_len,)


def plan_chunks(start: int, end: int, buckets: Sequence[int]) -> Iterator[Chunk]:
    """Cuts positions `start` to `end` into chunks of the largest bucket and a rest in the smallest that holds it.

    Example:
      >>> [(chunk.count, chunk.bucket) for chunk in plan_chunks(0, 21, (4, 8))]
      [(8, 8), (8, 8), (5, 8)]
    """
    for first in range(start, end, buckets[-1]):
        count = min(buckets[-1], end - first)
        yield Chunk(first, count, next(bucket for bucket in buckets if bucket >= count))


class Scheduler(Generic[J]):
    """Gives slots to jobs and decides which chunks of prompts come next.

    Args:
      slots: B, jobs that run at once.
      max_len: S, tokens that a slot holds.
      buckets: padded lengths of chunks, in any order.
      prefill_rows: chunks that are prefilled together at most; a power of two is always taken.
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
        self.slots = check_integer("slots", slots, 1, MOST_ROWS)
        self.prefill_rows = check_integer("prefill_rows", prefill_rows, 1)
        self.max_len, self.buckets = max_len, check_buckets(buckets, max_len)
        self.reuse_prefixes = reuse_prefixes
        self.held = HeldRows(self.slots, max_len)
        self._queue: WaitingQueue[J] = WaitingQueue(max_queue)
        self._running: dict[int, J] = {}
        self._deadlines: dict[J, float] = {}  # of those that wait or run and have one
        self._free = collections.deque(range(self.slots))  # the longest unused first
        self._fresh: collections.deque[J] = collections.deque()  # admitted, no chunk prefilled yet
        self._begun: collections.deque[J] = collections.deque()  # some chunks prefilled, not all
        self._begun_has_turn = False

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many chunks may be prefilled together: powers of two."""
        most = min(self.prefill_rows, self.slots)
        return tuple(1 << power for power in range(most.bit_length()))

    @property
    def has_room(self) -> bool:
        """Whether fewer jobs wait than may."""
        return self._queue.has_room

    @property
    def num_waiting(self) -> int:
        """How many jobs wait for a slot."""
        return len(self._queue)

    @property
    def running(self) -> list[J]:
        """The jobs that have a slot, in the order of their slots."""
        return [self._running[slot] for slot in sorted(self._running)]

    @property
    def num_running(self) -> int:
        """How many jobs have a slot."""
        return len(self._running)

    @property
    def has_chunks(self) -> bool:
        """Whether a running job has chunks left to prefill."""
        return bool(self._fresh or self._begun)

    @property
    def occupancy(self) -> float:
        """The part of all rows that running jobs have filled."""
        # A list at once: other threads may ask, too.
        return sum(self.held.lengths[slot] for slot in list(self._running)) / (self.slots * self.max_len)

    def check_room(self) -> None:
        """Says so where another job has no room.

        Raises:
          QueueFullError: As many jobs wait as may.
        """
        self._queue.check_room()

    def submit(self, job: J, *siblings: J) -> None:
        """Puts a job into the queue, and siblings with the same prompt, which go once its prefill is under way.

        Raises:
          ValueError: They are more than may ever wait.
        """
        self._queue.push(job, *siblings)
        self._deadlines.update({one: one.deadline for one in (job, *siblings) if one.deadline is not None})

    def late(self, now: float) -> list[J]:
        """The jobs that wait or run and whose deadline has come; the caller releases them."""
        return [job for job, deadline in self._deadlines.items() if deadline <= now]

    def admit(self) -> list[Admission[J]]:
        """Gives free slots to waiting jobs; the copies that this asks for must be made in the order of the list."""
        admissions = []
        while self._free and (job := self._queue.pop()) is not None:
            admissions.append(self._place(job))
        for admission in admissions:
            if admission.is_complete:
                self._queue.let_follow(admission.job)
        return admissions

    def next_prefill(self) -> PrefillGroup[J] | None:
        """Takes the chunks to prefill now; None where no prompt has any left.

        A new prompt goes first, so that it waits for one chunk of a long one at most; but a long one that had to wait
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

    def note_draws(self, jobs: Iterable[J], *, count: int = 1) -> None:
        """Notes that each of these jobs is given so many tokens more; its first was counted with its slot."""
        if self.num_waiting:  # else nothing counts
            for job in jobs:
                self._queue.shares.charge(job.user, drawn_tokens=count)

    def note_token(self, job: J, token: int) -> None:
        """Notes that the keys and values of a drawn token went into a job's row; harmless where it has none."""
        if job.slot is not None:
            self.held.extend(job.slot, token)

    def forget_rows(self) -> None:
        """Forgets what the rows hold: something else was written into them."""
        self.held.clear()

    def release(self, job: J) -> None:
        """Takes a job out of its slot or of the queue; harmless where it is in neither."""
        self._queue.remove(job)
        self._deadlines.pop(job, None)
        if job.slot is None:
            return
        for waiting in (self._fresh, self._begun):
            if job in waiting:
                waiting.remove(job)
        del self._running[job.slot]
        self._free.append(job.slot)
        job.slot = None

    def _place(self, job: J) -> Admission[J]:
        match = self._best_match(job)
        slot = match.slot if match.slot in self._free else self._free[0]
        self._free.remove(slot)
        self.held.share(match, slot)
        job.slot, job.reused = slot, match.length
        job.chunks = collections.deque(plan_chunks(match.length, len(job.prompt), self.buckets))
        self._running[slot] = job
        # At least the first token, so that users take turns where whole prompts are shared.
        self._queue.shares.charge(job.user, prompt_tokens=len(job.prompt) - match.length, drawn_tokens=1)
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
        """A job and others whose one chunk has its bucket; a chunk of a long prompt goes alone, to stall no more."""
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
            self.held.keep_logits(job.slot)
            self._queue.let_follow(job)
