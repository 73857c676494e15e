"""What the commands say: how wide a table is, and what a message may hold."""

import sys

import pytest
from rich.table import Table

from grokjax.cli.console import say, table_text


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
    say(text)
    assert capsys.readouterr().err == f"grokjax: {text}\n"
