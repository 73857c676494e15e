"""The engine by hand, over a fake model: what it measures of itself, and what it holds on to."""

import dataclasses
import gc
import tracemalloc

import numpy as np
import pytest
from fake_steps import (
    VOCAB,
    expected,
    make_engine,
)

from grokjax.engine.metrics import Meter
from grokjax.request import Request


class TestMetrics:
    def test_metrics_are_those_by_hand(self) -> None:
        engine = make_engine(slots=2)
        empty = engine.metrics()
        assert (empty.tokens_per_second, empty.first_token.p50, empty.prefix_hit_rate) == (0, None, 0)
        for i in range(3):
            engine.submit(Request([3 + i] * 8, max_new_tokens=4, ignore_eos=True))
        engine.step()
        engine.step()
        now = engine.metrics()
        assert (now.queue_length, now.active_slots) == (1, 2)
        assert now.cache_occupancy == (9 + 9) / (2 * 64)  # each prompt and the first of two tokens that were read
        engine.run()
        last = engine.metrics()
        assert (last.queue_length, last.active_slots, last.cache_occupancy) == (0, 0, 0)
        assert (last.new_tokens, last.prompt_tokens, last.finished) == (12, 24, {"length": 3})
        assert last.prefill_share + last.decode_share == pytest.approx(1)
        assert last.between_tokens.p50 <= last.between_tokens.p99
        assert last.tokens_per_second == pytest.approx(12 / last.busy_seconds)

    def test_waiting_times_are_those_by_hand(self) -> None:
        now = 1.0
        engine = make_engine(slots=1, clock=lambda: now)
        for token in (3, 4):
            engine.submit(Request([token], max_new_tokens=3, ignore_eos=True))
        for now in (2.0, 5.0, 10.0, 17.0):  # noqa: B007
            engine.step()
        last = engine.metrics()
        # At 2, 5 and 10 a token of the first request came, at 10 and 17 one of the second, which waited for the slot.
        assert dataclasses.astuple(last.first_token) == pytest.approx(np.percentile([1, 9], (50, 90, 99)))
        assert dataclasses.astuple(last.between_tokens) == pytest.approx(np.percentile([3, 5, 7], (50, 90, 99)))

    def test_shares_are_those_by_hand(self) -> None:
        meter = Meter()
        meter.note_prompt(10, 0)
        meter.note_prompt(10, 4)
        for seconds, prefilled, decoded in (
            (1.0, False, True),
            (2.0, True, False),
            (4.0, True, True),
            (1.0, False, False),
        ):
            meter.note_step(seconds, prefilled=prefilled, decoded=decoded)
        now = meter.snapshot(queue_length=0, active_slots=0, cache_occupancy=0)
        assert (now.prefix_hits, now.prefix_hit_rate, now.reused_tokens) == (1, 0.5, 4)
        assert now.prefill_share == (2 + 4 - 1) / 8  # of a step with both, what a decode step usually takes is not
        assert now.decode_share == pytest.approx(3 / 8)


def traced() -> int:
    """Bytes that Python holds on to."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.thorough
def test_ten_thousand_requests_are_answered_in_memory_that_does_not_grow() -> None:
    """All are answered as by hand."""
    random = np.random.default_rng(0)
    engine = make_engine(slots=8, max_queue=64)
    shared = random.integers(3, VOCAB, 16).tolist()

    def requests(count: int):
        for number in range(count):
            prompt = shared[: random.integers(0, 17)] + random.integers(3, VOCAB, random.integers(1, 20)).tolist()
            yield Request(prompt, max_new_tokens=int(random.integers(1, 12)), seed=number % 100)

    def run(count: int) -> int:
        finished = 0
        for handle in engine.as_completed(requests(count)):
            request, done = handle.request, handle.completion
            assert list(done.token_ids) == expected(request.prompt, limit=request.max_new_tokens, seed=request.seed)
            finished += 1
        return finished

    tracemalloc.start()
    assert run(5000) == 5000
    before = traced()
    assert run(5000) == 5000
    grown = traced() - before
    tracemalloc.stop()
    assert grown < 50_000
    assert engine.metrics().prefix_hits > 1000
    assert not engine.has_work
