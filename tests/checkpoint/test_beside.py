"""What lies beside the files of a checkpoint is found: the tokenizer, and the configuration where they hold none."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from builders import SMALL, WrittenCheckpoint

from grokjax import CheckpointError, describe
from grokjax.checkpoint import find_config, find_tokenizer


@pytest.fixture
def copied(source: WrittenCheckpoint, tmp_path: Path) -> Path:
    """The release's files, in `ckpt-0` of the folder."""
    shutil.copytree(source.path / "ckpt-0", tmp_path / "ckpt-0")
    return tmp_path


def test_a_tokenizer_is_found_in_the_folder_first(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path / "model") is None
    (tmp_path / "model").mkdir()
    for folder in (tmp_path, tmp_path / "model"):
        (folder / "tokenizer.model").touch()
        assert find_tokenizer(tmp_path / "model") == folder / "tokenizer.model"


RELEASE_NAMES = {
    "lm": {
        "vocab_size": 64,
        "pad_token": 0,
        "eos_token": 2,
        "sequence_len": 32,
        "embedding_multiplier_scale": SMALL.embedding_multiplier,
        "output_multiplier_scale": SMALL.output_multiplier,
    },
    "model": {
        "emb_size": 32,
        "widening_factor": 2,
        "key_size": 8,
        "num_q_heads": 8,
        "num_kv_heads": 4,
        "num_layers": 2,
        "num_experts": 3,
        "num_selected_experts": 2,
        "attn_output_multiplier": SMALL.attention_multiplier,
    },
}


@pytest.mark.parametrize("place", ["ckpt-0", "."])
@pytest.mark.parametrize("path", ["ckpt-0", "."])
def test_a_release_is_opened_with_the_configuration_beside_it(
    source: WrittenCheckpoint, copied: Path, place: str, path: str
) -> None:
    (copied / place / "config.json").write_text(source.config.to_json())
    assert find_config(copied / path) == copied / place / "config.json"
    assert describe(copied / path).config == source.config


def test_it_may_have_the_release_s_names(source: WrittenCheckpoint, copied: Path) -> None:
    (copied / "config.json").write_text(json.dumps(RELEASE_NAMES))
    assert describe(copied).config == source.config


def test_only_around_a_folder_of_the_release_s_name(copied: Path) -> None:
    """Any other folder around the files may hold any other `config.json`."""
    (copied / "config.json").write_text("{}")
    (copied / "ckpt-0").rename(copied / "files")
    assert find_config(copied / "files") is None
    with pytest.raises(CheckpointError, match="pass the whole configuration"):
        describe(copied / "files")


def test_one_that_does_not_fit_is_named(source: WrittenCheckpoint, copied: Path) -> None:
    (copied / "config.json").write_text(source.config.replace(ffn_dim=40).to_json())
    with pytest.raises(CheckpointError) as caught:
        describe(copied)
    assert "the files do not fit the configuration" in str(caught.value)
    assert f"The configuration was that of {copied / 'config.json'}: correct it, or pass another." in str(caught.value)
    assert describe(copied, source.config).config == source.config


def test_it_is_not_blamed_for_a_file_that_was_cut_short(source: WrittenCheckpoint, copied: Path) -> None:
    """Its name, what it has and what it should have; and that no configuration would help."""
    (copied / "config.json").write_text(source.config.to_json())
    cut = copied / "ckpt-0" / "tensor00003_000"
    size = cut.stat().st_size
    os.truncate(cut, size - 100)
    with pytest.raises(CheckpointError) as caught:
        describe(copied)
    head, line, advice = str(caught.value).splitlines()
    assert head == f"{cut.parent}: files are damaged, 1 problem:"
    assert re.match(rf"  {cut}: found a truncated file of {size - 100} bytes at byte \d+; by what it says itself", line)
    expected = int(re.search(r"it has (\d+) bytes or more: download the file again", line)[1])
    assert size - 100 < expected <= size
    assert advice == "Download these files again."


@pytest.mark.parametrize("text", ["[]", "{}", '{"model_dim": 32}'])
def test_one_that_is_none_is_named(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        describe(copied)


def test_ours_need_none(converted: Path) -> None:
    assert find_config(converted) is None
    assert find_config(converted / "nothing") is None
