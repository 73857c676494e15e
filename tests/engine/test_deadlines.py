"""A request that is not done by its deadline ends with what it has, wherever it is, and nothing else ends with it."""

import pytest
from fake_steps import continuation, make_engine

from grokjax.request import Request


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_running_request_ends_with_what_it_has(clock: Clock) -> None:
    engine = make_engine(clock=clock)
    late, other = (
        engine.submit(Request([token], deadline=deadline, max_new_tokens=20, ignore_eos=True))
        for token, deadline in ((3, 2.5), (4, None))
    )
    for clock.now in (101.0, 102.0, 102.4):
        engine.step()
    assert not late.is_done
    clock.now = 102.5
    assert engine.step() == [late]
    done = late.completion
    assert (done.finish_reason, done.error, done.timings.total) == ("deadline", None, 2.5)
    assert list(done.token_ids) == continuation([3], 3)
    assert late.pieces[-1].finish_reason == "deadline"
    assert engine.run() == [other]
    assert list(other.completion.token_ids) == continuation([4], 20)
    assert engine.metrics().finished == {"deadline": 1, "length": 1}


def test_those_that_wait_end_too_and_all_samples_together(clock: Clock) -> None:
    engine = make_engine(clock=clock, slots=1)
    running = engine.submit(Request([3], max_new_tokens=5, ignore_eos=True))
    late = engine.submit(Request([4], n=3, deadline=1))
    engine.step()
    clock.now += 2
    engine.step()
    assert [(sample.finish_reason, sample.token_ids) for sample in late.samples] == [("deadline", ())] * 3
    assert engine.metrics().queue_length == 0
    engine.run()
    assert list(running.completion.token_ids) == continuation([3], 5)


def test_a_long_prompt_ends_between_two_chunks(clock: Clock) -> None:
    engine = make_engine(clock=clock, slots=1)
    late = engine.submit(Request([3] * 40, deadline=1))
    after = engine.submit(Request([4], max_new_tokens=2, ignore_eos=True))
    engine.step()
    clock.now += 1
    engine.step()
    assert late.completion.finish_reason == "deadline"
    engine.run()
    assert list(after.completion.token_ids) == continuation([4], 2)


def test_what_is_done_in_time_does_not_end_by_its_deadline(clock: Clock) -> None:
    engine = make_engine(clock=clock)
    handle = engine.submit(Request([3], deadline=10, max_new_tokens=2, ignore_eos=True))
    engine.run()
    clock.now += 20
    engine.step()
    assert handle.completion.finish_reason == "length"
