"""What the commands say: how wide a table is, and what a message may hold."""

import io
import logging
import sys

import pytest
from rich.console import Console
from rich.table import Table

from grokjax.checkpoint import Progress
from grokjax.cli import console
from grokjax.cli.console import byte_progress, messages, say, say_error, set_level, table_text


@pytest.mark.parametrize(("is_terminal", "num_lines"), [(True, 5), (False, 2)])
def test_a_table_is_as_wide_as_the_terminal_and_elsewhere_has_a_line_for_each_row(
    is_terminal: bool, num_lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "30")
    table = Table("mesh", "why", box=None, pad_edge=False)
    table.add_row("1,8", " ".join(["word"] * 20))
    lines = table_text(table).splitlines()
    assert len(lines) == num_lines
    assert (max(map(len, lines)) <= 30) == is_terminal
    assert [line for line in lines if line != line.rstrip()] == []
    assert " ".join(lines).split() == ["mesh", "why", "1,8", *["word"] * 20]


def test_a_message_is_written_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither its brackets nor its length mean anything to what writes it."""
    text = f"[bold]layers.0[/bold] :smile: {'long ' * 40}end"
    with messages():
        say(text)
    assert capsys.readouterr().err == f"grokjax: {text}\n"


def test_what_the_library_logs_is_a_message_while_a_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("grokjax.checkpoint")
    with messages():
        library.debug("a detail")
        library.info("progress")
        library.warning("a warning")
        set_level(logging.WARNING)
        say("a message")
        say_error(ValueError("an error"))
    library.warning("a warning to nobody")
    assert capsys.readouterr().err.splitlines() == [
        "grokjax: progress",
        "grokjax: warning: a warning",
        "grokjax: error: an error",
    ]


def test_of_several_processes_the_first_says_what_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "process_index", lambda: 1)
    with messages():
        say("a message")
        say_error(ValueError("an error"))
    assert capsys.readouterr().err == "grokjax: error in process 1: an error\n"


@pytest.mark.parametrize(("level", "is_shown"), [(logging.INFO, True), (logging.WARNING, False)])
def test_a_terminal_is_shown_a_bar_of_bytes_unless_it_shall_be_quiet(
    level: int, is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(console, "STDERR", Console(file=terminal, force_terminal=True, width=80, color_system=None))
    with messages():
        set_level(level)
        with byte_progress("loaded") as report:
            assert report is not None
            report(Progress("final_norm.scale", "final_norm.scale", 50, 100))
    assert ("50/100 bytes" in terminal.getvalue()) == is_shown


def test_elsewhere_the_logger_is_told_and_no_bar() -> None:
    with byte_progress("loaded") as report:
        assert report is None
