"""An engine is used by one thread at a time: another one is refused, and no result is harmed."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import prometheus_client
import pytest
from fake_steps import FakeSteps, continuation, make_engine

from grokjax.engine import Engine, Handle
from grokjax.request import Request

SECONDS = 20  # for the other thread, which needs none of them


@pytest.fixture
def in_a_step() -> Iterator[tuple[Engine, Handle, threading.Event, Future[list[Handle]]]]:
    """An engine that another thread runs, its request, what lets it go on, and what `run` will return there."""
    entered, may_go_on = threading.Event(), threading.Event()

    class Held(FakeSteps):
        def decode(self, settings):
            entered.set()
            assert may_go_on.wait(SECONDS)
            return super().decode(settings)

    engine = make_engine(make_steps=Held)
    handle = engine.submit(Request([3, 4], max_new_tokens=5, ignore_eos=True))
    with ThreadPoolExecutor(1) as other:
        try:
            ended = other.submit(engine.run)
            assert entered.wait(SECONDS)
            yield engine, handle, may_go_on, ended
        finally:
            may_go_on.set()


def test_a_second_thread_is_refused_and_the_results_are_right(in_a_step) -> None:
    engine, handle, may_go_on, ended = in_a_step
    for call in (
        engine.step,
        engine.run,
        engine.close,
        engine.warm_up,
        lambda: engine.submit(Request([5])),
        lambda: engine.cancel(handle),
        lambda: next(engine.stream(handle)),
        lambda: next(engine.as_completed([Request([5])])),
        lambda: engine.generate([[5]]),
    ):
        with pytest.raises(ValueError, match=r"another thread is using this Engine, .*: let one thread make all calls"):
            call()
    may_go_on.set()
    assert ended.result(SECONDS) == [handle]
    assert list(handle.completion.token_ids) == continuation([3, 4], 5)
    [done] = engine.generate([[5]], max_new_tokens=2, ignore_eos=True)  # the first has left
    assert list(done.token_ids) == continuation([5], 2)


def test_any_thread_may_look_at_an_engine_that_works(in_a_step) -> None:
    engine, *_ = in_a_step
    assert engine.metrics().active_slots == 1
    assert b"grokjax_num_requests_running 1.0" in prometheus_client.generate_latest(engine.registry)
    assert repr(engine) == "Engine(open: 3 slots of 64 tokens, 1 running, 0 queued)"
    assert engine.failure is None
    assert engine.has_work
    assert engine.has_room
