"""Standard streams that are closed, full or unread: messages vanish, text ends the command, 0 means done."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
from builders import TINY_DENSE, or_thorough

from grokjax.cli import main

CONFIG = TINY_DENSE.replace(max_seq_len=32)
GENERATE = ["generate", "--random", "config.json", "--mesh", "1,1", "--max-new-tokens", "2", "--ignore-eos"]
PLAN = ["plan", "--config", "config.json", "--target", "cpu:1", "--max-len", "32", "--prompt", "8"]
SOURCE = ["download", "--config", "download/config.json"]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, the file that is there if it has done its work, if any, and the end of its text, if any."""

    arguments: list[str]
    made: str | None = None
    text: str | None = None


COMMANDS = {
    "make-release-fixture": Command(["make-release-fixture", "new", "--layers", "1"], made="new/config.json"),
    "convert": Command(["convert", *SOURCE, "new", "--verify"], made="new/grokjax.json"),
    "verify": Command(["verify", "converted"]),
    "export": Command(["export", *SOURCE, "new"], made="new/config.json"),
    "info": Command(["info", "converted"], text=" 2048\n"),
    "plan": Command([*PLAN, "--plot", "new.png"], made="new.png", text="FLOP\n"),
    "generate": Command([*GENERATE, "hello"], text="\n"),
    "generate --prompts": Command(
        [*GENERATE, "--slots", "1", "--prompts", "prompts.txt", "--output", "new"], made="new"
    ),
}
WITH_TEXT = [name for name, command in COMMANDS.items() if command.text is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    path = tmp_path_factory.mktemp("streams")
    (path / "config.json").write_text(CONFIG.to_json())
    (path / "prompts.txt").write_text("a\nb\n")
    download, config = str(path / "download"), str(path / "download" / "config.json")
    assert main(["make-release-fixture", download, "--layers", "1"]) == 0
    assert main(["convert", download, str(path / "converted"), "--config", config, "--verify"]) == 0
    return path


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, from which it reaches what the commands read."""
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def full() -> TextIO:
    return Path("/dev/full").open("w")


def unread() -> TextIO:
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(
    ("name", "make"),
    or_thorough(
        [(name, make) for name in COMMANDS for make in (full, unread)],
        [(name, unread if number % 2 else full) for number, name in enumerate(COMMANDS)],
    ),
)
def test_the_work_goes_on_where_messages_cannot_be_written(
    name: str,
    make: Callable[[], TextIO],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = COMMANDS[name]
    with make() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert main(command.arguments) == 0
        stream.flush()  # nothing is left that Python would fail to write at its exit
    assert capsys.readouterr().out.endswith(command.text or "")
    assert command.made is None or (here / command.made).stat().st_size > 0


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", WITH_TEXT)
def test_text_that_cannot_be_written_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with full() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(COMMANDS[name].arguments) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error == (
        "grokjax: error: standard output cannot be written: No space left on device. Send it elsewhere, such as to a "
        "disk with room."
    )


@pytest.mark.parametrize("name", WITH_TEXT)
def test_a_reader_of_the_text_may_leave(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the command makes besides its text is there all the same."""
    command = COMMANDS[name]
    with unread() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(command.arguments) == 0
    assert "error" not in capsys.readouterr().err
    assert command.made is None or (here / command.made).stat().st_size > 0


@pytest.mark.usefixtures("here")
def test_a_pipe_that_is_not_standard_output_may_not_break(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("grokjax.cli.checkpoints.convert", fail)
    assert main(COMMANDS["convert"].arguments) == 2
    assert "error: [Errno 32] Broken pipe" in capsys.readouterr().err


def run(shell: str) -> subprocess.CompletedProcess[str]:
    """A line of the shell with `grokjax` in it, as a process; the status is that of `grokjax` in a pipe, too."""
    line = f'set -o pipefail; grokjax() {{ {sys.executable} -m grokjax "$@"; }}; {shell}'
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("redirected", "status", "text", "message"),
    or_thorough(
        [
            (">&-", 0, "", ""),
            (">&- 2>&- <&-", 0, "", ""),
            ("2>/dev/full", 0, "orbax", ""),
            (">/dev/full", 2, "", "grokjax: error: standard output cannot be written"),
            (">/dev/full 2>&1", 2, "", ""),
            ("| true", 0, "", ""),
            ("2>&1 | true", 0, "", ""),
        ],
        [
            (">&-", 0, "", ""),
            (">/dev/full", 2, "", "grokjax: error: standard output cannot be written"),
            ("2>&1 | true", 0, "", ""),
        ],
    ),
)
def test_a_process_ends_with_the_status_that_its_text_deserves(
    redirected: str, status: int, text: str, message: str
) -> None:
    done = run(f"grokjax info converted {redirected}")
    assert done.returncode == status
    assert text in done.stdout
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == bool(message)


def test_a_conversion_is_done_where_nobody_reads_its_messages(here: Path) -> None:
    assert run("grokjax convert download new --config download/config.json 2>&1 | true").returncode == 0
    assert (here / "new" / "grokjax.json").is_file()


@pytest.mark.parametrize("redirected", [">/dev/full", pytest.param(">/dev/full 2>&1", marks=pytest.mark.thorough)])
def test_help_that_cannot_be_written_is_an_error(redirected: str) -> None:
    assert run(f"grokjax plan --help {redirected}").returncode == 2


NOISE = """
import os, sys
from grokjax import cli
from grokjax.cli import console, plan

def work(_):
    with open("results.txt", "w") as file:
        os.write(1, b"a library's text"), os.write(2, b"a library's message")
        console.say("a message")
        file.write("a result")

plan._run = work
sys.exit(cli.main(["plan"]))
"""


@pytest.mark.parametrize("closed", ["2>&-", pytest.param("<&- >&- 2>&-", marks=pytest.mark.thorough)])
def test_no_file_takes_the_place_of_a_closed_stream(closed: str, here: Path) -> None:
    """Else what libraries write there would land in it."""
    (here / "noise.py").write_text(NOISE)
    assert run(f"{sys.executable} noise.py {closed}").returncode == 0
    assert (here / "results.txt").read_text() == "a result"


@pytest.mark.usefixtures("here")
def test_a_table_and_json_need_no_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that has a name in no encoding at all."""
    named = Path(os.fsdecode(b"convert\xe9\xff"))
    named.symlink_to("download")
    with Path("out.txt").open("w", encoding="ascii") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(["info", str(named)]) == 0
        assert main(["info", str(named), "--json"]) == 0
    *lines, record = Path("out.txt").read_text(encoding="ascii").splitlines()
    assert "convert??/ckpt-0: release checkpoint" in lines[0]
    assert json.loads(record)["parameters"]
