"""What lies in a checkpoint of ours is looked at before the storage library sees it: files of systems, hostile ones."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore
from builders import DENSE, WrittenCheckpoint, write_checkpoint

from grokjax import CheckpointError, convert, describe, load, load_parameters, make_mesh, verify
from grokjax.checkpoint import open_checkpoint
from grokjax.checkpoint.formats import orbax_headers
from grokjax.checkpoint.stored import ArraySpec

LEFT_BEHIND = (".DS_Store", "._layers.0", ".nfs00000001", ".snapshot/layers.0", "@eaDir/thumbnail")
TABLE = Path("weights/embedding.table/state/embedding.table.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> WrittenCheckpoint:
    """Of few files."""
    return write_checkpoint(tmp_path_factory.mktemp("release"), DENSE, scale_blocks=8)


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def leave_behind(folder: Path) -> None:
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("left by a system")


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def header_with(*changes: tuple[str, Any]) -> Callable[[Any], Any]:
    """Changes a header: the path of a field in it, with dots, and its new value."""

    def change(header: Any) -> Any:
        for place, value in changes:
            *outer, last = place.split(".")
            holder = header
            for name in outer:
                holder = holder[int(name) if name.isdigit() else name]
            holder[last] = value
        return header

    return change


def test_what_systems_leave_is_passed_over(copied: Path, source: WrittenCheckpoint, tmp_path: Path) -> None:
    table = copied / TABLE
    for folder in (copied, copied / "weights", table.parents[1], table.parent, table, table / "c", table / "c" / "0"):
        leave_behind(folder)
    found = load_parameters(copied, [r"embedding\.table"], dtype="float32")["embedding.table"]
    np.testing.assert_array_equal(found, source.tensors["embedding.table"].weight)
    convert(source.path, copied, source.config)  # all is there already
    leave_behind(tmp_path / "new")
    convert(copied, tmp_path / "new")
    verify(tmp_path / "new", copied)


def test_a_model_is_read_past_the_storage_library(
    converted: Path, source: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which reads whole chunks, and copies what is wanted of them."""
    one_device = make_mesh((1, 1))
    expected = load(source.path, source.config, one_device)
    monkeypatch.setattr(tensorstore, "open", None)
    found = load(converted, mesh=one_device)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize("chunk", [[4, 8], [4, 3]])
@pytest.mark.parametrize("block_bytes", [None, 24])
def test_many_chunks_are_read_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type, chunk: list[int], block_bytes: int | None
) -> None:
    if block_bytes is not None:  # one row, or some, but not all of a chunk
        monkeypatch.setattr(orbax_headers, "BLOCK_BYTES", block_bytes)
    values = np.arange(1, 81).reshape(10, 8).astype(dtype)
    spec = ArraySpec(values.shape, values.dtype)
    metadata = orbax_headers.expected_header(spec, chunk)
    place = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path)}}
    tensorstore.open(place | {"metadata": metadata}, create=True).result().write(values).result()
    rows = [(), (slice(0, 10),), (slice(3, 9), slice(0, 8)), (slice(4, 8),), (9,), (slice(5, 5),)]
    for index in [*rows, (slice(0, 10), slice(2, 7)), (slice(5, 7), slice(3, 6)), (7, slice(1, 4)), (3, 5)]:
        out = np.zeros_like(values[index])
        assert orbax_headers.read_chunks(tmp_path, spec, index, out)
        np.testing.assert_array_equal(out, values[index])
    # What is not as we write it is the library's: a chunk that has become longer, shorter, or is not there.
    file = tmp_path / "c" / "1" / "0"
    whole = file.read_bytes()
    for changed in (whole + b"x", whole[:-1], whole[1:], b""):
        file.write_bytes(changed)
        assert not orbax_headers.read_chunks(tmp_path, spec, (slice(3, 5),), np.zeros((2, 8), dtype))
    file.unlink()
    assert not orbax_headers.read_chunks(tmp_path, spec, (slice(3, 5),), np.zeros((2, 8), dtype))
    strided = np.zeros((2, 16), dtype)[:, ::2]
    assert not orbax_headers.read_chunks(tmp_path, spec, (slice(0, 2),), strided)


HUGE = 1 << 40


@pytest.mark.parametrize(
    "change",
    [
        header_with(("shape", [HUGE, HUGE])),
        header_with(("shape", [64.0, 32])),
        header_with(("chunk_grid.configuration.chunk_shape", [HUGE, 1])),
        header_with(("chunk_grid.configuration.chunk_shape", [0, 32])),
        header_with(("codecs.0.configuration.chunk_shape", [HUGE, HUGE])),
        header_with(("codecs.0.configuration.codecs", [{"name": "bytes"}, {"name": "gzip"}])),
        header_with(("data_type", "float64")),
        header_with(("chunk_key_encoding", {"name": "v2"})),
        lambda header: [header],
        lambda header: {},
    ],
    ids=["shape", "float", "chunk", "empty", "inner", "codec", "dtype", "names", "list", "nothing"],
)
class TestHostileHeaders:
    def test_are_refused_when_the_checkpoint_is_opened(self, copied: Path, change: Callable[[Any], Any]) -> None:
        rewrite(copied / TABLE / "zarr.json", change)
        with pytest.raises(
            CheckpointError, match=r"zarr.json does not describe the float32 \[64, 32\] of the manifest"
        ):
            verify(copied, copied)

    def test_are_refused_when_they_come_later(self, copied: Path, change: Callable[[Any], Any]) -> None:
        """Whole arrays are read in one way, rows of them in another."""
        table = open_checkpoint(copied).tensors["embedding.table"].weight
        rewrite(copied / TABLE / "zarr.json", change)
        for index in ((), (slice(0, 2),)):
            with pytest.raises(CheckpointError, match=r"zarr.json does not describe the float32 \[64, 32\]"):
                table.read(index)


def test_a_unit_is_looked_at_once_however_many_devices_read_of_it(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    check_unit = orbax_headers.check_unit

    def count(folder: Path, manifest: Any, name: str) -> None:
        looked.append(name)
        check_unit(folder, manifest, name)

    monkeypatch.setattr(orbax_headers, "check_unit", count)
    load(converted, mesh=make_mesh((2, 4)))
    assert sorted(looked) == sorted(entry.name for entry in (converted / "weights").iterdir())


def test_arrays_in_another_kind_of_file_are_refused(copied: Path) -> None:
    rewrite(copied / TABLE.parent / "_METADATA", lambda document: document | {"use_ocdbt": True})
    with pytest.raises(CheckpointError, match="_METADATA does not say that the arrays are stored as we store them"):
        describe(copied)


METADATA = ("grokjax.json", TABLE / "zarr.json", TABLE.parent / "_METADATA", TABLE.parents[1] / "_CHECKPOINT_METADATA")


@pytest.mark.parametrize("name", METADATA, ids=lambda path: Path(path).name)
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_only_files_are_read(copied: Path, tmp_path: Path, name: str | Path, kind: str) -> None:
    """A pipe would be waited for, and what a link leads to be shown."""
    (tmp_path / "secret").write_text("secret words")
    (copied / name).unlink()
    if kind == "pipe":
        os.mkfifo(copied / name)
    else:
        (copied / name).symlink_to(tmp_path / "secret")
    with pytest.raises(
        CheckpointError, match=rf"{Path(name).name}(: a link, a pipe or a folder| is a link or no file)"
    ) as caught:
        describe(copied)
    assert "secret words" not in str(caught.value)


@pytest.mark.parametrize("count", [10**6, 10**9])
def test_a_manifest_of_a_million_experts_is_refused_at_once(copied: Path, count: int) -> None:
    def many(manifest: Any) -> Any:
        manifest["config"]["num_experts"] = count
        for name, leaves in manifest["tensors"].items():
            if ".feed_forward." in name:
                for leaf in leaves.values():
                    leaf["shape"] = [count, *leaf["shape"]]
        return manifest

    rewrite(copied / "grokjax.json", many)
    with pytest.raises(CheckpointError, match=rf"num_experts={count} is too large for the 6 folders in weights: use"):
        describe(copied)


def test_a_configuration_of_a_thousand_million_layers_is_refused_at_once(copied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"num_layers=1000000000 is too large for the \d+ parameters in it: use"):
        load(copied, DENSE.replace(num_layers=10**9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (header_with(("format_version", 1.0)), r"written in format version 1\.0, this grokjax reads 1"),
        (header_with(("format_version", True)), "written in format version True, this grokjax reads 1"),
        (
            lambda manifest: (
                header_with(("shape", [64.0, 32]))(manifest["tensors"]["embedding.table"]["weight"]) and manifest
            ),
            r"damaged \(the shape \[64\.0, 32\] has other sizes than integers of 1 or more\): restore it",
        ),
        (
            lambda manifest: manifest | {"config": manifest["config"] | {"ffn_dim": 10**400}},
            r"ffn_dim=10000.*0000 must be an integer",
        ),
        (
            lambda manifest: manifest | {"config": manifest["config"] | {"norm_eps": 10**400}},
            r"norm_eps=10000.*must be a finite number",
        ),
    ],
)
def test_numbers_of_another_kind_are_refused(copied: Path, change: Callable[[Any], Any], message: str) -> None:
    rewrite(copied / "grokjax.json", change)
    with pytest.raises(CheckpointError, match=message):
        describe(copied)


def test_a_manifest_with_a_byte_order_mark_is_read(copied: Path) -> None:
    text = (copied / "grokjax.json").read_text()
    (copied / "grokjax.json").write_text(text, encoding="utf-8-sig")
    assert describe(copied).config == DENSE
