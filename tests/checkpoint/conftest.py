"""A small release, and what a conversion makes of it; a file of tests that needs another one makes its own."""

from pathlib import Path

import pytest
from builders import TWO_LAYERS, WrittenCheckpoint, write_checkpoint

from grokjax import convert


@pytest.fixture
def part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are loaded as onto accelerators: each part is put on the devices and written into its stack there."""
    monkeypatch.setattr("grokjax.checkpoint.assembly.can_be_in_place", lambda *_: False)


@pytest.fixture(params=["in place", "part by part"])
def either_way(request: pytest.FixtureRequest) -> None:
    """Weights are loaded in both ways: as onto CPUs, and as onto accelerators."""
    if request.param == "part by part":
        request.getfixturevalue("part_by_part")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> WrittenCheckpoint:
    """Of three experts: each is a unit of ours, and Orbax takes its time for each unit."""
    config = TWO_LAYERS.replace(num_experts=3)
    return write_checkpoint(tmp_path_factory.mktemp("release"), config, scale_blocks=4)


@pytest.fixture(scope="module")
def converted(source: WrittenCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "model"
    convert(source.path, path, source.config)
    return path
