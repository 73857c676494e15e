"""`--stream`: the commands say of a model whose layers stay in its files what they say of a loaded one."""

import json
from pathlib import Path

import numpy as np
import pytest
from builders import SMALL, write_checkpoint

from grokjax.cli import main

CONFIG = SMALL.replace(vocab_size=264, num_layers=3, max_seq_len=64)
TEXTS = [
    {"id": "long", "prompt": "once upon a time"},
    {"id": "empty", "prompt": ""},
    {"id": "short", "prompt": "xy", "logprobs": 2},
    {"id": "many", "prompt": "xy", "logprobs": 9},
    {"id": "twice", "prompt": "once once"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name a model of three layers."""
    folder = tmp_path_factory.mktemp("release")
    write_checkpoint(folder, CONFIG)
    (folder / "config.json").write_text(CONFIG.to_json())
    options = ["--checkpoint", str(folder), "--config", str(folder / "config.json"), "--tokenizer", "bytes"]
    return [*options, "--mesh", "1,1", "--dtype", "float32", "--no-compilation-cache"]


def results_of(path: Path) -> dict[str, dict]:
    records = {record.pop("id"): record for record in map(json.loads, path.read_text().splitlines())}
    for record in records.values():
        del record["timings"]
    return records


def test_scores_are_those_of_a_loaded_model(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, loaded, streamed = (tmp_path / name for name in ("texts.jsonl", "loaded.jsonl", "streamed.jsonl"))
    texts.write_text("\n".join(map(json.dumps, TEXTS)))
    assert main(["score", str(texts), *model, "--output", str(loaded)]) == 1
    capsys.readouterr()
    assert main(["score", str(texts), *model, "--output", str(streamed), "--stream", "--slots", "2"]) == 1
    said = capsys.readouterr().err
    assert said.count("grokjax: streamed 0 Bytes of ") == 2  # passes, of two texts each
    found, expected = results_of(streamed), results_of(loaded)
    assert found.keys() == expected.keys()
    for name in ("empty", "many"):
        assert "error" in found[name]
        assert found[name] == expected[name]
    for name in ("long", "short", "twice"):
        scored = zip(*(made[name].pop("prompt_logprobs") for made in (found, expected)), strict=True)
        for ours, theirs in scored:
            assert [one["token_id"] for one in ours.get("top", ())] == [
                one["token_id"] for one in theirs.get("top", ())
            ]
            assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
        assert found[name] == expected[name]


def test_scores_that_are_no_numbers_are_the_error_of_their_text(tmp_path: Path) -> None:
    weights = {"final_norm.scale": np.full(CONFIG.model_dim, np.nan, "f4")}
    write_checkpoint(tmp_path, CONFIG, weights=weights)
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    (tmp_path / "texts.txt").write_text("once\n")
    command = ["score", str(tmp_path / "texts.txt"), "--checkpoint", str(tmp_path), "--tokenizer", "bytes", "--stream"]
    assert main([*command, "--mesh", "1,1", "--output", str(tmp_path / "scores.jsonl"), "--no-compilation-cache"]) == 1
    record = json.loads((tmp_path / "scores.jsonl").read_text(), parse_constant=pytest.fail)
    assert "the model's logits are not finite" in record["error"]


@pytest.mark.thorough
def test_a_prompt_is_continued_as_by_a_loaded_model(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "once upon", *model, "--max-new-tokens", "4", "--max-len", "32"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    assert main([*command, "--stream", "--host-memory", "1MiB"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-memory", "20GiB"], "--device-memory goes with --stream: without it all weights are loaded."),
        (["--stream", "--plain"], "--plain goes without --stream: weights that stream stay as they are in the files."),
        (
            ["--stream", "--host-memory", "much"],
            "--host-memory 'much': give bytes as a number and a unit, such as 20GiB",
        ),
        (["--stream", "--device-memory", "1kB"], "is too little: the embedding table and two layers at a time take"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    model: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "once", *model, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_cpu_is_one_device_unless_it_is_told_to_be_several(model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int | None] = []
    monkeypatch.setattr("grokjax.cli.model.use_every_core", told.append)
    for options in ([], ["--cpu-devices", "2"]):
        assert main(["generate", "once", *model, "--stream", "--device-memory", "1kB", *options]) == 2
    assert told == [2]


def test_random_weights_do_not_stream(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "once", "--random", "tiny", "--stream"]) == 2
    assert "--stream goes with --checkpoint: random weights are in no file." in capsys.readouterr().err
