"""Processes that load together compare their weights first."""

import shutil
from pathlib import Path

import pytest
from builders import SMALL, write_checkpoint

from grokjax.checkpoint import CheckpointError, convert, export, likeness, open_checkpoint
from grokjax.checkpoint.likeness import check_same_weights
from grokjax.checkpoint.parameters import Part


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout and whose -> a checkpoint: one, its copy, and another that differs in a single array."""
    folder = tmp_path_factory.mktemp("alike")
    one = write_checkpoint(folder / "one")
    changed = write_checkpoint(folder / "changed", seed=1)
    shutil.copytree(one.path, folder / "copy")
    shutil.copytree(one.path, folder / "other")
    shutil.copy(changed.path / "ckpt-0" / "tensor00002_000", folder / "other" / "ckpt-0")
    found = {}
    for name in ("one", "copy", "other"):
        source = found[f"release {name}"] = folder / name
        found[f"safetensors {name}"] = folder / f"safetensors-{name}"
        found[f"orbax {name}"] = folder / f"orbax-{name}"
        export(source, found[f"safetensors {name}"], one.config, dtype="float32")
        convert(source, found[f"orbax {name}"], one.config)
    return found


@pytest.mark.parametrize("layout", ["release", "safetensors", "orbax"])
def test_another_checkpoint_of_the_same_sizes_is_refused(
    layout: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 0 has one, process 1 a copy of it or another one."""
    told: list[str] = []

    def exchange(what: str, value: str) -> list[str]:
        told.append(value)
        return [told[0], value]

    monkeypatch.setattr(likeness, "exchange", exchange)
    one, copy, other = (open_checkpoint(checkpoints[f"{layout} {name}"], SMALL) for name in ("one", "copy", "other"))
    check_same_weights(one, together=True)
    check_same_weights(copy, together=True)
    with pytest.raises(CheckpointError, match=r"other.*: process 1 has other weights there than process 0.*give every"):
        check_same_weights(other, together=True)
    check_same_weights(other, together=False)


def test_a_damaged_sample_is_a_sentence(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["orbax one"], tmp_path / "damaged")
    checkpoint = open_checkpoint(tmp_path / "damaged")
    (tmp_path / "damaged" / "weights" / "final_norm.scale" / "state" / "final_norm.scale.weight" / "c" / "0").unlink()
    with pytest.raises(CheckpointError, match=r"final_norm\.scale.* cannot be read .*restore this folder from a copy"):
        checkpoint.sample(Part("final_norm.scale"))
