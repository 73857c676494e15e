"""A scheduler keeps its slots and rows consistent, and its turns fair, whatever comes and goes in whichever order."""

import collections

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jobs import job, scheduler, submit

from grokjax.engine.scheduler import Job


class AnyOrder(RuleBasedStateMachine):
    """Jobs that come, get slots, are prefilled, grow and leave in any order, on schedulers of any size."""

    @initialize(slots=st.integers(1, 4), rows=st.sampled_from([1, 2, 4]), reuse=st.booleans())
    def make(self, slots: int, rows: int, reuse: bool) -> None:
        self.plan = scheduler(slots, max_len=24, prefill_rows=rows, reuse_prefixes=reuse)
        self.jobs: list[Job] = []
        self.now = 0
        self.given: collections.Counter[str | None] = collections.Counter()  # while any wait, to each user
        self.waiting: set[Job] = set()
        self.running: set[Job] = set()

    @rule(
        length=st.integers(1, 23),
        first=st.sampled_from([0, 0, 4, 90]),
        priority=st.integers(0, 1),
        is_scored=st.booleans(),
        user=st.sampled_from(["ann", "bob", None]),
        lasts=st.none() | st.integers(1, 9),
    )
    def submit(self, *, user: str | None, lasts: int | None, **options) -> None:
        self.jobs.append(job(user=user, deadline=None if lasts is None else self.now + lasts, **options))
        users = {one.user for one in self.waiting}
        if user not in users:
            self.given[user] = max(self.given[user], min((self.given[other] for other in users), default=0))
        self.waiting.add(self.jobs[-1])
        submit(self.plan, self.jobs[-1])

    @rule()
    def admit(self) -> None:
        free, waiting = self.plan.slots - len(self.plan.running), len(self.waiting)
        admitted = [admission.job for admission in self.plan.admit()]
        assert len(admitted) == min(free, waiting)
        for one in admitted:
            assert one is min(self.waiting, key=self.turn)
            self.waiting.remove(one)
            self.running.add(one)
            self.give(one, len(one.prompt) - one.reused + 2)

    def turn(self, one: Job) -> tuple[int, int, int]:
        """By priority, then the user who was given the fewest tokens, then arrival."""
        return -one.priority, self.given[one.user], self.jobs.index(one)

    def give(self, one: Job, tokens: int) -> None:
        self.given[one.user] += tokens
        if not self.waiting:
            self.given.clear()

    @rule()
    def prefill(self) -> None:
        due = {one: one.chunks[0] for one in self.running if one.chunks}
        group = self.plan.next_prefill()
        if group is None:
            assert not due
            return
        assert len(set(group.jobs)) == len(group.jobs)
        assert dict(zip(group.jobs, group.chunks, strict=True)).items() <= due.items()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 99))
    def grow(self, data: st.DataObject, token: int) -> None:
        """A token that was drawn for a job goes into its row."""
        one = data.draw(st.sampled_from([one for one in self.jobs if one in self.running]))
        if not one.chunks and self.plan.held.lengths[one.slot] < self.plan.max_len:
            self.plan.note_token(one, token)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def draw(self, data: st.DataObject) -> None:
        """A step draws a token for some of those that run."""
        drawn = [one for one in self.jobs if one in self.running and data.draw(st.booleans())]
        self.plan.note_draws(drawn)
        for one in drawn:
            self.give(one, 2)

    @rule(seconds=st.integers(1, 3))
    def pass_time(self, seconds: int) -> None:
        """Those whose deadline comes are told, and leave."""
        self.now += seconds
        late = self.plan.late(self.now)
        due = {one for one in self.waiting | self.running if one.deadline is not None and one.deadline <= self.now}
        assert len(late) == len(due)
        assert set(late) == due
        for one in late:
            self.leave(one)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """One that waits or runs leaves, or one that has left before."""
        self.leave(data.draw(st.sampled_from(self.jobs)))

    def leave(self, one: Job) -> None:
        self.plan.release(one)
        self.waiting.discard(one)
        self.running.discard(one)
        if not self.waiting:
            self.given.clear()

    @invariant()
    def slots_and_rows_are_consistent(self) -> None:
        if not hasattr(self, "plan"):
            return
        assert len(self.plan.running) == len(self.running)
        assert set(self.plan.running) == self.running
        slots = [one.slot for one in self.plan.running]
        assert slots == sorted(set(slots))
        assert set(slots) <= set(range(self.plan.slots))
        assert all(one.slot is None for one in self.jobs if one not in self.running)
        assert all(0 <= length <= self.plan.max_len for length in self.plan.held.lengths)
        assert self.plan.has_chunks == any(one.chunks for one in self.running)
        assert self.plan.num_waiting == len(self.waiting)

    def teardown(self) -> None:
        """Every slot can be had again, and every prompt be prefilled to its end."""
        if not hasattr(self, "plan"):
            return
        for one in list(self.running):
            self.leave(one)
        for _ in range(self.plan.slots):
            self.submit(length=20, first=0, priority=0, is_scored=False, user=None, lasts=None)
        self.admit()
        assert len(self.plan.running) == self.plan.slots
        while self.plan.has_chunks:
            self.prefill()
        self.slots_and_rows_are_consistent()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=250, stateful_step_count=30)
