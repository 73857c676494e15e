"""A file of prompts: what is read, what is written and when, and how an interrupted job goes on."""

import dataclasses
import errno
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from fake_steps import EOS, VOCAB, FakeModel, FakeSteps, continuation

from grokjax.checkpoint import lock_file
from grokjax.cli.batch import run_batch
from grokjax.cli.prompts import Prompt, read_prompts
from grokjax.cli.results import Results, open_results
from grokjax.engine import Engine
from grokjax.request import Request

DEFAULT = Request([], max_new_tokens=5, temperature=0.5, seed=3, ignore_eos=True)


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
    return read_prompts(path, DEFAULT)


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
    def test_each_line_of_text_is_a_prompt(self, tmp_path: Path) -> None:
        first, second = read(tmp_path, "\ufeff4 5\r\n\n  \n 6\u2028 7")
        assert (first.id, first.line) == (1, 1)
        assert dataclasses.asdict(first.request) == dataclasses.asdict(dataclasses.replace(DEFAULT, prompt="4 5"))
        assert (second.id, second.request.prompt) == (4, " 6\u2028 7")

    def test_each_line_of_json_is_a_request(self, tmp_path: Path) -> None:
        lines = (
            {"prompt": "4", "id": "a", "seed": 9, "stop": ["x"], "logit_bias": {"5": -1.0}, "n": 2},
            {"prompt": [4, 5]},
        )
        first, second = read_json(tmp_path, *lines)
        assert first.request.stop == ("x",)
        assert (first.id, first.request.seed, first.request.n) == ("a", 9, 2)
        assert first.request.logit_bias == {5: -1.0}
        assert first.request.temperature == DEFAULT.temperature
        assert (second.id, list(second.request.prompt)) == (2, [4, 5])

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("[1]", 'line 1 is not a JSON object: write {"prompt": "..."}'),
            ("{", "line 1 is not a JSON object"),
            ('{"prompt": [NaN]}', "line 1 is not a JSON object: write"),
            ('{"prompt": [1e400]}', "all of it in one line, its numbers finite."),
            ('{"prompt": "4", "id": "\\ud800"}', r"id='\ud800' must be a text in UTF-8 or an integer"),
            ("{}", "line 1 has no prompt"),
            ('{"prompt": "4", "id": true}', "id=True must be a text in UTF-8 or an integer"),
            ('{"prompt": "4", "tone": 1}', "tone is no field of a request; these are: id, prompt"),
            ('{"prompt": "4", "ignore_eos": 1}', "ignore_eos=1 must be true or false"),
            ('{"prompt": "4", "logit_bias": {"a": 1}}', 'keys of logit_bias must be token ids, such as "42"'),
            ('{"prompt": "4", "logit_bias": [[5, 1]]}', "logit_bias=[[5, 1]] must be an object such as"),
            ('{"prompt": "4", "stop": null}', "stop=None must be a text or a list of texts"),
            ('{"prompt": "4", "stop_ids": 5}', "stop_ids=5 must be a list of token ids"),
            ('{"prompt": "4", "stop_ids": ["a"]}', "stop_ids=['a'] must be a list of token ids"),
            (
                '{"prompt": "4", "allowed_tokens": "ab"}',
                "allowed_tokens='ab' must be a list with true or false for each",
            ),
            ('{"prompt": "4"}\n{"prompt": "4", "top_p": 2}', "line 2: top_p=2 must be a number, from 0 to 1"),
            ('{"prompt": "4", "temperature": 1' + "0" * 400 + "}", "line 1: temperature=1000"),
            ('{"prompt": "4", "id": "b"}\n{"prompt": "5", "id": "b"}', "lines 1 and 2 have the id 'b'"),
            ('{"prompt": "4", "id": 2}\n{"prompt": "5"}', "lines 1 and 2 have the id 2: give each its own"),
            ("\n \n", "has no prompts: give it at least one line"),
        ],
    )
    def test_bad_lines_are_named(self, line: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            read(tmp_path, line, "prompts.jsonl")

    def test_all_bad_lines_are_named_at_once(self, tmp_path: Path) -> None:
        lines = ["{", '{"prompt": "4"}', *['{"prompt": "4", "n": 0}'] * 10]
        with pytest.raises(ValueError, match=r"line 1 is not a JSON object.*\n(.*line \d+: n=0.*\n){9}\.\.\. and 1 l"):
            read(tmp_path, "\n".join(lines), "prompts.jsonl")

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    @pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
    def test_a_file_in_utf_16_is_refused_whole(self, encoding: str, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"{name} is UTF-16 or no text: give it in UTF-8, as `iconv"):
            read(tmp_path, '{"prompt": "4"}\n{"prompt": "5"}'.encode(encoding), name)

    def test_utf_16_is_known_by_its_mark_too(self, tmp_path: Path) -> None:
        """Without zero bytes, as in one line of Chinese."""
        with pytest.raises(ValueError, match="is UTF-16 or no text"):
            read(tmp_path, "\u4f60\u597d".encode("utf-16"))

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"missing cannot be read: No such file"):
            read_prompts(tmp_path / "missing", DEFAULT)


class TestResults:
    def test_every_prompt_gets_its_result(self, tmp_path: Path) -> None:
        prompts = read_json(tmp_path, {"prompt": "4 5", "logprobs": 1}, {"prompt": [6], "n": 2, "id": "two"})
        run(prompts, tmp_path / "out")
        found = records(tmp_path / "out")
        tokens = continuation([4, 5], 5, seed=3)
        assert found[1]["prompt"] == "4 5"
        assert (found[1]["token_ids"], found[1]["finish_reason"]) == (tokens, "length")
        assert found[1]["prompt"] + found[1]["text"] == Numbers().decode([4, 5, *tokens])
        assert found[1]["timings"].keys() >= {"queue", "prefill", "first_token", "decode"}
        assert [sample["token_ids"] for sample in found["two"]["samples"]] == [
            continuation([6], 5, seed=3),
            continuation([6], 5, seed=4),
        ]

    def test_scores_of_prompt_and_text_have_one_form(self, tmp_path: Path) -> None:
        asked = {"prompt": "4 5", "logprobs": 2, "prompt_logprobs": True}
        run(read_json(tmp_path, asked, {**asked, "n": 2}), tmp_path / "out")
        one, two = records(tmp_path / "out").values()
        assert one["prompt_ids"] == two["prompt_ids"] == [4, 5]
        first = {"token_id": 4, "logprob": None, "rank": None, "entropy": None, "top_id": None}
        best = [{"token_id": 6, "logprob": -0.75}, {"token_id": 7, "logprob": -0.875}]
        assert one["prompt_logprobs"] == [
            first,
            {"token_id": 5, "logprob": -5.0, "rank": 5, "entropy": 2.5, "top_id": 6, "top": best},
        ]
        assert two["prompt_logprobs"] == one["prompt_logprobs"]
        for sample in (one, *two["samples"]):
            for token, scored in zip(sample["token_ids"], sample["logprobs"], strict=True):
                top = [{"token_id": other, "logprob": -other / 8} for other in (token, (token + 1) % VOCAB)]
                assert scored == {"token_id": token, "logprob": -token / 8, "top": top}

    def test_prompts_are_there_without_scores(self, tmp_path: Path) -> None:
        run(read_json(tmp_path, {"prompt": "4 5"}, {"prompt": "x"}), tmp_path / "out")
        found = records(tmp_path / "out")
        assert (found[1]["prompt_ids"], found[2]["prompt_ids"]) == ([4, 5], [])
        assert not {"logprobs", "prompt_logprobs"} & found[1].keys()

    def test_every_reader_of_json_takes_the_results(self, tmp_path: Path) -> None:
        """Half a character is no JSON, nor is minus infinity, with which a request ends in an error."""

        class Certain(FakeSteps):
            def draw_rows(self, settings, ends, number):
                pending = super().draw_rows(settings, ends, number)
                pending.drawn.top_logprobs[:, -1] = -math.inf
                return pending

        engine = Engine(FakeModel(), Numbers(), slots=2, max_len=32, make_steps=Certain)
        prompts = read(tmp_path, b'{"prompt": "4", "logprobs": 8}\n{"prompt": ["\xff", "\\ud800"]}', "prompts.jsonl")
        run(prompts, tmp_path / "out", engine=engine)
        assert not re.search(r": -?(Infinity|NaN)", (tmp_path / "out").read_text())
        found = records(tmp_path / "out")
        json.dumps(found, ensure_ascii=False).encode()  # raises where there is half a character
        assert "the model's logits are not finite" in found[1]["error"]
        assert found[2]["prompt"] == ["\ufffd", "\ufffd"]

    def test_users_and_deadlines_are_fields_of_a_line(self, tmp_path: Path) -> None:
        crowd = [{"prompt": [4, 5 + i % 9], "id": f"ann {i}", "user": "ann", "max_new_tokens": 20} for i in range(20)]
        late = {"prompt": "8", "id": "late", "user": "bob", "deadline": 1e-9}
        prompts = read_json(tmp_path, *crowd, {"prompt": "6", "id": "mine", "user": "bob"}, late)
        run(prompts, tmp_path / "out")
        found = records(tmp_path / "out")
        assert (found["late"]["finish_reason"], found["late"]["token_ids"]) == ("deadline", [])
        assert "error" not in found["late"]
        assert list(found).index("mine") < 3
        assert found["mine"]["token_ids"] == continuation([6], 5, seed=3)

    def test_a_bad_prompt_ends_alone(self, tmp_path: Path) -> None:
        lines = [b"4", b"x", b"\xff", b" ".join([b"4"] * 40), b"5"]
        run(read(tmp_path, b"\n".join(lines)), tmp_path / "out")
        found = records(tmp_path / "out")
        assert [number for number in found if "error" in found[number]] == [2, 3, 4]
        assert "invalid literal" in found[2]["error"]
        assert found[4]["finish_reason"] == "error"
        assert found[5]["token_ids"] == continuation([5], 5, seed=3)

    def test_prompts_of_another_kind_are_errors_of_their_own(self, tmp_path: Path) -> None:
        run(read_json(tmp_path, {"prompt": 7}, {"prompt": "4"}, {"prompt": None}, {"prompt": {}}), tmp_path / "out")
        found = records(tmp_path / "out")
        assert "error" not in found.pop(2)
        for number, given in ((1, "7"), (3, "None"), (4, "{}")):
            assert found[number]["error"] == f"the prompt must be text or a list of token ids, not {given}."

    def test_one_bad_sample_marks_the_line(self, tmp_path: Path) -> None:
        run(read_json(tmp_path, {"prompt": "x", "n": 2}), tmp_path / "out")
        [record] = records(tmp_path / "out").values()
        assert [sample["finish_reason"] for sample in record["samples"]] == ["error", "error"]
        assert record["error"] == record["samples"][0]["error"]

    def test_prompts_that_are_no_text_are_known_again(self, tmp_path: Path) -> None:
        prompts = read(tmp_path, b'{"prompt": 1.0}\n{"prompt": "\\ud800"}\n{"prompt": "\xff"}', "prompts.jsonl")
        run(prompts, tmp_path / "out")
        found = (tmp_path / "out").read_bytes()
        run(prompts, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == found
        assert all("error" in record for record in records(tmp_path / "out").values())

    def test_more_prompts_than_the_queue_takes_are_all_answered(self, tmp_path: Path) -> None:
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


class FullDisk(io.FileIO):
    """Takes 1000 bytes."""

    def write(self, data: Any) -> int:
        room = 1000 - self.tell()
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data[:room])


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

    @pytest.mark.parametrize("count", [3, 10])
    def test_a_whole_line_without_its_end_is_kept(
        self, count: int, prompts: tuple[Prompt, ...], tmp_path: Path
    ) -> None:
        run(prompts, tmp_path / "out")
        kept = b"".join((tmp_path / "out").read_bytes().splitlines(keepends=True)[:count])
        (tmp_path / "out").write_bytes(kept[:-1])
        run(prompts, tmp_path / "out")
        assert (tmp_path / "out").read_bytes().startswith(kept)
        assert len(records(tmp_path / "out")) == 10

    def test_a_full_disk_is_gone_on_from(self, prompts: tuple[Prompt, ...], tmp_path: Path) -> None:
        with (
            FullDisk(tmp_path / "out", "a") as file,
            pytest.raises(ValueError, match="cannot be written: No space left"),
        ):
            run_batch(make_engine(), prompts, Results(file, {}), lambda done, tokens: None)
        assert len((tmp_path / "out").read_bytes()) == 1000
        run(prompts, tmp_path / "out")
        assert len(records(tmp_path / "out")) == 10

    @pytest.mark.parametrize("change", ["removed", "moved", "replaced"])
    def test_an_output_that_is_taken_away_ends_the_job(
        self, prompts: tuple[Prompt, ...], tmp_path: Path, change: str
    ) -> None:
        out = tmp_path / "out"

        def take_away(done: int, tokens: int) -> None:
            if (tmp_path / "moved").exists() or not out.exists():
                return
            if change == "removed":
                out.unlink()
            else:
                out.rename(tmp_path / "moved")
            if change == "replaced":
                out.write_text("")

        with pytest.raises(ValueError, match="out was removed, moved or replaced while its job ran: put it back"):
            run(prompts, out, take_away)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"id": 1, "prompt": "9", "finish_reason": "length"}\n', "the id 1 the file has another prompt"),
            (b'{"id": 99, "prompt": "9", "finish_reason": "length"}\n', "the id 99 the file has no prompt"),
            (b"my diary\n", "line 1 is no result of this command"),
            (b"my diary", "line 1 is no result of this command"),
            (b'{"id": 1}\n', "line 1 is no result of this command"),
            (b'my diary\n{"id": 1, "pro', "line 1 is no result of this command"),
        ],
    )
    def test_other_files_stay_as_they_are(
        self, content: bytes, message: str, prompts: tuple[Prompt, ...], tmp_path: Path
    ) -> None:
        (tmp_path / "out").write_bytes(content)
        with pytest.raises(ValueError, match=f"{message}.*Choose another|{message}.*choose another"):
            run(prompts, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == content

    def test_a_second_job_on_one_file_is_refused(self, prompts: tuple[Prompt, ...], tmp_path: Path) -> None:
        with (tmp_path / "out").open("ab") as other:
            lock_file(other, tmp_path / "out")
            with pytest.raises(
                ValueError, match=r"out: another process is writing it: wait .*, or choose another path"
            ):
                run(prompts, tmp_path / "out")
        run(prompts, tmp_path / "out")

    def test_places_that_are_no_files_are_refused(self, prompts: tuple[Prompt, ...], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not a file: results are appended"):
            run(prompts, tmp_path)
        with pytest.raises(ValueError, match="cannot be written: No such file"):
            run(prompts, tmp_path / "missing" / "out")
