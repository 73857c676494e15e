"""The commands for checkpoints, as a user types them, on a small one in the release's format."""

import json
import re
from pathlib import Path

import pytest

from grokjax.cli import main


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
    assert "--seed -1 must be 0 or more" in capsys.readouterr().err
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


def test_convert_needs_the_configuration(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(download), str(tmp_path / "new")]) == 2
    assert "pass the whole configuration, config=GrokConfig(...) or --config FILE" in capsys.readouterr().err


def test_verify_says_that_all_is_well(converted: Path, download: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(converted)]) == 0
    assert main(["verify", str(converted), "--source", str(download), *config_of(download)]) == 0
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
        assert f"--mesh {mesh}: give two numbers of 1 or more, such as 1,8" in capsys.readouterr().err
    assert main(["info", str(converted), "--mesh", "1,3"]) == 2
    assert "does not divide" in capsys.readouterr().err
    assert main(["info", str(converted)]) == 0
    text = capsys.readouterr().out
    assert f"on a mesh of 1 x 8 devices: {ours['bytes_per_device']} bytes on each" in text
    assert "layers.0.feed_forward.gate" in text


def test_export_makes_safetensors(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(converted), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model.safetensors.index.json").is_file()
    assert main(["info", str(tmp_path / "exported"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "safetensors"


def test_every_layout_generates_the_same_text(
    converted: Path, download: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokenizer", "bytes", "--max-new-tokens", "4", "--temperature", "0", "hello"]
    assert main(["generate", "--checkpoint", str(converted), *options]) == 0
    ours = capsys.readouterr().out
    assert main(["generate", "--checkpoint", str(download), *config_of(download), *options]) == 0
    assert capsys.readouterr().out == ours


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
