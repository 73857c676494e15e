"""Scheduling by hand: who gets a slot, which chunks are prefilled together."""

import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import job, scheduler, submit

from grokjax.engine import QueueFullError
from grokjax.engine.queue import WaitingQueue
from grokjax.engine.scheduler import Chunk, Job, Scheduler, check_buckets, plan_chunks


class TestChunks:
    @given(start=st.integers(0, 40), length=st.integers(1, 40))
    def test_chunks_join_and_fit_their_buckets(self, start: int, length: int) -> None:
        chunks = list(plan_chunks(start, start + length, (4, 8, 16)))
        position = start
        for chunk in chunks:
            assert chunk.start == position
            assert 1 <= chunk.count <= chunk.bucket
            position += chunk.count
        assert position == start + length
        assert all(chunk.count == 16 for chunk in chunks[:-1])
        assert chunks[-1].bucket == min(bucket for bucket in (4, 8, 16) if bucket >= chunks[-1].count)

    @pytest.mark.parametrize(
        ("buckets", "message"),
        [
            ((), "prefill_buckets is empty"),
            ((0, 4), "the prefill bucket 0 must be an integer between 1 and the 8 entries of a slot"),
            ((9,), "the prefill bucket 9"),
            ((4.0,), r"the prefill bucket 4\.0"),
            ((True,), "the prefill bucket True"),
        ],
        ids=str,
    )
    def test_buckets_out_of_range_are_refused(self, buckets: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_buckets(buckets, 8)

    def test_buckets_are_put_in_order(self) -> None:
        assert check_buckets([8, 2, 8], 8) == (2, 8)
        assert check_buckets(np.array([8, 2]), 8) == (2, 8)


class TestQueue:
    def test_priority_goes_before_arrival(self) -> None:
        queue: WaitingQueue[Job] = WaitingQueue(9)
        first, second, urgent, late = job(), job(), job(priority=1), job(priority=-1)
        sibling = job()
        queue.push(first, sibling)
        for one in (second, late, urgent):
            queue.push(one)
        queue.let_follow(first)
        assert [queue.pop() for _ in range(6)] == [urgent, first, sibling, second, late, None]

    def test_a_full_queue_refuses(self) -> None:
        queue: WaitingQueue[Job] = WaitingQueue(2)
        jobs = [job(), job()]
        for one in jobs:
            queue.check_room()
            queue.push(one)
        with pytest.raises(QueueFullError, match="2 samples are waiting and max_queue=2 allows no more"):
            queue.check_room()
        queue.remove(jobs[0])
        queue.check_room()

    def test_what_was_removed_does_not_come_back_or_stay(self) -> None:
        queue: WaitingQueue[Job] = WaitingQueue(9)
        kept = job()
        queue.push(kept)
        references = []
        for _ in range(200):
            removed = job(priority=1)
            queue.push(removed)
            queue.remove(removed)
            queue.remove(removed)
            references.append(weakref.ref(removed))
        assert len(queue) == 1
        assert sum(reference() is not None for reference in references) < 50
        assert [queue.pop(), queue.pop()] == [kept, None]

    def test_a_queue_of_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="max_queue=0 must be an integer, 1 or more"):
            WaitingQueue(0)
        with pytest.raises(ValueError, match=r"max_queue=2\.5 must be an integer"):
            WaitingQueue(2.5)

    def test_siblings_count_and_do_not_come_before_they_may(self) -> None:
        queue: WaitingQueue[Job] = WaitingQueue(3)
        first, later, dropped = job(), job(), job()
        queue.push(first, later, dropped)
        assert not queue.has_room
        assert [queue.pop(), queue.pop()] == [first, None]
        queue.remove(dropped)
        queue.let_follow(first)
        queue.let_follow(first)
        assert (len(queue), queue.pop(), queue.pop(), len(queue)) == (1, later, None, 0)

    def test_siblings_of_one_that_was_removed_never_come(self) -> None:
        queue: WaitingQueue[Job] = WaitingQueue(2)
        first, sibling = job(), job()
        queue.push(first, sibling)
        queue.remove(first)
        queue.let_follow(first)
        assert (len(queue), queue.pop()) == (1, None)
        queue.remove(sibling)
        assert len(queue) == 0

    def test_more_than_may_ever_wait_are_refused(self) -> None:
        queue: WaitingQueue[Job] = WaitingQueue(2)
        with pytest.raises(ValueError, match="n=3 samples exceed the engine's max_queue=2: ask for fewer"):
            queue.push(job(), job(), job())
        assert (len(queue), queue.pop()) == (0, None)


class TestPlaces:
    def test_slots_are_given_until_there_are_none(self) -> None:
        plan, jobs = scheduler(2), [job(), job(), job()]
        submit(plan, *jobs)
        assert [admission.job for admission in plan.admit()] == jobs[:2]
        assert plan.admit() == []
        plan.release(jobs[0])
        assert [admission.job for admission in plan.admit()] == jobs[2:]
        assert plan.running == [jobs[2], jobs[1]]

    def test_release_is_harmless_twice_and_while_waiting(self) -> None:
        plan, one, other = scheduler(1), job(), job()
        submit(plan, one, other)
        plan.admit()
        plan.release(other)
        plan.release(one)
        plan.release(one)
        assert plan.admit() == []
        assert plan.next_prefill() is None
        submit(plan, job())
        assert len(plan.admit()) == 1

    def test_siblings_get_their_slots_after_the_prefill_they_share(self) -> None:
        plan, long, sibling, other = scheduler(3), job(20), job(20), job(3, first=50)
        plan.submit(long, sibling)
        submit(plan, other)
        assert [admission.job for admission in plan.admit()] == [long, other]
        for _ in range(4):  # one chunk of the other, three of the long one
            assert plan.admit() == []
            plan.next_prefill()
        assert [(a.job, a.source, a.is_complete) for a in plan.admit()] == [(sibling, long.slot, True)]

    def test_siblings_of_a_prompt_that_a_row_holds_come_with_the_next_admission(self) -> None:
        plan = scheduler(3)
        submit(plan, job(6))
        plan.admit()
        plan.next_prefill()
        first, sibling = job(6), job(6)
        plan.submit(first, sibling)
        assert [admission.job for admission in plan.admit()] == [first]
        assert [admission.job for admission in plan.admit()] == [sibling]

    def test_rows_that_are_forgotten_are_not_shared(self) -> None:
        plan = scheduler(2)
        submit(plan, job(6))
        plan.admit()
        plan.next_prefill()
        plan.forget_rows()
        again = job(6)
        submit(plan, again)
        assert [admission.is_complete for admission in plan.admit()] == [False]
        assert again.reused == 0

    @pytest.mark.parametrize("name", ["slots", "prefill_rows"])
    def test_numbers_out_of_range_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}=0 must be an integer(, 1 or more| between 1 and)"):
            Scheduler(**{"slots": 1, "max_len": 8, "buckets": (4,), name: 0})


class TestPrefill:
    def test_one_bucket_together_a_power_of_two_at_once(self) -> None:
        plan = scheduler(6, prefill_rows=4)
        jobs = [job(3, first=10 * i) for i in range(3)] + [job(7, first=90), job(2, first=80), job(4, first=70)]
        submit(plan, *jobs)
        plan.admit()
        groups = [plan.next_prefill() for _ in range(4)]
        assert groups[-1] is None
        assert [group.jobs for group in groups[:-1]] == [(*jobs[:3], jobs[4]), (jobs[3],), (jobs[5],)]
        assert groups[0].chunks == (Chunk(0, 3, 4), Chunk(0, 3, 4), Chunk(0, 3, 4), Chunk(0, 2, 4))

    def test_three_prompts_of_a_bucket_are_prefilled_as_two_and_one(self) -> None:
        plan = scheduler(3, prefill_rows=4)
        submit(plan, *(job(3, first=10 * i) for i in range(3)))
        plan.admit()
        assert [len(plan.next_prefill().jobs) for _ in range(2)] == [2, 1]

    def test_new_prompts_and_long_ones_take_turns(self) -> None:
        plan, long = scheduler(8, prefill_rows=1), job(30)
        submit(plan, long)
        plan.admit()
        assert plan.next_prefill().jobs == (long,)
        short = [job(2, first=100 * i) for i in range(1, 4)]
        submit(plan, *short)
        plan.admit()
        order = [plan.next_prefill().jobs[0] for _ in range(6)]
        assert order == [short[0], long, short[1], long, short[2], long]
        assert plan.next_prefill() is None
        assert not long.chunks

    def test_scored_prompts_are_alone(self) -> None:
        plan = scheduler(4, prefill_rows=4)
        jobs = [job(3, first=10), job(3, first=20, is_scored=True), job(3, first=30)]
        submit(plan, *jobs)
        plan.admit()
        assert [plan.next_prefill().jobs for _ in range(2)] == [(jobs[0], jobs[2]), (jobs[1],)]

    def test_a_job_that_left_is_not_prefilled(self) -> None:
        plan, long, short = scheduler(2), job(30), job(2, first=50)
        submit(plan, long, short)
        plan.admit()
        plan.next_prefill()
        plan.release(long)
        plan.release(short)
        assert plan.next_prefill() is None
