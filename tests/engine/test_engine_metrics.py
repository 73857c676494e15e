"""The engine by hand, over a fake model: what it measures of itself, and what it holds on to."""

import gc
import tracemalloc

import numpy as np
import prometheus_client
import pytest
from fake_steps import (
    VOCAB,
    expected,
    make_engine,
)
from jobs import scheduler
from prometheus_client.parser import text_string_to_metric_families

from grokjax.engine import Engine
from grokjax.engine.metrics import Histogram, Meter
from grokjax.request import Request


class TestMetrics:
    def test_metrics_are_those_by_hand(self) -> None:
        engine = make_engine(slots=2)
        empty = engine.metrics()
        assert (empty.tokens_per_second, empty.first_token.mean, empty.prefix_hit_rate) == (0, None, 0)
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
        assert (last.queue.count, last.first_token.count, last.between_tokens.count, last.total.count) == (3, 3, 9, 3)
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
        assert self.found(last.first_token) == {1.0: 1, 10.0: 1}
        assert self.found(last.between_tokens) == {5.0: 2, 10.0: 1}
        assert (last.first_token.mean, last.between_tokens.mean) == (5, 5)
        assert (last.queue.total, last.total.total) == (1 + 9, 9)

    def test_shares_are_those_by_hand(self) -> None:
        meter = Meter(scheduler())
        meter.note_prompt(10, 0, 0.5)
        meter.note_prompt(10, 4, 0.5)
        meter.note_step(12.0, prefilled=False, decoded=True, is_first=True)  # it was compiled, as no other is
        for seconds, prefilled, decoded in (
            (1.0, False, True),
            (2.0, True, False),
            (4.0, True, True),
            (1.0, False, False),
        ):
            meter.note_step(seconds, prefilled=prefilled, decoded=decoded)
        now = meter.snapshot()
        assert (now.prefix_hits, now.prefix_hit_rate, now.reused_tokens) == (1, 0.5, 4)
        assert now.prefill_share == (2 + 4 - 1) / 20  # of a step with both, what a decode step usually takes is not
        assert now.decode_share == pytest.approx(15 / 20)

    def found(self, times: Histogram) -> dict[float, int]:
        """Bound -> how many times are at most that long, and longer than the bound before; where there are any."""
        return {bound: count for bound, count in zip(times.bounds, times.counts, strict=False) if count}

    def test_quantiles_are_those_by_hand(self) -> None:
        times = Histogram(bounds=(1.0, 2.0, 4.0), counts=(0, 4, 4, 2), total=0.0)
        for part, by_hand in ((0.0, 1.0), (0.2, 1.5), (0.4, 2.0), (0.6, 3.0), (0.8, 4.0), (0.9, 4.0), (1.0, 4.0)):
            assert times.quantile(part) == pytest.approx(by_hand)
        assert Histogram((1.0, 2.0), (0, 3, 0), 0.0).quantile(1) == 2
        assert Histogram((1.0,), (0, 0), 0.0).quantile(0.5) is None
        with pytest.raises(ValueError, match=r"the part 99 must be from 0 to 1, such as 0\.99"):
            times.quantile(99)


class TestPrometheus:
    def samples(self, engine: Engine) -> dict[str, float]:
        """Name and labels, as they stand in the text -> value."""
        text = prometheus_client.generate_latest(engine.registry).decode()
        return {
            sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def test_the_text_says_what_the_engine_did(self) -> None:
        now = 1.0
        engine, other = make_engine(slots=1, clock=lambda: now), make_engine()
        for token in (3, 4):
            engine.submit(Request([token], max_new_tokens=3, ignore_eos=True))
        now = 2.0
        engine.step()
        told = self.samples(engine)
        assert (told["grokjax_num_requests_running"], told["grokjax_num_requests_waiting"]) == (1, 1)
        assert told["grokjax_kv_cache_usage_ratio"] == engine.metrics().cache_occupancy > 0
        for now in (5.0, 10.0, 17.0):  # noqa: B007
            engine.step()
        told = self.samples(engine)
        assert told["grokjax_prompt_tokens_total"] == 2
        assert told["grokjax_generation_tokens_total"] == 5
        assert told["grokjax_steps_total"] == 4
        assert told["grokjax_requests_finished_total{length}"] == 1
        assert told["grokjax_requests_finished_total{deadline}"] == 0
        # As bounds grow, how many times are at most as long: 3, 5 and 7 seconds.
        name = "grokjax_inter_token_latency_seconds"
        assert [told[f"{name}_bucket{{{bound}}}"] for bound in ("2.5", "5.0", "10.0", "1000.0", "+Inf")] == [
            0,
            2,
            3,
            3,
            3,
        ]
        assert (told[f"{name}_count"], told[f"{name}_sum"]) == (3, 15)
        assert told["grokjax_time_to_first_token_seconds_sum"] == 10
        assert told["grokjax_request_queue_time_seconds_count"] == 2
        assert told["grokjax_e2e_request_latency_seconds_sum"] == 9
        assert set(self.samples(other)) == set(told)
        assert self.samples(other)["grokjax_steps_total"] == 0

    def test_nothing_is_put_into_the_registry_of_all(self) -> None:
        make_engine().generate([[3]], max_new_tokens=1)
        assert b"grokjax" not in prometheus_client.generate_latest()


def traced() -> int:
    """Bytes that Python holds on to."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.thorough
def test_thousands_of_requests_are_answered_in_memory_that_does_not_grow() -> None:
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
    assert run(2500) == 2500
    before = traced()
    assert run(2500) == 2500
    grown = traced() - before
    tracemalloc.stop()
    assert grown < 50_000
    assert engine.metrics().prefix_hits > 1000
    assert not engine.has_work
