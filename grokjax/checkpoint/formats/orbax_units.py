"""The units of our own checkpoints: each is an Orbax checkpoint of its own, written whole or not at all.

Inside a unit each array is named by its full path (`layers.3.feed_forward.gate.5` / `weight`, `scales`), so that a
folder in another's place is noticed; arrays are stored uncompressed (int8 weights do not compress) in chunks that the
usual meshes read without reading more than they need.

Orbax takes long to import, so each function that needs it does so: whoever reads no such checkpoint need not wait.
"""

import contextlib
import logging
import math
import re
import shutil
import signal
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from humanize import naturalsize

from grokjax.checkpoint.disk import check_no_link, entries, free_bytes
from grokjax.checkpoint.formats.manifest import MANIFEST, UNFINISHED, Manifest, read_manifest
from grokjax.checkpoint.formats.orbax_headers import WEIGHTS, check_unit, finished_units, unit_path
from grokjax.checkpoint.stored import CheckpointError
from grokjax.errors import first_line

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp

_CHUNK_BYTES = 16 << 20
# Large enough to cut the table between rows only: such chunks are written without a copy.
_TABLE_CHUNK_BYTES = 128 << 20
_READ_BYTES = 1 << 30
# A save and a load in two threads of one process mix up each other's temporary folders (orbax-checkpoint 0.12.8).
_ORBAX = threading.Lock()
_NEEDLESS_LOGS = re.compile(
    "Skipping merge of OCDBT"  # warned of at every save without that format
    "|TensorStore data files not found"  # and at every load
    "|_SignalingThread.run.. raised an exception"  # which we raise as one sentence
)


def write_unit(folder: Path, name: str, arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes one unit whole or not at all: part name -> `weight`, `scales` -> NumPy or JAX array.

    All processes that work together call it; each writes its own shards, and the first the NumPy arrays.

    Raises:
      CheckpointError: The disk is full, or the folder cannot be written.
    """
    from orbax.checkpoint import v1 as ocp

    path = unit_path(folder, name)
    try:
        with _ORBAX, _uninterrupted(), _context():
            ocp.save(path, {part: dict(leaves) for part, leaves in arrays.items()})
    except Exception as error:  # Orbax passes on whatever its libraries raise
        raise CheckpointError(
            f"{path}: cannot be written ({reason(error)}), {naturalsize(free_bytes(folder))} are free: "
            f"make room or check the permissions, then {how_to_go_on(folder)}."
        ) from error


def read_unit(
    folder: Path,
    manifest: Manifest,
    name: str,
    wanted: Mapping[str, Mapping[str, Any]],
    max_bytes: int = _READ_BYTES,
) -> dict[str, dict[str, Any]]:
    """Reads arrays of one unit, part name -> `weight`, `scales` -> as what to read it.

    That is a NumPy array of the shape and dtype, or a `jax.ShapeDtypeStruct` with a sharding. At most `max_bytes` are
    in flight on the host, or the largest single array if that is more.

    Raises:
      CheckpointError: The unit is missing, damaged, or holds something else.
    """
    from orbax.checkpoint import v1 as ocp

    check_unit(folder, manifest, name)
    path = unit_path(folder, name)
    # All that is in the unit must be named, so that one in another's place is an error.
    tree = {
        part.name: dict.fromkeys(manifest.specs[part.parameter].leaves(), ocp.PLACEHOLDER)
        | dict(wanted.get(part.name, {}))
        for part in manifest.units[name].parts
    }
    largest = max((math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted)), default=0)
    try:
        # Orbax wants more than the largest.
        with _ORBAX, _uninterrupted(), _context(wanted, max(max_bytes, largest + 1)):
            found: dict[str, dict[str, Any]] = ocp.load(path, tree)
            return found
    except Exception as error:  # Orbax itself raises bare Exceptions for damaged files
        raise CheckpointError(
            f"{path}: cannot be read ({reason(error)}): restore this folder from a copy or convert again."
        ) from error


def prepare_units(folder: Path, manifest: Manifest) -> None:
    """Makes room for the units: removes what an interrupted write left of others than the finished ones.

    Raises:
      CheckpointError: The folder cannot be written, or is a link.
    """
    weights = folder / WEIGHTS
    check_no_link(weights)
    try:
        weights.mkdir(exist_ok=True)
        finished = finished_units(folder, manifest)
        for entry in entries(weights):
            if entry.name not in finished:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{weights}: cannot be written ({error.strerror}): make room or check the permissions, then "
            f"{how_to_go_on(folder)}."
        ) from error


def commit(folder: Path, manifest: Manifest) -> None:
    """Makes a folder with all its units a checkpoint.

    As after a copy, the kernel writes the bytes back when it likes; if it never does, `open_orbax` misses them.

    Raises:
      CheckpointError: A unit is not where it was written, or the folder cannot be written.
    """
    lost = sorted(manifest.units.keys() - finished_units(folder, manifest))
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} of its {len(manifest.units)} parts, such as {WEIGHTS}/{lost[0]}, were written and "
            f"have vanished, or lost bytes: check the disk and who else writes there, then {how_to_go_on(folder)}."
        )
    try:
        (folder / UNFINISHED).replace(folder / MANIFEST)
    except OSError as error:
        raise CheckpointError(
            f"{folder / UNFINISHED}: cannot be renamed to {MANIFEST} ({error.strerror}): every array is written; check "
            "the permissions, then rename it."
        ) from error


def how_to_go_on(folder: Path) -> str:
    """What to do with a checkpoint whose writing was interrupted, for a sentence."""
    if read_manifest(folder / UNFINISHED).origin.get("made_by") == "save":
        return "remove the folder and save the model again"
    return "run the same conversion again; it goes on where it stopped"


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C off to the end: Orbax's threads would wait five minutes for signals of an interrupted call."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[types.FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(signal.SIGINT, came[0])


def _is_wanted(record: logging.LogRecord) -> bool:
    return not _NEEDLESS_LOGS.search(record.getMessage())


def _context(wanted: Any = (), read_bytes: int | None = None) -> "ocp.Context":
    """Options for a save, in which all processes take part, or a load: this one alone, unless arrays span them."""
    from orbax.checkpoint import v1 as ocp

    logging.getLogger("absl").addFilter(_is_wanted)
    context = ocp.Context()
    # Else, where a folder cannot be made, threads that wait for it would keep the process for five minutes.
    context.asynchronous.create_directories_asynchronously = False
    leaves = [leaf for leaf in jax.tree.leaves(wanted) if isinstance(leaf, jax.ShapeDtypeStruct)]
    if wanted and all(leaf.sharding is None or leaf.sharding.is_fully_addressable for leaf in leaves):
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    saving = context.array.saving
    saving.use_compression = False
    # Plain files: twice as fast as the default database, and the same bytes at each run.
    saving.use_ocdbt = False
    saving.enable_write_sharding_file = False
    saving.array_metadata_store = None
    saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    saving.scoped_storage_options_creator = _table_options
    context.memory.deepcopy_host_arrays = False
    context.memory.read_concurrent_bytes = read_bytes
    return context


def _table_options(path: tuple[Any, ...], _: Any) -> Any:
    """Options of the embedding table; None, the general ones, for other arrays."""
    from orbax.checkpoint import v1 as ocp

    options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=_TABLE_CHUNK_BYTES)
    return options if "embedding.table" in jax.tree_util.keystr(path) else None


def reason(error: Exception) -> str:
    """What a library says, without the whole specification of an array that it adds."""
    return re.split(r" \[tensorstore_spec|\. See full TensorStore details", first_line(error))[0]
