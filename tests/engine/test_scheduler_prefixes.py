"""Scheduling by hand: what a prompt shares with a row, and which row it then takes."""

import numpy as np
from jobs import job, scheduler, submit

from grokjax.engine.prefixes import HeldRows, PrefixMatch
from grokjax.engine.scheduler import Chunk, Job, Scheduler


class TestPrefixes:
    def test_prefixes_are_found_as_by_definition(self) -> None:
        held = HeldRows(3, 16)
        held.extend(0, np.array([5, 6, 7, 8]), 4)
        held.extend(1, np.array([5, 6, 9]), 3)
        held.keep_logits(1)
        assert held.find(np.array([5, 6, 7, 1])) == [
            PrefixMatch(0, 3, is_complete=False),
            PrefixMatch(1, 2, is_complete=False),
            PrefixMatch(2, 0, is_complete=False),
        ]
        # All but the last token; unless its logits are kept, they have to be computed.
        assert held.find(np.array([5, 6, 7]))[0] == PrefixMatch(0, 2, is_complete=False)
        assert held.find(np.array([5, 6, 9]))[1] == PrefixMatch(1, 3, is_complete=True)

    def run_prompt(self, plan: Scheduler[Job], prompt: Job) -> Job:
        submit(plan, prompt)
        plan.admit()
        while plan.next_prefill():
            pass
        return prompt

    def test_a_bucket_is_shared_and_less_is_not(self) -> None:
        plan = scheduler(3)
        self.run_prompt(plan, job(10))
        other = Job(np.array([0, 1, 2, 3, 4, 99, 98], np.int32))
        submit(plan, other)
        assert [(a.source, a.is_complete) for a in plan.admit()] == [(0, False)]
        assert other.reused == 5
        assert list(other.chunks) == [Chunk(5, 2, 4)]
        short = Job(np.array([0, 1, 2, 99], np.int32))
        submit(plan, short)
        assert [a.source for a in plan.admit()] == [short.slot]
        assert short.reused == 0

    def test_the_same_prompt_needs_nothing_more(self) -> None:
        plan = scheduler(2, reuse_prefixes=False)
        self.run_prompt(plan, job(3))
        again = job(3)
        submit(plan, again)
        assert [(a.source, a.is_complete) for a in plan.admit()] == [(0, True)]
        assert plan.next_prefill() is None
        assert plan.held.lengths == [3, 3]

    def test_a_free_row_is_taken_where_it_lies(self) -> None:
        plan = scheduler(2)
        plan.release(self.run_prompt(plan, job(10)))
        plan.held.extend(0, 77)  # a generated token
        again = self.run_prompt(plan, job(10))
        assert (again.slot, again.reused) == (0, 10)
        assert plan.held.lengths[0] == 10
        plan.release(again)
        longer = job(14)
        submit(plan, longer)
        plan.admit()
        assert (longer.slot, longer.reused) == (0, 10)
        assert plan.held.prompt_lengths[0] == 0

    def test_of_equal_rows_a_free_one_is_taken(self) -> None:
        plan = scheduler(3)
        self.run_prompt(plan, job(10))
        plan.release(self.run_prompt(plan, job(10)))  # in slot 1, behind the free slot 2
        longer = job(14)
        submit(plan, longer)
        assert [(admission.source, longer.slot, longer.reused) for admission in plan.admit()] == [(1, 1, 10)]

    def test_the_longest_unused_row_is_overwritten(self) -> None:
        plan = scheduler(2)
        first, second = job(8), job(8, first=50)
        self.run_prompt(plan, first)
        self.run_prompt(plan, second)
        plan.release(second)
        plan.release(first)
        other = job(8, first=90)
        submit(plan, other)
        plan.admit()
        assert other.slot == 1

    def test_a_row_being_prefilled_shares_only_what_is_there(self) -> None:
        plan, long = scheduler(2), job(20)
        submit(plan, long)
        plan.admit()
        plan.next_prefill()
        follower = job(20)
        submit(plan, follower)
        plan.admit()
        assert follower.reused == 8

    def test_without_reuse_and_for_scored_prompts_nothing_is_shared(self) -> None:
        plan = scheduler(2, reuse_prefixes=False)
        self.run_prompt(plan, job(10))
        assert self.run_prompt(plan, job(12)).reused == 0
        plan = scheduler(2)
        self.run_prompt(plan, job(10))
        assert self.run_prompt(plan, job(10, is_scored=True)).reused == 0
