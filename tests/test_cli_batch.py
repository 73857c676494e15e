"""`grokjax generate --prompts`: what is read, what is written and when, and how an interrupted job goes on."""

import dataclasses
import fcntl
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_steps import EOS, VOCAB, FakeModel, FakeSteps, continuation

from grokjax import GrokConfig
from grokjax.cli import main
from grokjax.cli_batch import Prompt, open_results, read_prompts, run_batch
from grokjax.console import BatchProgress
from grokjax.engine import Engine
from grokjax.request import Request

SETTINGS = {"max_new_tokens": 5, "temperature": 0.5, "seed": 3, "ignore_eos": True}


class Numbers:
    """A prompt is its token ids in words."""

    vocab_size, pad_id, bos_id, eos_id = VOCAB, 0, 1, EOS

    def encode(self, text: str) -> list[int]:
        text.encode()  # as every tokenizer, refuses what is no text
        return [int(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


class StoppedError(Exception):
    """What ends a job in the middle."""


def make_engine(**options) -> Engine:
    return Engine(FakeModel(), Numbers(), slots=2, max_len=32, make_steps=FakeSteps, **options)


def read(folder: Path, text: str | bytes, name: str = "prompts.txt") -> tuple[Prompt, ...]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts(path, SETTINGS)


def read_json(folder: Path, *lines: object) -> tuple[Prompt, ...]:
    return read(folder, "\n".join(map(json.dumps, lines)), "prompts.jsonl")


def run(
    prompts: tuple[Prompt, ...], path: Path, progress=lambda done, tokens: None, engine: Engine | None = None
) -> None:
    with open_results(path, prompts) as results:
        run_batch(engine or make_engine(), prompts, results, progress)


def records(path: Path) -> dict[Any, dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


class TestPrompts:
    def test_text(self, tmp_path: Path) -> None:
        first, second = read(tmp_path, "\ufeff4 5\r\n\n  \n 6\u2028 7")
        assert (first.id, first.line) == (1, 1)
        assert dataclasses.asdict(first.request) == dataclasses.asdict(Request("4 5", **SETTINGS))
        assert (second.id, second.request.prompt) == (4, " 6\u2028 7")

    def test_json(self, tmp_path: Path) -> None:
        lines = (
            {"prompt": "4", "id": "a", "seed": 9, "stop": ["x"], "logit_bias": {"5": -1.0}, "n": 2},
            {"prompt": [4, 5]},
        )
        first, second = read_json(tmp_path, *lines)
        assert (first.id, first.request.seed, first.request.n) == ("a", 9, 2)
        assert first.request.logit_bias == {5: -1.0}
        assert first.request.temperature == SETTINGS["temperature"]
        assert (second.id, list(second.request.prompt)) == (2, [4, 5])

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("[1]", 'line 1 is not a JSON object: write {"prompt": "..."}'),
            ("{", "line 1 is not a JSON object"),
            ("{}", "line 1 has no prompt"),
            ('{"prompt": "4", "id": true}', "id=True must be a text or an integer"),
            ('{"prompt": "4", "tone": 1}', "tone is no field of a request; these are: id, prompt"),
            ('{"prompt": "4", "ignore_eos": 1}', "ignore_eos=1 must be true or false"),
            ('{"prompt": "4", "logit_bias": {"a": 1}}', "keys of logit_bias must be token ids"),
            ('{"prompt": "4", "id": "b"}\n{"prompt": "5", "id": "b"}', "lines 1 and 2 have the id 'b'"),
            ('{"prompt": "4", "id": 2}\n{"prompt": "5"}', "lines 1 and 2 have the id 2: give each its own"),
            ("\n \n", "has no prompts: give it at least one line"),
        ],
    )
    def test_bad_lines(self, line: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            read(tmp_path, line, "prompts.jsonl")

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"--prompts .*missing cannot be read: No such file"):
            read_prompts(tmp_path / "missing", SETTINGS)


class TestResults:
    def test_every_prompt_gets_its_result(self, tmp_path: Path) -> None:
        prompts = read_json(tmp_path, {"prompt": "4 5", "logprobs": 1}, {"prompt": [6], "n": 2, "id": "two"})
        run(prompts, tmp_path / "out")
        found = records(tmp_path / "out")
        tokens = continuation([4, 5], 5, seed=3)
        assert found[1]["prompt"] == "4 5"
        assert (found[1]["token_ids"], found[1]["finish_reason"]) == (tokens, "length")
        assert found[1]["text"] == Numbers().decode(tokens)
        assert len(found[1]["logprobs"]) == 5
        assert found[1]["timings"].keys() >= {"queue", "prefill", "first_token", "decode"}
        assert [sample["token_ids"] for sample in found["two"]["samples"]] == [
            continuation([6], 5, seed=3),
            continuation([6], 5, seed=4),
        ]

    def test_a_bad_prompt_ends_alone(self, tmp_path: Path) -> None:
        lines = [b"4", b"x", b"\xff", b" ".join([b"4"] * 40), b"5"]
        run(read(tmp_path, b"\n".join(lines)), tmp_path / "out")
        found = records(tmp_path / "out")
        assert [number for number in found if "error" in found[number]] == [2, 3, 4]
        assert "invalid literal" in found[2]["error"]
        assert found[4]["finish_reason"] == "error"
        assert found[5]["token_ids"] == continuation([5], 5, seed=3)

    def test_prompts_of_another_kind(self, tmp_path: Path) -> None:
        run(read_json(tmp_path, {"prompt": 7}, {"prompt": "4"}), tmp_path / "out")
        found = records(tmp_path / "out")
        assert found[1]["error"] == "the prompt must be text or a list of token ids, not 7."
        assert "error" not in found[2]

    def test_more_prompts_than_the_queue_takes(self, tmp_path: Path) -> None:
        prompts = read(tmp_path, "\n".join(str(3 + number % 20) for number in range(30)))
        run(prompts, tmp_path / "out", engine=make_engine(max_queue=2))
        assert len(records(tmp_path / "out")) == 30

    def test_written_as_they_end(self, tmp_path: Path) -> None:
        """While others run, the file has what has ended, whole lines only."""
        prompts = read_json(tmp_path, {"prompt": "4", "max_new_tokens": 1}, {"prompt": "5", "max_new_tokens": 20})
        engine = make_engine()
        with open_results(tmp_path / "out", prompts) as results:
            step, seen = engine.step, []

            def look() -> list:
                seen.append((tmp_path / "out").read_text())
                return step()

            engine.step = look  # type: ignore[method-assign]
            run_batch(engine, prompts, results, lambda done, tokens: None)
        assert any(text.count("\n") == 1 for text in seen)
        assert all(text.endswith("\n") for text in seen if text)


class TestResumed:
    @pytest.fixture
    def prompts(self, tmp_path: Path) -> tuple[Prompt, ...]:
        return read(tmp_path, "\n".join(map(str, range(3, 13))))

    def stop_after(self, prompts: tuple[Prompt, ...], path: Path, count: int) -> None:
        engine = make_engine()
        step, ended = engine.step, []

        def counted() -> list:
            if len(ended) >= count:
                raise StoppedError
            ended.extend(done := step())
            return done

        engine.step = counted  # type: ignore[method-assign]
        with pytest.raises(StoppedError):
            run(prompts, path, engine=engine)

    def test_finished_prompts_are_not_repeated(self, prompts: tuple[Prompt, ...], tmp_path: Path) -> None:
        run(prompts, tmp_path / "whole")
        self.stop_after(prompts, tmp_path / "out", 4)
        kept = (tmp_path / "out").read_bytes()
        assert 4 <= kept.count(b"\n") < 10
        engine = make_engine()
        run(prompts, tmp_path / "out", engine=engine)
        assert engine.metrics().new_tokens == 5 * (10 - kept.count(b"\n"))
        assert (tmp_path / "out").read_bytes().startswith(kept)
        tokens = {number: record["token_ids"] for number, record in records(tmp_path / "out").items()}
        assert tokens == {number: record["token_ids"] for number, record in records(tmp_path / "whole").items()}
        run(prompts, tmp_path / "out", engine=(idle := make_engine()))
        assert idle.metrics().new_tokens == 0

    @pytest.mark.parametrize("kept", [1, 7, 30])
    def test_a_killed_line_is_removed(self, kept: int, prompts: tuple[Prompt, ...], tmp_path: Path) -> None:
        run(prompts, tmp_path / "out")
        *lines, last = (tmp_path / "out").read_bytes().splitlines(keepends=True)
        (tmp_path / "out").write_bytes(b"".join(lines) + last[:kept])
        run(prompts, tmp_path / "out")
        assert (tmp_path / "out").read_bytes().startswith(b"".join(lines))
        assert len(records(tmp_path / "out")) == 10

    def test_a_whole_line_without_its_end_is_kept(self, prompts: tuple[Prompt, ...], tmp_path: Path) -> None:
        run(prompts, tmp_path / "out")
        data = (tmp_path / "out").read_bytes()
        (tmp_path / "out").write_bytes(data[:-1])
        run(prompts, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == data

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"id": 1, "prompt": "9", "finish_reason": "length"}\n', "the id 1 --prompts has another prompt"),
            (b'{"id": 99, "prompt": "9", "finish_reason": "length"}\n', "the id 99 --prompts has no prompt"),
            (b"my diary\n", "line 1 is no result of this command"),
            (b"my diary", "line 1 is no result of this command"),
            (b'{"id": 1}\n', "line 1 is no result of this command"),
        ],
    )
    def test_other_files_stay_as_they_are(
        self, content: bytes, message: str, prompts: tuple[Prompt, ...], tmp_path: Path
    ) -> None:
        (tmp_path / "out").write_bytes(content)
        with pytest.raises(ValueError, match=f"{message}.*Choose another|{message}.*choose another"):
            run(prompts, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == content

    def test_two_jobs_on_one_file(self, prompts: tuple[Prompt, ...], tmp_path: Path) -> None:
        with (tmp_path / "out").open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match="another process writes"):
                run(prompts, tmp_path / "out")

    def test_places_that_are_no_files(self, prompts: tuple[Prompt, ...], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not a file: results are appended"):
            run(prompts, tmp_path)
        with pytest.raises(ValueError, match="cannot be written: No such file"):
            run(prompts, tmp_path / "missing" / "out")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def test_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        now = [0.0]
        with BatchProgress(40, 10, clock=lambda: now[0]) as progress:
            for now[0], done, tokens in ((1.0, 10, 0), (2.0, 10, 5), (11.0, 20, 95), (12.0, 21, 105), (22.0, 30, 205)):
                progress(done, tokens)
        assert capsys.readouterr().err.splitlines() == [
            "grokjax: 20 of 40 done, 10.0 tokens/s, 22 s left",
            "grokjax: 30 of 40 done, 10.0 tokens/s, 11 s left",
        ]

    def test_a_bar_in_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now, terminal = [0.0], Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with BatchProgress(4, 0, clock=lambda: now[0]) as progress:
            for now[0], done, tokens in ((1.0, 0, 1), (2.0, 2, 11), (3.0, 4, 21)):
                progress(done, tokens)
        bars = terminal.getvalue().split("\r")[1:]
        assert [bar.count("#") for bar in bars] == [0, 12, 24]
        assert "2 of 4 done, 10.0 tokens/s, 2 s left" in bars[1]
        assert terminal.getvalue().endswith("\n")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("command")
    (folder / "config.json").write_text(GrokConfig.tiny().replace(num_layers=1, max_seq_len=32).to_json())
    (folder / "prompts.txt").write_text("\n".join("abcdef"))
    command = ["generate", "--random", str(folder / "config.json"), "--tokenizer", "bytes", "--slots", "2"]
    return [*command, "--max-new-tokens", "6", "--ignore-eos", "--prompts", str(folder / "prompts.txt")]


class TestCommand:
    """The real engine, a model of one layer."""

    def test_interrupted_and_resumed(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert main([*command, "--output", str(tmp_path / "whole")]) == 0
        step, calls = Engine.step, []

        def interrupted(engine: Engine) -> list:
            calls.append(engine)
            if len(calls) > 10:
                raise KeyboardInterrupt
            return step(engine)

        monkeypatch.setattr(Engine, "step", interrupted)
        command = [*command, "--output", str(tmp_path / "out")]
        assert main(command) == 130
        assert 0 < len(records(tmp_path / "out")) < 6
        monkeypatch.undo()
        capsys.readouterr()
        assert main(command) == 0
        assert f"2 of 6 results are in {tmp_path / 'out'}" in capsys.readouterr().err
        texts = {number: record["text"] for number, record in records(tmp_path / "out").items()}
        assert texts == {number: record["text"] for number, record in records(tmp_path / "whole").items()}

    def test_errors_among_the_results(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "prompts.txt").write_text("a" * 50 + "\nb\n")
        arguments = [*command[:-1], str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")]
        assert main(arguments) == 1
        assert "is complete: 2 results, 1 of them errors" in capsys.readouterr().err
        assert "error" in records(tmp_path / "out")[1]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ([], "--prompts needs --output"),
            (["--slots", "0"], "--slots 0 must be 1 or more"),
            (["--max-len", "1"], "--max-len 1 must be between 2 and max_seq_len=32"),
            (["--max-len", "33"], "--max-len 33 must be between 2 and max_seq_len=32"),
            (["--temperature", "-1"], "temperature"),
        ],
    )
    def test_refused_before_the_model_is_made(
        self, changes: list[str], message: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = ["--output", str(tmp_path / "out")] if changes else []
        assert main([*command, *changes, *output]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_output_without_prompts(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*command[:-2], "hello", "--output", "out"]) == 2
        assert "--output goes with --prompts" in capsys.readouterr().err

    def test_a_prompt_and_a_file(self, command: list[str]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "grokjax", *command, "x"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "not allowed with argument" in done.stderr
