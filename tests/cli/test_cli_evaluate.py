"""`grokjax eval`: the table, the file of results, and what is refused before a model is made."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from builders import TINY_DENSE

from grokjax.cli import main

QUESTIONS = [{"question": "one", "answer": " two"}, {"question": "a longer one", "answer": " three"}]
TASK = {
    "task": "repeat",
    "dataset_path": "json",
    "test_split": "train",
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command for a task of two questions."""
    (tmp_path / "config.json").write_text(TINY_DENSE.replace(max_seq_len=64).to_json())
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    data = {"dataset_kwargs": {"data_files": str(tmp_path / "questions.jsonl")}}
    (tmp_path / "repeat.yaml").write_text(json.dumps(TASK | data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    if importlib.util.find_spec("lm_eval"):  # without its own tasks, whose files take long to read
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    command = ["eval", "--tasks", "repeat", "--include-path", str(tmp_path), "--mesh", "1,1", "--dtype", "float32"]
    return [*command, "--random", str(tmp_path / "config.json")]


@pytest.mark.harness
def test_a_table_goes_to_standard_output_and_everything_to_a_file(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    assert main([*command, "--output", str(output), "--limit", "1", "--slots", "2", "--max-len", "32"]) == 0
    printed = capsys.readouterr()
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["n-samples"]["repeat"] == {"original": 2, "effective": 1}
    assert found["results"]["repeat"]["acc,none"] in (0, 1)
    assert "|repeat|" in printed.out
    assert found["config"]["model"] == "grokjax"
    assert found["config"]["model_config"]["num_layers"] == 1
    assert f"{output} has all results" in printed.err


@pytest.mark.harness
def test_a_task_that_is_not_there_is_told_before_a_model_is_made(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grokjax.cli.model.init", lambda *_, **__: pytest.fail("a model was made"))
    assert main([*command, "--tasks", "repeat,repaet"]) == 2
    assert "there is no task 'repaet': did you mean repeat?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit=0 must be an integer, 1 or more"),
        (["--num-fewshot", "-1"], "--num-fewshot=-1 must be an integer, 0 or more"),
        (["--slots", "0"], "--slots=0 must be an integer"),
        (["--output", "no/such/folder.json"], "is there already, or its folder is not: name a new file"),
        ([], "the extra `eval`: run pip install '.[eval]' in the checkout."),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    command: list[str],
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where the extra is not installed
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err


def test_results_that_are_there_are_not_overwritten(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("mine")
    assert main([*command, "--output", str(tmp_path / "results.json")]) == 2
    assert "name a new file" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "mine"
