"""`grokjax generate --prompts` as a command: statuses, messages, Ctrl-C, and the progress that it shows."""

import contextlib
import functools
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from builders import TINY_DENSE
from fake_steps import FakeModel, FakeSteps, continuation
from rich.console import Console

from grokjax import ByteTokenizer, GrokConfig
from grokjax.cli import console, main
from grokjax.cli.console import BatchProgress
from grokjax.engine import Engine


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokens(path: Path) -> dict[int, list[int]]:
    """The tokens of each prompt, which has one result."""
    lines = read_lines(path)
    found = {line["id"]: line["token_ids"] for line in lines}
    assert len(found) == len(lines)
    return found


def show_in_terminal(monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """What a terminal of 80 characters gets of a job of four prompts, and of a message meanwhile."""
    now, terminal = [0.0], io.StringIO()
    monkeypatch.setattr(
        console, "STDERR", Console(file=terminal, force_terminal=True, width=80, highlight=False, **options)
    )
    with console.messages(), BatchProgress(4, clock=lambda: now[0]) as progress:
        for now[0], done, tokens in ((1.0, 0, 1), (2.0, 1, 11), (3.0, 2, 21)):
            progress(done, tokens)
        console.say("a message")
    return terminal.getvalue()


class TestProgress:
    def test_a_line_every_ten_seconds_says_how_long_it_takes(self, capsys: pytest.CaptureFixture[str]) -> None:
        now = [0.0]
        with console.messages(), BatchProgress(40, clock=lambda: now[0]) as progress:
            for now[0], done, tokens in ((1.0, 10, 0), (2.0, 10, 5), (11.0, 20, 95), (12.0, 21, 105), (21.0, 30, 195)):
                progress(done, tokens)
            progress(40, 200)
        assert capsys.readouterr().err.splitlines() == [
            "grokjax: compiling the first steps 10/40",
            "grokjax: generating 20/40 10.0 tokens/s",
            "grokjax: generating 30/40 10.0 tokens/s 0:00:10 left",
            "grokjax: generating 40/40 10.3 tokens/s 0:00:00 left",
        ]

    def test_the_time_left_is_told_by_the_results_of_this_run_once_its_steps_are_compiled(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        now = [0.0]
        with console.messages(), BatchProgress(100, clock=lambda: now[0]) as progress:
            for now[0], done, tokens in ((1.0, 50, 0), (500.0, 50, 1), (501.0, 52, 20), (511.0, 62, 120)):
                progress(done, tokens)
        assert [line.partition("tokens/s ")[2] for line in capsys.readouterr().err.splitlines()] == [
            "",
            "",
            "0:00:38 left",
        ]

    def test_a_terminal_is_shown_a_bar_and_messages_above_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = show_in_terminal(monkeypatch, color_system=None)
        assert "grokjax: a message\n" in shown
        *_, bar = shown.removesuffix("\n\x1b[?25h").split("\r\x1b[2K")
        assert bar == f"generating {'━' * 6}       2/4 10.0 tokens/s 0:00:02 left"

    def test_colours_are_left_out_where_they_are_not_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        colour = "\x1b[3"
        assert colour in show_in_terminal(monkeypatch, color_system="standard")
        monkeypatch.setenv("NO_COLOR", "1")
        assert colour not in show_in_terminal(monkeypatch, color_system="standard")

    def test_a_dumb_terminal_gets_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "dumb")
        shown = show_in_terminal(monkeypatch)
        assert shown == "grokjax: generating 0/4\ngrokjax: a message\n"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Six prompts, without a place for their results."""
    (tmp_path / "config.json").write_text(TINY_DENSE.replace(max_seq_len=32).to_json())
    (tmp_path / "prompts.txt").write_text("\n".join("abcdef"))
    command = ["generate", "--random", str(tmp_path / "config.json"), "--slots", "2", "--max-new-tokens", "6"]
    command += ["--ignore-eos", "--mesh", "1,1", "--dtype", "float32"]
    return [*command, "--prompts", str(tmp_path / "prompts.txt")]


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grokjax.cli.model.init", lambda config, **_: FakeModel(config))
    monkeypatch.setattr("grokjax.cli.batch.Engine", functools.partial(Engine, make_steps=FakeSteps))


def unexpected(*_: object) -> None:
    """The handler of a signal that a command should have its own for."""
    raise AssertionError("the signal is not handled")


@pytest.fixture
def interrupted_at_two(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An output at whose second result the process gets a signal, once: that of Ctrl-C, or the parameter."""
    number = getattr(request, "param", signal.SIGINT)
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, unexpected),
    }
    output, step, sent = tmp_path / "out.jsonl", Engine.step, []

    def interrupted(engine: Engine) -> list:
        if not sent and output.exists() and output.read_bytes().count(b"\n") >= 2:
            sent.append(True)
            signal.raise_signal(number)
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    yield output
    assert signal.getsignal(signal.SIGTERM) is unexpected, "the command left its handler behind"
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


class TestCommand:
    def test_an_interrupted_job_is_resumed(
        self, command: list[str], interrupted_at_two: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With a real model: the results are those of a run that was left alone."""
        output = interrupted_at_two
        assert main([*command, "--output", str(output)]) == 130
        assert "grokjax: interrupted" in capsys.readouterr().err
        kept = output.read_bytes()
        assert 2 <= kept.count(b"\n") < 6
        assert main([*command, "--output", str(output)]) == 0
        said = capsys.readouterr().err
        assert f"{kept.count(chr(10).encode())} of 6 results are in {output}" in said
        assert f"{output} is complete: 6 results\n" in said
        assert output.read_bytes().startswith(kept)
        whole = output.with_name("whole.jsonl")
        assert main([*command, "--output", str(whole)]) == 0
        assert tokens(output) == tokens(whole)

    @pytest.mark.usefixtures("fake_model")
    @pytest.mark.parametrize("interrupted_at_two", [signal.SIGINT, signal.SIGTERM], indirect=True)
    def test_a_signal_ends_a_job_in_a_sentence_and_keeps_its_results(
        self, command: list[str], interrupted_at_two: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = interrupted_at_two
        assert main([*command, "--output", str(output)]) == 130
        kept = output.read_bytes()
        said = capsys.readouterr().err.splitlines()[-1]
        count = kept.count(b"\n")
        assert said == (
            f"grokjax: interrupted: {count} of 6 results are in {output}, and the same command goes on after them."
        )
        assert 2 <= count < 6
        assert main([*command, "--output", str(output)]) == 0
        assert output.read_bytes().startswith(kept)
        assert len(tokens(output)) == 6

    @pytest.mark.usefixtures("fake_model")
    @pytest.mark.parametrize("lost", [(), KeyboardInterrupt], ids=["raised", "lost as in a callback"])
    @pytest.mark.parametrize("interrupted_at_two", [signal.SIGTERM], indirect=True)
    def test_a_signal_while_the_model_is_made_tells_of_earlier_results(
        self,
        lost: Any,
        command: list[str],
        interrupted_at_two: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def interrupted(config: GrokConfig, **_: Any) -> FakeModel:
            with contextlib.suppress(lost):
                signal.raise_signal(signal.SIGTERM)
            return FakeModel(config)

        monkeypatch.setattr("grokjax.cli.model.init", interrupted)
        assert main([*command, "--output", str(interrupted_at_two)]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"grokjax: interrupted: 0 of 6 results are in {interrupted_at_two}, and the same command goes on after "
            "them."
        )

    @pytest.mark.usefixtures("fake_model")
    def test_errors_among_the_results_are_counted(
        self, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "prompts.txt").write_bytes(b"a" * 50 + b"\nb\n\xff")
        command += ["--output", str(tmp_path / "out")]
        assert main(command) == 1
        assert "is complete: 3 results, 2 of them errors" in capsys.readouterr().err
        long, _, broken = sorted(read_lines(tmp_path / "out"), key=lambda record: record["id"])
        assert "the prompt has 50 tokens and at most 31" in long["error"]
        assert broken["error"] == "the prompt has bytes that are not UTF-8: convert the file, or the line, to UTF-8."
        assert len(tokens(tmp_path / "out")[2]) == 6
        monkeypatch.setattr("grokjax.cli.model.init", lambda *_, **__: pytest.fail("the model was made"))
        assert main(command) == 1

    @pytest.mark.usefixtures("fake_model")
    def test_settings_reach_the_engine(self, command: list[str], tmp_path: Path) -> None:
        sizes = ["--max-len", "5", "--add-bos", "--seed", "4"]
        assert main([*command, *sizes, "--output", str(tmp_path / "out")]) == 0
        bos, a = ByteTokenizer(512).bos_id, ByteTokenizer(512).encode("a")
        assert tokens(tmp_path / "out")[1] == continuation([bos, *a], 3, seed=4)

    @pytest.mark.usefixtures("fake_model")
    def test_guesses_reach_the_engine_and_a_line_may_ask_for_fewer(
        self, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where steps may guess, none is left that does not."""
        assert main([*command, "--output", str(tmp_path / "plain")]) == 0
        monkeypatch.setattr(FakeSteps, "decode", lambda *_: pytest.fail("a step did not guess"))
        (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{a}", "guesses": 1}}\n' for a in "abcdef"))
        for name in ("prompts.txt", "prompts.jsonl"):
            prompts, output = str(tmp_path / name), tmp_path / f"{name}-out"
            assert main([*command, "--prompts", prompts, "--guesses", "3", "--output", str(output)]) == 0
            assert tokens(output) == tokens(tmp_path / "plain")

    @pytest.mark.usefixtures("fake_model")
    def test_stop_strings_reach_the_engine(self, command: list[str], tmp_path: Path) -> None:
        assert main([*command, "--output", str(tmp_path / "whole")]) == 0
        text = {line["id"]: line["text"] for line in read_lines(tmp_path / "whole")}[1]
        stop = text[2:4]
        stops = ["--stop", "never there", f"--stop={stop}"]
        assert main([*command, *stops, "--output", str(tmp_path / "out")]) == 0
        first = {line["id"]: line for line in read_lines(tmp_path / "out")}[1]
        assert (first["text"], first["finish_reason"]) == (text[: text.find(stop)], "stop")

    @pytest.mark.usefixtures("fake_model")
    def test_a_model_that_fails_is_a_sentence(
        self, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: object) -> None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nDetails")

        monkeypatch.setattr(FakeSteps, "decode", fail)
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "the model failed: RESOURCE_EXHAUSTED: Out of memory. The results so far are kept" in error
        assert "fewer --slots or a smaller --max-len" in error
        assert (tmp_path / "out").read_text() == ""

    @pytest.mark.usefixtures("fake_model")
    def test_a_model_that_fails_to_follow_is_a_sentence(
        self, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """On a process after the first, which has no prompts."""

        def fail(*_: object) -> None:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: closed.\nDetails")

        monkeypatch.setattr("grokjax.cli.batch.on_first", lambda *_: None)
        monkeypatch.setattr("grokjax.cli.batch.follow", fail)
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        assert "the model failed: UNAVAILABLE: closed. The results so far are kept" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ([], "--prompts needs --output: name the file"),
            (["--slots", "0"], "--slots=0 must be an integer between 1 and 4194304"),
            (["--slots", "1" + "0" * 400], "0000 must be an integer between 1 and 4194304"),
            (["--max-len", "1"], "--max-len 1 must be between 2 and max_seq_len=32"),
            (["--max-len", "33"], "--max-len 33 must be between 2 and max_seq_len=32"),
            (["--guesses", "32"], "--guesses=32 must be an integer between 0 and 31"),
            (["--guesses", "5", "--max-len", "5"], "--guesses=5 must be an integer between 0 and 4"),
            (["--temperature", "-1"], "temperature"),
            (["--prompts", "missing.txt"], "missing.txt cannot be read: No such file"),
        ],
    )
    def test_refused_before_the_model_is_made(
        self, changes: list[str], message: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = ["--output", str(tmp_path / "out")] if changes else []
        assert main([*command, *changes, *output]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.usefixtures("fake_model")
    @pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
    def test_no_result_goes_through_a_link(
        self,
        link: Callable[[Path, Path], None],
        command: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "precious").touch()
        link(tmp_path / "precious", tmp_path / "out")
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        assert re.search(r"/out: (a link, and nothing|not a file with this name alone)", capsys.readouterr().err)
        assert (tmp_path / "precious").read_bytes() == b""

    @pytest.mark.parametrize(("option", "value"), [("--output", "out"), ("--slots", "8")])
    def test_what_only_a_file_of_prompts_has_is_refused_for_one(
        self, option: str, value: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Before the model is looked for."""
        assert main(["generate", "--checkpoint", "nowhere", "hello", option, value]) == 2
        assert f"{option} goes with --prompts" in capsys.readouterr().err

    def test_a_prompt_and_a_file_are_refused(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main([*command, "hello"])
        assert "not allowed with argument" in capsys.readouterr().err
