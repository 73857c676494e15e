"""`grokjax score --stream --keep-pass`: a pass that was interrupted goes on in its middle."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import SMALL, write_checkpoint

from grokjax import CheckpointError
from grokjax.checkpoint.layer_reader import LayerReader
from grokjax.cli import main

CONFIG = SMALL.replace(vocab_size=264, num_layers=3, max_seq_len=64)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A job that scores two texts by a model of three layers, in an empty folder."""
    write_checkpoint(tmp_path / "model", CONFIG)
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    (tmp_path / "texts.txt").write_text("once upon a time\nxy\n")
    monkeypatch.chdir(tmp_path)
    source = ["--checkpoint", "model", "--config", "config.json", "--tokenizer", "bytes", "--mesh", "1,1"]
    options = ["--dtype", "float32", "--no-compilation-cache", "--output", "scores.jsonl"]
    return ["score", "texts.txt", *source, *options, "--stream", "--keep-pass"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are read, in turn."""
    found: list[int] = []
    read = LayerReader.read

    def note(self: LayerReader, number: int, *others: Any) -> Any:
        found.append(number)
        return read(self, number, *others)

    monkeypatch.setattr(LayerReader, "read", note)
    return found


def interrupt(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the job on a disk that fails at the last layer."""
    read = LayerReader.read

    def fail(self: LayerReader, number: int, *others: Any) -> Any:
        if number == 2:
            raise CheckpointError("the disk is gone")
        return read(self, number, *others)

    with monkeypatch.context() as patch:
        patch.setattr(LayerReader, "read", fail)
        assert main(command) == 2


def take_scores() -> list[Any]:
    """The scores that the job has written, which are removed."""
    output = Path("scores.jsonl")
    records = sorted(map(json.loads, output.read_text().splitlines()), key=lambda record: record["id"])
    output.unlink()
    return [record["prompt_logprobs"] for record in records]


def test_an_interrupted_pass_goes_on_after_its_last_layer(
    command: list[str], reads: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    assert reads == [0, 1, 2]
    assert not Path("scores.jsonl.pass").exists()
    expected = take_scores()
    interrupt(command, monkeypatch)
    assert Path("scores.jsonl.pass").exists()
    reads.clear()
    capsys.readouterr()
    assert main(command) == 0
    assert reads == [2]
    assert "scores.jsonl.pass: the pass goes on after 2 layers" in capsys.readouterr().err
    assert take_scores() == expected
    assert not list(Path().glob("*.pass*"))


@pytest.mark.parametrize("what", ["damaged", "cut", "other texts", "other weights"])
def test_what_another_pass_left_is_not_used(
    what: str,
    command: list[str],
    reads: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(command, monkeypatch)
    kept = Path("scores.jsonl.pass")
    data = kept.read_bytes()
    if what == "damaged":
        kept.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif what == "cut":
        kept.write_bytes(data[:30])
    elif what == "other texts":
        Path("texts.txt").write_text("once upon a time\nyx\n")
    else:
        write_checkpoint(Path("model"), CONFIG, seed=1)
    reads.clear()
    capsys.readouterr()
    assert main(command) == 0
    assert reads == [0, 1, 2]
    said = "scores.jsonl.pass is damaged, or of other texts or weights: the pass begins with the first layer"
    assert said in capsys.readouterr().err
    found = take_scores()
    assert main(command[:-1]) == 0
    assert found == take_scores()


def test_a_file_of_anything_else_stays(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    kept = Path("scores.jsonl.pass")
    kept.write_text("mine")
    assert main(command) == 2
    assert "scores.jsonl.pass has the name of what --keep-pass keeps, and is none: move it" in capsys.readouterr().err
    assert kept.read_text() == "mine"
    kept.unlink()
    kept.mkdir()
    assert main(command) == 2
    assert "scores.jsonl.pass cannot be read: Is a directory. Move it away." in capsys.readouterr().err


def test_a_pass_that_cannot_be_kept_is_told(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("scores.jsonl.pass.part").mkdir()
    assert main(command) == 2
    assert "make room, or leave --keep-pass away." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--keep-pass goes with --stream: without it there are no passes that take long."),
        (["--stream", "--distributed"], "--keep-pass is for one process: leave it away where several work together."),
    ],
)
def test_where_no_pass_is_kept_it_is_refused(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "texts.txt", "--checkpoint", "model", "--output", "scores.jsonl", "--keep-pass", *options]
    assert main(command) == 2
    assert told in capsys.readouterr().err
