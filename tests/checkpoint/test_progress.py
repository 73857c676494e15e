"""What takes long reports how far it has come: to a callback, else to the logger, never to nobody."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import write_checkpoint

from grokjax import convert, export, load, load_parameters, save, verify
from grokjax.checkpoint.progress import LogLines, Progress, Tally


def test_a_program_that_asks_for_nothing_is_told_nothing() -> None:
    """What a library logs that nobody listens to, Python would write to standard error if it is a warning."""
    logger = logging.getLogger("grokjax")
    assert logger.level == logging.NOTSET
    assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]


def test_the_logger_is_told_now_and_then_at_what_rate_and_how_long_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    """What an earlier run has done counts for no rate."""
    now = [0.0]
    report = LogLines("converted", clock=lambda: now[0])
    with caplog.at_level(logging.INFO, logger="grokjax"):
        for now[0], done in ((1.0, 100), (6.0, 150), (11.0, 200), (12.0, 210), (21.0, 300), (22.0, 400)):
            report(Progress(f"part.{done}", None, done * 10**6, 400 * 10**6))
    assert caplog.messages == [
        "converted 100.0 MB of 400.0 MB: part.100",
        "converted 200.0 MB of 400.0 MB, 10.0 MB/s, 20 seconds left: part.200",
        "converted 300.0 MB of 400.0 MB, 10.0 MB/s, 10 seconds left: part.300",
        "converted 400.0 MB of 400.0 MB, 14.3 MB/s: part.400",
    ]


def test_the_logger_names_what_is_fresh_or_renamed(caplog: pytest.LogCaptureFixture) -> None:
    """Also where a callback is told how far it is."""
    reports: list[Progress] = []
    tally = Tally("loaded", 2000, reports.append)
    with caplog.at_level(logging.DEBUG, logger="grokjax"):
        tally.add(0, "layers.0.feed_forward.router", None)
        tally.add(500, "final_norm.scale", "last_norm")
        tally.add(1500, "embedding.table", "embedding.table")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "layers.0.feed_forward.router keeps its fresh value"),
        ("DEBUG", "loaded final_norm.scale from last_norm, 500 Bytes"),
        ("DEBUG", "loaded embedding.table, 1.5 kB"),
    ]
    assert [report.done_bytes for report in reports] == [0, 500, 2000]


def test_no_long_work_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_checkpoint(tmp_path / "source")
    works: dict[str, Callable[[], object]] = {
        "loaded": lambda: load(source.path, source.config),
        "converted": lambda: convert(source.path, tmp_path / "converted", source.config),
        "verified": lambda: verify(tmp_path / "converted", source.path, source.config),
        "exported": lambda: export(source.path, tmp_path / "exported", source.config),
        "saved": lambda: save(load(source.path, source.config), tmp_path / "saved"),
    }
    for done, work in works.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="grokjax"):
            work()
        begun, *_, ended = [line for line in caplog.messages if line.startswith(f"{done} ")]
        assert " of " in begun
        assert "/s" in ended
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="grokjax"):
        load_parameters(source.path, [r"final_norm\.scale"], source.config)
        load(source.path, source.config, progress=lambda _: None)
    assert caplog.messages == ["loaded 128 Bytes of 128 Bytes: final_norm.scale"]
