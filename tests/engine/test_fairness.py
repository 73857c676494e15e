"""Users share the slots by tokens: who asks for little waits for little, and nobody saves up turns."""

import collections
import itertools

import pytest
from fake_steps import continuation, make_engine
from jobs import job, scheduler

from grokjax.engine.fairness import Shares
from grokjax.request import Request


def first_of(counts: Shares, *users: str) -> str:
    return min(users, key=counts.given)


class TestShares:
    def test_the_next_turn_is_of_whom_was_given_the_fewest_tokens(self) -> None:
        counts = Shares()
        for user in ("ann", "bob"):
            counts.enter(user, 9)
        counts.charge("ann", prompt_tokens=10)
        assert first_of(counts, "ann", "bob") == "bob"
        counts.charge("bob", drawn_tokens=6)  # each counts as two of a prompt
        assert (counts.given("ann"), counts.given("bob")) == (10, 12)

    def test_nobody_saves_turns_up(self) -> None:
        """Neither one who is new nor one who had nothing to ask for."""
        counts = Shares()
        counts.enter("idle")
        counts.leave("idle")
        counts.enter("busy", 99)
        counts.charge("busy", prompt_tokens=1000)
        counts.enter("idle")
        assert counts.given("idle") == counts.given("busy") == 1000
        counts.charge("idle", prompt_tokens=1)
        assert first_of(counts, "idle", "busy") == "busy"

    def test_a_debt_is_not_lost_by_leaving(self) -> None:
        counts = Shares()
        counts.enter("patient", 9)
        counts.enter("greedy")
        counts.charge("greedy", prompt_tokens=500)
        counts.leave("greedy")
        counts.enter("greedy")
        assert (counts.given("greedy"), counts.given("patient")) == (500, 0)

    def test_tokens_count_only_while_others_wait(self) -> None:
        counts = Shares()
        counts.enter("ann")
        counts.charge("bob", prompt_tokens=7)
        counts.leave("ann")
        counts.charge("bob", prompt_tokens=7)
        assert (counts.given("ann"), counts.given("bob")) == (0, 0)

    def test_users_who_never_come_back_are_forgotten(self) -> None:
        counts = Shares()
        counts.enter("patient")
        for number in range(5000):
            counts.enter(f"once {number}")
            counts.charge(f"once {number}", prompt_tokens=3)
            counts.leave(f"once {number}")
        assert sum(counts.given(f"once {number}") > 0 for number in range(5000)) < 4100


@pytest.mark.parametrize("slots", [1, 3])
def test_users_who_always_wait_get_the_same(slots: int) -> None:
    """Be their requests long or short, and as many as they like; where arrival decided, one would get 14 times more."""
    plan, given, left = scheduler(slots, reuse_prefixes=False), collections.Counter(), {}
    sizes = {"short": (3, 2), "long": (20, 40)}  # tokens of the prompt, and drawn
    waiting: collections.Counter[str] = collections.Counter()
    numbers = itertools.count()
    for _ in range(3000):
        for user, (length, _) in sizes.items():
            while waiting[user] < 5:
                plan.submit(job(length, first=100 * next(numbers), user=user))
                waiting[user] += 1
        for admission in plan.admit():
            user = admission.job.user
            waiting[user] -= 1
            left[admission.job] = sizes[user][1] - 1
            given[user] += sizes[user][0] + 2
        for one in plan.running:
            if not left[one]:
                plan.release(one)
        plan.note_draws(plan.running)
        for one in plan.running:
            left[one] -= 1
            given[one.user] += 2
    assert abs(given["short"] - given["long"]) <= slots * (20 + 2 * 40)
    assert min(given.values()) > 2000


def test_a_short_request_waits_for_a_slot_and_not_for_anothers_four_hundred() -> None:
    engine = make_engine(slots=2, max_queue=500)
    crowd = [engine.submit(Request([3, i % 29 + 3], user="ann", max_new_tokens=9, ignore_eos=True)) for i in range(400)]
    for _ in range(5):
        engine.step()
    mine = engine.submit(Request([5], user="bob", max_new_tokens=2, ignore_eos=True))
    while not mine.is_done:
        engine.step()
    assert sum(handle.is_done for handle in crowd) <= 4
    assert list(mine.completion.token_ids) == continuation([5], 2)
    assert len(engine.run()) >= 396


def test_priority_goes_before_users_and_arrival_decides_within_one() -> None:
    engine = make_engine(slots=1)
    asked = [("ann", 0), ("ann", 0), ("bob", 0), ("ann", 1), (None, 0)]
    handles = [
        engine.submit(Request([3 + i], user=user, priority=priority, max_new_tokens=2, ignore_eos=True))
        for i, (user, priority) in enumerate(asked)
    ]
    order = [handles.index(handle) for handle in engine.run()]
    assert order == [3, 2, 4, 0, 1]
