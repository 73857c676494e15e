"""The metrics of an engine as Prometheus collects them."""

import itertools
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from grokjax.engine.metrics import Histogram, Meter, Metrics
from grokjax.request import FinishReason


def make_registry(meter: Meter) -> CollectorRegistry:
    """A registry of one engine: whatever asks it for metrics, in whichever thread, gets those of that moment."""
    registry = CollectorRegistry()
    registry.register(_EngineCollector(meter))
    return registry


class _EngineCollector(Collector):
    """Gives the metrics of an engine by the names that other servers of language models have for them.

    Source: the names of vLLM's `docs/design/metrics.md` and of SGLang's, with our prefix; those of counters end in
    `_total`, as the library writes them.
    """

    def __init__(self, meter: Meter):
        self._meter = meter

    def collect(self) -> Iterator[Metric]:
        now = self._meter.snapshot()
        yield from _gauges(now)
        yield from _counters(now)
        yield from _histograms(now)


def _gauges(now: Metrics) -> Iterator[Metric]:
    for name, value, what in (
        ("num_requests_running", now.active_slots, "Samples that hold a slot."),
        ("num_requests_waiting", now.queue_length, "Samples that wait for a slot."),
        ("kv_cache_usage_ratio", now.cache_occupancy, "Entries of the cache that running samples fill, 0 to 1."),
    ):
        yield GaugeMetricFamily(f"grokjax_{name}", what, value)


def _counters(now: Metrics) -> Iterator[Metric]:
    for name, value, what in (
        ("prompt_tokens", now.prompt_tokens, "Tokens of the prompts that got a slot."),
        ("prompt_tokens_reused", now.reused_tokens, "Those of them that were taken from another sample's row."),
        ("generation_tokens", now.new_tokens, "Tokens drawn and given out."),
        ("spec_decode_num_draft_tokens", now.guessed_tokens, "Tokens that steps guessed."),
        ("spec_decode_num_accepted_tokens", now.accepted_tokens, "Those of them that were drawn."),
        ("steps", now.steps, "Steps of the engine."),
        ("busy_seconds", now.busy_seconds, "Seconds spent inside steps."),
        ("prefill_seconds", now.prefill_seconds, "Those of them that prefill took."),
    ):
        yield CounterMetricFamily(f"grokjax_{name}", what, value)
    finished = CounterMetricFamily("grokjax_requests_finished", "Samples that ended.", labels=("finish_reason",))
    for reason in get_args(FinishReason):
        finished.add_metric((reason,), now.finished.get(reason, 0))
    yield finished


def _histograms(now: Metrics) -> Iterator[Metric]:
    for name, times, what in (
        ("request_queue_time_seconds", now.queue, "From submission to a slot."),
        ("time_to_first_token_seconds", now.first_token, "From submission to the first token."),
        ("inter_token_latency_seconds", now.between_tokens, "Between two tokens of a sample."),
        ("e2e_request_latency_seconds", now.total, "From submission to the end of a sample."),
    ):
        yield HistogramMetricFamily(f"grokjax_{name}", what, _buckets(times), times.total)


def _buckets(times: Histogram) -> list[tuple[str, float]]:
    """The library's form: bounds as text, the last infinite, and how many times are at most as long."""
    bounds = [*map(str, times.bounds), "+Inf"]
    return list(zip(bounds, itertools.accumulate(times.counts), strict=True))
