"""The commands for checkpoints, as a user types them, on a small one in the release's format."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grokjax import CheckpointError, CheckpointInfo, GrokConfig
from grokjax.cli import main
from grokjax.testing import write_release_checkpoint


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "download"
    assert main(["make-release-fixture", str(path), "--layers", "1"]) == 0
    return path


@pytest.fixture(scope="module")
def converted(download: Path) -> Path:
    path = download.parent / "converted"
    assert main(["convert", str(download), str(path), *config_of(download), "--verify"]) == 0
    return path


def config_of(download: Path) -> list[str]:
    return ["--config", str(download / "config.json")]


def test_a_fixture_is_made_once(download: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list((download / "ckpt-0").iterdir())) == 14
    assert main(["make-release-fixture", str(download)]) == 2
    assert "exists already: choose another path" in capsys.readouterr().err


def test_a_fixture_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, *_: object, **__: object) -> None:
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grokjax.cli.checkpoints.write_release_checkpoint", refuse)
    assert main(["make-release-fixture", str(tmp_path / "new")]) == 2
    assert "new cannot be written (No space left on device): choose a path" in capsys.readouterr().err
    assert main(["make-release-fixture", str(tmp_path / "new"), "--seed", "-1"]) == 2
    assert "--seed=-1 must be an integer, 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_dry_run_writes_nothing(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(download), str(tmp_path / "new"), *config_of(download), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"0 of 27 units are there; [\d.]+ [kM]B to write, [\d.]+ [GT]B free; at most [\d.]+ MiB", said)
    assert not (tmp_path / "new").exists()


def test_convert_says_how_far_it_is(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(download), str(tmp_path / "new"), *config_of(download)]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(r"grokjax: converted [\d.]+ kB of [\d.]+ kB: embedding\.table\n", output.err)
    assert f"{tmp_path / 'new'} is complete" in output.err


def test_a_configuration_may_begin_with_a_byte_order_mark(download: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((download / "config.json").read_text(), encoding="utf-8-sig")
    assert main(["info", str(download), "--config", str(tmp_path / "config.json")]) == 0


def test_a_configuration_beside_the_files_is_used_and_said(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (download, download / "ckpt-0"):
        assert main(["convert", str(source), str(tmp_path / "new"), "--dry-run"]) == 0
        assert f"the configuration is that of {download / 'config.json'}" in capsys.readouterr().err
    shutil.copytree(download / "ckpt-0", tmp_path / "alone")
    assert main(["convert", str(tmp_path / "alone"), str(tmp_path / "new")]) == 2
    assert "pass the whole configuration, config=GrokConfig(...) or --config FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--checkpoint", "nothere", "hello"],
        ["generate", "--checkpoint", "nothere", "--tokenizer", "nothere.model", "hello"],
        ["convert", "nothere", "new"],
        ["export", "nothere", "new"],
        ["info", "nothere"],
        ["verify", "nothere"],
        ["verify", "nothere", "--finite"],
    ],
    ids=" ".join,
)
def test_a_folder_that_is_not_there_is_said_to_be_not_there(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert "grokjax: error: nothere: no such folder: " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_verify_says_that_all_is_well(converted: Path, download: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(converted)]) == 0
    assert main(["verify", str(converted), "--source", str(download), *config_of(download)]) == 0
    assert main(["verify", str(converted), "--source", str(download)]) == 0
    assert "every array is as it should be" in capsys.readouterr().err


def test_info_says_the_same_of_every_layout(
    converted: Path, download: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(converted), "--mesh", "1,8", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert main(["info", str(download), *config_of(download), "--mesh", "1,8", "--json"]) == 0
    theirs = json.loads(capsys.readouterr().out)
    assert (ours["layout"], theirs["layout"]) == ("orbax", "release")
    for key in ("num_parameters", "num_bytes", "config", "parameters", "bytes_per_device"):
        assert ours[key] == theirs[key]
    for mesh in ("0,8", "1,-8", "8"):
        assert main(["info", str(converted), f"--mesh={mesh}"]) == 2
        assert f"--mesh {mesh!r}: give two numbers between 1 and 32768, such as 1,8" in capsys.readouterr().err
    assert main(["info", str(converted), "--mesh", "1,3"]) == 2
    assert "does not divide" in capsys.readouterr().err
    assert main(["info", str(converted), "--plain", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["bytes_per_device"]
    assert plain > ours["bytes_per_device"]
    assert main(["info", str(converted), "--plain"]) == 0
    text = capsys.readouterr().out
    assert f": {plain} bytes on each" in text
    assert (
        f"with every weight in bfloat16, {plain / ours['bytes_per_device']:.2f} times the {ours['bytes_per_device']} "
        in text
    )
    assert main(["info", str(converted)]) == 0
    text = capsys.readouterr().out
    assert f"on a mesh of 1 x 8 devices: {ours['bytes_per_device']} bytes on each" in text
    assert "layers.0.feed_forward.gate" in text


def test_info_counts_plain_weights_only_where_they_are_asked_for(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def count(*_: Any, quantized: bool, **__: Any) -> int:
        counted.append(quantized)
        return 1

    monkeypatch.setattr(CheckpointInfo, "bytes_per_device", count)
    assert main(["info", str(converted)]) == 0
    assert counted == [True]
    assert main(["info", str(converted), "--plain"]) == 0
    assert sorted(counted) == [False, True, True]


def test_export_makes_safetensors(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(converted), str(tmp_path / "exported")]) == 0
    assert "is complete, without a tokenizer: none is beside" in capsys.readouterr().err
    assert (tmp_path / "exported" / "model.safetensors.index.json").is_file()
    assert main(["info", str(tmp_path / "exported"), "--plain"]) == 0
    assert ", plain or not: no weight is int8\n" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "exported"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "safetensors"
    (tmp_path / "pieces").write_bytes(b"pieces")
    command = ["export", str(converted), str(tmp_path / "other"), "--names", "hpcai", "--tokenizer"]
    assert main([*command, str(tmp_path / "pieces")]) == 0
    assert f"is complete, with {tmp_path / 'pieces'}" in capsys.readouterr().err
    index = json.loads((tmp_path / "other" / "model.safetensors.index.json").read_text())
    assert "model.layers.0.attn.q_proj.weight" in index["weight_map"]
    assert (tmp_path / "other" / "tokenizer.model").read_bytes() == b"pieces"


def test_weights_that_are_not_finite_are_found_and_say_so(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `verify --finite`; and whoever generates with them is told, for one prompt as for many."""
    assert main(["verify", "--finite", str(download)]) == 0
    assert "every value is finite" in capsys.readouterr().err
    config = GrokConfig.from_json((download / "config.json").read_text())
    for value in (np.inf, np.nan):
        broken = tmp_path / str(value)
        write_release_checkpoint(broken, config, weights={"final_norm.scale": np.full(config.model_dim, value, "f4")})
        shutil.copy(download / "config.json", broken)
        assert main(["verify", "--finite", str(broken)]) == 2
        assert "final_norm.scale/weight: 64 of 64 values" in capsys.readouterr().err
    command = ["generate", "--checkpoint", str(broken), "--tokenizer", "bytes", "--mesh", "1,1", "--max-new-tokens=4"]
    assert main([*command, "hello"]) == 2
    said = capsys.readouterr()
    assert "grokjax: error: the model's logits are not finite" in said.err
    assert said.out.strip() == ""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "hello", "prompt_logprobs": True}))
    output = tmp_path / "results.jsonl"
    assert main([*command, "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(output)]) == 1
    record = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert "the model's logits are not finite" in record["error"]


def test_every_layout_generates_the_same_text(
    converted: Path, download: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokenizer", "bytes", "--max-new-tokens", "4", "--temperature", "0", "hello"]
    assert main(["generate", "--checkpoint", str(converted), *options]) == 0
    ours = capsys.readouterr().out
    assert main(["generate", "--checkpoint", str(download), *config_of(download), *options]) == 0
    assert capsys.readouterr().out == ours
    assert main(["generate", "--checkpoint", str(converted), "--plain", "--dtype", "float32", *options]) == 0


def test_generate_opens_a_checkpoint_once(
    converted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grokjax.checkpoint.loading.open_checkpoint", lambda *_: pytest.fail("it is opened again"))
    command = ["generate", "--checkpoint", str(converted), "--tokenizer", "bytes", "--max-new-tokens", "4"]
    assert main([*command, "--temperature", "0", "hello"]) == 0
    assert "4 tokens" in capsys.readouterr().err


def test_a_fixture_is_not_written_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    assert main(["make-release-fixture", str(tmp_path / "link")]) == 2
    assert f"{tmp_path / 'link'} exists already" in capsys.readouterr().err
    assert not (tmp_path / "outside").exists()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tensor00000_000").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="tensor00000_000: a link, and nothing is written"):
        write_release_checkpoint(tmp_path / "new", GrokConfig.tiny())
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_quiet_command_shows_warnings_and_errors_alone(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(download), str(tmp_path / "new"), *config_of(download), "--quiet"]
    assert main(command) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*command, "--weights", "float32"]) == 2
    assert re.match(r"grokjax: error: .* is a whole checkpoint already", capsys.readouterr().err)


def test_a_verbose_command_names_every_array(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(download), str(tmp_path / "new"), *config_of(download), "-v"]) == 0
    said = capsys.readouterr().err
    assert len(re.findall(r"grokjax: exported layers\.0\.feed_forward\.\w+\.\d, .* kB\n", said)) == 3 * 8
