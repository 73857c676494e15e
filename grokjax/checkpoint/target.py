"""The folder that a conversion writes: whose it is, what of it is there, and that nobody else writes it."""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from grokjax.checkpoint.disk import PARTIAL, lock_file
from grokjax.checkpoint.formats.manifest import MANIFEST, UNFINISHED, Manifest, read_manifest
from grokjax.checkpoint.formats.orbax import finished_units
from grokjax.checkpoint.recipe import Recipe
from grokjax.checkpoint.stored import Checkpoint, CheckpointError, TensorSpec

_LOCK = "lock"
# What a run leaves that was killed before it had said what it was.
_BEFORE_MANIFEST = {_LOCK, f"{UNFINISHED}{PARTIAL}"}
# Bytes of each file of a source, at its beginning and at its end, by which an interrupted conversion knows it again.
_SAMPLE_BYTES = 4096


def make_manifest(checkpoint: Checkpoint, recipe: Recipe, specs: Mapping[str, TensorSpec]) -> Manifest:
    """Of the checkpoint that a conversion makes, before it has checksums."""
    origin = {
        "made_by": "convert",
        "source": str(checkpoint.path.absolute()),
        "fingerprint": _fingerprint(checkpoint.path),
        "layout": checkpoint.layout,
        **dataclasses.asdict(recipe),
    }
    return Manifest(checkpoint.config, specs, origin)


def _fingerprint(folder: Path) -> str:
    """CRC-32 of names, sizes, beginnings and ends of the files in a folder, wherever it lies."""
    crc = 0
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST):
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            head = stream.read(_SAMPLE_BYTES)
            stream.seek(max(0, size - _SAMPLE_BYTES))
            crc = zlib.crc32(f"{file.relative_to(folder)} {size}".encode() + head + stream.read(_SAMPLE_BYTES), crc)
    return f"{crc:08x}"


def _is_same(ours: Manifest, theirs: Manifest) -> bool:
    """Whether two manifests are of the same conversion, from wherever the source lay and verified or not."""
    origins = [dict(manifest.origin) | {"source": None} for manifest in (ours, theirs)]
    return origins[0] == origins[1] and (ours.config, ours.specs) == (theirs.config, theirs.specs)


def done_units(folder: Path, manifest: Manifest) -> set[str]:
    """Units that the same conversion left, interrupted or finished; the error if the folder is anything else."""
    for name in (MANIFEST, UNFINISHED):
        if (folder / name).is_file():
            if _is_same(read_manifest(folder / name), manifest):
                return finished_units(folder, manifest)
            state = "is a whole checkpoint already" if name == MANIFEST else "holds an unfinished conversion"
            raise CheckpointError(
                f"{folder}: {state}, of another source or with other options: choose another target, or remove it "
                "first."
            )
    if folder.exists() and (not folder.is_dir() or {entry.name for entry in folder.iterdir()} - _BEFORE_MANIFEST):
        raise CheckpointError(f"{folder}: exists and is not empty: choose another target, or remove it first.")
    return set()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process from writing the same checkpoint."""
    try:
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}): choose another target.") from error
    with lock:
        lock_file(lock, folder)
        yield
    (folder / _LOCK).unlink()
