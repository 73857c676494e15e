"""A small release, and what a conversion makes of it; a file of tests that needs another one makes its own."""

from pathlib import Path

import pytest
from builders import TWO_LAYERS, WrittenCheckpoint, write_checkpoint

from grokjax import convert


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> WrittenCheckpoint:
    return write_checkpoint(tmp_path_factory.mktemp("release"), TWO_LAYERS, scale_blocks=4)


@pytest.fixture(scope="module")
def converted(source: WrittenCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "model"
    convert(source.path, path, source.config)
    return path
