"""`grokjax score`: what is written of each text, going on with it, and the page."""

import functools
import html
import json
import re
from pathlib import Path

import pytest
from builders import TINY_DENSE
from fake_steps import FakeModel, FakeSteps

from grokjax import ByteTokenizer
from grokjax.cli import main
from grokjax.engine import Engine

TEXTS = [
    {"id": "<b>", "prompt": "<script>alert(\"é & 'so'\")</script>"},
    {"prompt": "x"},
    {"id": "none", "prompt": ""},
    {"id": "full", "prompt": "y" * 64},
]
TOKENIZER = ByteTokenizer(512)


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grokjax.cli.model.init", lambda config, **_: FakeModel(config))
    monkeypatch.setattr("grokjax.cli.batch.Engine", functools.partial(Engine, make_steps=FakeSteps))


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The command for a file of texts, the third of which is empty."""
    (tmp_path / "config.json").write_text(TINY_DENSE.replace(max_seq_len=64).to_json())
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    command = ["score", str(tmp_path / "texts.jsonl"), "--random", str(tmp_path / "config.json"), "--mesh", "1,1"]
    return [*command, "--output", str(tmp_path / "scores.jsonl")]


def read(path: Path) -> dict[str | int, dict]:
    records = list(map(json.loads, path.read_text().splitlines()))
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def test_each_token_has_its_scores(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 1
    found = read(tmp_path / "scores.jsonl")
    for text in (TEXTS[0], TEXTS[3]):
        record, ids = found[text["id"]], TOKENIZER.encode(text["prompt"])
        assert (record["prompt_ids"], record["token_ids"], record["finish_reason"]) == (ids, [], "length")
        first, *others = record["prompt_logprobs"]
        assert first == {"token_id": ids[0], "logprob": None, "rank": None, "entropy": None, "top_id": None}
        surprises = [token + position for position, token in enumerate(ids[1:])]
        assert others == [
            {"token_id": token, "logprob": -n, "rank": n, "entropy": n / 2, "top_id": token + 1}
            for token, n in zip(ids[1:], surprises, strict=True)
        ]
    assert "the prompt is empty" in found["none"]["error"]
    assert re.search(r"\d+\.\d{4} nats per token over \d+ tokens", capsys.readouterr().err)


def test_lines_of_text_are_scored_too_and_an_interrupted_job_goes_on(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\nthree")
    command = [str(tmp_path / "texts.txt") if word.endswith("texts.jsonl") else word for word in command]
    assert main(command) == 0
    output = tmp_path / "scores.jsonl"
    found = read(output)
    assert [found[number]["prompt"] for number in (1, 2, 3)] == ["one", "two", "three"]
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[1][:20])
    assert main(command) == 0
    assert output.read_bytes().startswith(lines[0])
    for number, record in read(output).items():
        assert record["prompt_logprobs"] == found[number]["prompt_logprobs"]


def test_a_page_shows_every_text_and_escapes_all_of_it(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--html", str(tmp_path / "page.html")]) == 1
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    shown = re.findall(r"<div[^>]*>(.*?)</div>", page, flags=re.DOTALL)
    texts = {html.unescape(re.sub(r"<[^>]*>", "", one)) for one in shown}
    assert texts == {text["prompt"] for text in TEXTS}
    assert page.count("<span") == sum(len(TOKENIZER.encode(text["prompt"])) for text in TEXTS)
    assert "the prompt is empty" in page
    assert main([*command, "--html", str(tmp_path / "again.html")]) == 1  # of results that are there
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("name", "message"),
    [("texts.jsonl", "would take the place"), ("scores.jsonl", "would take the place"), ("no/page", "in a folder")],
)
def test_a_page_that_cannot_be_written_is_refused_before_any_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert main([*command, "--html", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "scores.jsonl").exists()
    assert (tmp_path / "texts.jsonl").read_text()
