"""The folder that a conversion writes: whose it is, what of it is there, and that nobody else writes it."""

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from grokjax.checkpoint.disk import PARTIAL, entries, files_below, lock_file, open_to_write, stamp_of
from grokjax.checkpoint.formats.manifest import MANIFEST, UNFINISHED, Manifest, read_manifest
from grokjax.checkpoint.formats.orbax_headers import finished_units
from grokjax.checkpoint.recipe import Recipe
from grokjax.checkpoint.stored import Checkpoint, CheckpointError, TensorSpec

_LOCK = "lock"
# What a run leaves that was killed before it had said what it was.
_BEFORE_MANIFEST = {_LOCK, f"{UNFINISHED}{PARTIAL}"}
# Of each file of a source so many samples are taken, evenly from its beginning to its end, each of so many bytes.
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def make_manifest(checkpoint: Checkpoint, recipe: Recipe, specs: Mapping[str, TensorSpec]) -> Manifest:
    """The manifest of the checkpoint that a conversion makes, before it has checksums."""
    origin = {
        "made_by": "convert",
        "source": str(checkpoint.path.absolute()),
        "fingerprint": _fingerprint(checkpoint.path),
        "layout": checkpoint.layout,
        **dataclasses.asdict(recipe),
    }
    return Manifest(checkpoint.config, specs, origin)


def check_source(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Refuses a source that was changed since its conversion began.

    Raises:
      CheckpointError: It was.
    """
    if _fingerprint(checkpoint.path) != manifest.origin["fingerprint"]:
        raise CheckpointError(
            f"{checkpoint.path}: its files were changed while they were converted: remove what was written, and "
            "convert again when nobody writes them."
        )


def _fingerprint(folder: Path) -> str:
    """CRC-32 of names, sizes, times and samples of the files in a folder, wherever it lies.

    Raises:
      CheckpointError: A file cannot be read.
    """
    crc = 0
    for file in [file for file in files_below(folder) if file.is_file() and file.name != MANIFEST]:
        stamp = stamp_of(file)
        described = f"{file.relative_to(folder)} {stamp.num_bytes} {stamp.written_ns}"
        crc = zlib.crc32(os.fsencode(described) + _samples(file, stamp.num_bytes), crc)
    return f"{crc:08x}"


def _samples(file: Path, num_bytes: int) -> bytes:
    last = max(num_bytes - _SAMPLE_BYTES, 0)
    offsets = sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)})
    try:
        with file.open("rb", buffering=0) as stream:
            return b"".join(stream.read(_SAMPLE_BYTES) for offset in offsets if stream.seek(offset) == offset)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}): check its permissions.") from error


def _is_same(ours: Manifest, theirs: Manifest) -> bool:
    """Whether two manifests are of the same conversion, from wherever the source lay and verified or not."""
    origins = [dict(manifest.origin) | {"source": None} for manifest in (ours, theirs)]
    return origins[0] == origins[1] and (ours.config, ours.specs) == (theirs.config, theirs.specs)


def done_units(folder: Path, manifest: Manifest) -> set[str]:
    """The units that the same conversion left in a folder, interrupted or finished.

    Raises:
      CheckpointError: The folder holds anything else.
    """
    for name in (MANIFEST, UNFINISHED):
        if (folder / name).is_file():
            if _is_same(read_manifest(folder / name), manifest):
                return finished_units(folder, manifest)
            state = "is a whole checkpoint already" if name == MANIFEST else "holds an unfinished conversion"
            raise CheckpointError(
                f"{folder}: {state}, of another source or with other options: choose another target, or remove it "
                "first."
            )
    if folder.exists() and (not folder.is_dir() or {entry.name for entry in entries(folder)} - _BEFORE_MANIFEST):
        raise CheckpointError(f"{folder}: exists and is not empty: choose another target, or remove it first.")
    return set()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process from writing the same checkpoint.

    Raises:
      CheckpointError: Another process is writing it, or the folder or its disk does not allow a lock.
    """
    try:
        lock = open_to_write(folder / _LOCK)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}): choose another target.") from error
    with lock:
        lock_file(lock, folder)
        yield
    (folder / _LOCK).unlink()
