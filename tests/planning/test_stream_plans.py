"""The plan of weights that stream: counted by hand for the real model."""

import pytest

from grokjax import GrokConfig
from grokjax.planning import GIB, plan_stream

GROK = GrokConfig.grok_1()
# Eight experts of three matrices in int8, and their scales of two bytes a column; the attention's matrices are small.
EXPERT_BYTES = 8 * 3 * 6144 * 32768


def test_a_pass_is_bound_by_the_disk_until_it_is_bound_by_computing() -> None:
    made = plan_stream(GROK, "h100:1", num_tokens=8, disk_bandwidth=7e9)
    assert (made.on_devices, made.on_host, made.on_disk) == (0, 0, 64)
    assert made.layer_bytes == pytest.approx(EXPERT_BYTES, rel=0.03)
    assert made.seconds == pytest.approx(64 * EXPERT_BYTES / 7e9, rel=0.03)
    assert made.tokens_per_second == 8 / made.seconds
    assert made.bound_from == pytest.approx(made.layer_bytes / 7e9 * 989e12 / (2 * 1.3e9), rel=0.03)
    below, above = (
        plan_stream(GROK, "h100:1", num_tokens=count, disk_bandwidth=7e9) for count in (made.bound_from // 2, 10**6)
    )
    assert below.seconds == made.seconds
    assert above.seconds == pytest.approx(64 * above.compute_seconds)


def test_layers_that_stay_are_read_from_where_they_are() -> None:
    budgets = {"device_bytes": 70 * GIB, "host_bytes": 64 * GIB}
    made = plan_stream(GROK, "h100:1", num_tokens=8, disk_bandwidth=1e9, host_bandwidth=50e9, **budgets)
    assert made.fits
    assert made.weights_bytes <= 70 * GIB < made.weights_bytes + made.layer_bytes
    assert made.on_host == 64 * GIB // made.layer_bytes
    assert made.seconds == pytest.approx(
        made.on_disk * made.layer_bytes / 1e9
        + made.on_host * made.layer_bytes / 50e9
        + made.on_devices * made.compute_seconds
    )
    assert plan_stream(GROK, "h100:8", num_tokens=1, disk_bandwidth=1e9, device_bytes=60 * GIB).on_disk == 0


def test_few_tokens_leave_experts_unread_and_wait_for_those_they_chose() -> None:
    made, whole = (
        plan_stream(GROK, "h100:1", num_tokens=count, disk_bandwidth=7e9, host_bandwidth=50e9) for count in (1, 8)
    )
    assert (made.share, whole.share) == (1 / 4, 1)
    assert made.layer_bytes == whole.layer_bytes
    assert made.disk_seconds == pytest.approx(whole.disk_seconds - 3 / 4 * EXPERT_BYTES / 7e9, rel=0.001)
    sent = made.layer_bytes / 50e9
    assert made.seconds == pytest.approx(64 * (made.disk_seconds + sent + 2 * made.compute_seconds))
    stays = plan_stream(GROK, "h100:8", num_tokens=1, disk_bandwidth=7e9, device_bytes=60 * GIB)
    assert stays.seconds == pytest.approx(64 * stays.compute_seconds)


def test_figures_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"disk_bandwidth=0 must be above 0, and finite: give bytes a second\."):
        plan_stream(GROK, "h100:1", num_tokens=1, disk_bandwidth=0)
    with pytest.raises(ValueError, match=r"device_bytes=1 \(1 Byte\) is too little"):
        plan_stream(GROK, "h100:1", num_tokens=1, disk_bandwidth=1e9, device_bytes=1)
