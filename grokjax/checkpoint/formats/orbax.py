"""Our own checkpoints on disk: `grokjax.json` beside `weights/`, which holds one Orbax checkpoint for each unit.

A unit (`parameters.Unit`) is one expert's matrix of one layer, the rest of a layer, or a parameter outside the layers.
Orbax commits each by a rename, so a unit is there or it is not, and writing needs the memory of one matrix. The whole
is committed by another rename: while it is written, the manifest is called `unfinished.json`.

Inside a unit each array is named by its full path (`layers.3.feed_forward.gate.5` / `weight`, `scales`), so that a
folder in another's place is noticed; arrays are stored uncompressed (int8 weights do not compress) in chunks that the
usual meshes read without reading more than they need.
"""

import contextlib
import dataclasses
import logging
import math
import re
import shutil
import signal
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from humanize import naturalsize
from orbax.checkpoint import v1 as ocp

from grokjax.checkpoint.disk import free_bytes
from grokjax.checkpoint.formats.manifest import MANIFEST, UNFINISHED, Manifest, read_manifest
from grokjax.checkpoint.parameters import Part, parameter_shapes, parts_of
from grokjax.checkpoint.stored import Array, CheckpointError, Index, StoredTensor, list_problems, mismatches
from grokjax.config import GrokConfig
from grokjax.errors import first_line

_WEIGHTS = "weights"
_CHUNK_BYTES = 16 << 20
# Large enough to cut the table between rows only: such chunks are written without a copy.
_TABLE_CHUNK_BYTES = 128 << 20
_CHUNK_INDEX_BYTES = 20
_READ_BYTES = 1 << 30
# A save and a load in two threads of one process mix up each other's temporary folders (orbax-checkpoint 0.12.8).
_ORBAX = threading.Lock()
_NEEDLESS_LOGS = re.compile(
    "Skipping merge of OCDBT"  # warned of at every save without that format
    "|TensorStore data files not found"  # and at every load
    "|_SignalingThread.run.. raised an exception"  # which we raise as one sentence
)


@dataclasses.dataclass(frozen=True)
class OrbaxArray:
    """One array of a checkpoint; an expert axis is put together from the experts' units."""

    folder: Path
    manifest: Manifest
    parameter: str
    leaf: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.manifest.specs[self.parameter].leaves()[self.leaf].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """int8, float32 or bfloat16."""
        return self.manifest.specs[self.parameter].leaves()[self.leaf].dtype

    def read(self, index: Index = ()) -> Array:
        """A region of the array; whole parts are read where it spans several."""
        parts = parts_of(self.parameter, self.manifest.config)
        if parts[0].expert is None:
            return self._read_rows(parts[0], index) if index else self._read_part(parts[0])
        if index and isinstance(index[0], int):
            part = parts[index[0]]
            return self._read_rows(part, index[1:]) if index[1:] else self._read_part(part)
        chosen = parts[index[0]] if index else parts
        assert isinstance(chosen, tuple)
        return np.stack([self._read_part(part)[index[1:]] for part in chosen])

    def _read_rows(self, part: Part, index: Index) -> Array:
        """A region of a part, by Orbax's own storage library: Orbax itself reads whole arrays."""
        array = unit_path(self.folder, part.unit) / "state" / f"{part.name}.{self.leaf}"
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}
        try:
            stored = tensorstore.open(spec, open=True, read=True).result()
            taken = [
                slice(*entry.indices(size)[:2]) if isinstance(entry, slice) else entry
                for entry, size in zip(index, stored.shape, strict=False)
            ]
            rows: Array = stored[tuple(taken)].read().result()
        except ValueError as error:
            raise CheckpointError(
                f"{array}: cannot be read ({_reason(error)}): restore this folder from a copy or convert again."
            ) from error
        return rows

    def _read_part(self, part: Part) -> Array:
        spec = self.manifest.specs[self.parameter].part(part).leaves()[self.leaf]
        # A view of one element tells shape and dtype without memory for all of them.
        wanted = {part.name: {self.leaf: np.broadcast_to(np.zeros((), spec.dtype), spec.shape)}}
        array: Array = read_unit(self.folder, self.manifest, part.unit, wanted)[part.name][self.leaf]
        return array


@dataclasses.dataclass(frozen=True)
class OrbaxTensor:
    """One parameter of a checkpoint."""

    weight: OrbaxArray
    scales: OrbaxArray | None


@dataclasses.dataclass(frozen=True)
class OrbaxCheckpoint:
    """A whole checkpoint of ours.

    Attributes:
      path: its folder.
      manifest: what `grokjax.json` says.
      config: the manifest's.
      tensors: our parameter path -> its arrays.
      layout: `orbax`.
    """

    path: Path
    manifest: Manifest
    config: GrokConfig
    tensors: Mapping[str, OrbaxTensor]
    layout: str = "orbax"


def find_orbax(path: str | Path) -> Path | None:
    """`path` if it is a checkpoint of ours, whole or unfinished, else None."""
    folder = Path(path)
    return folder if any((folder / name).is_file() for name in (MANIFEST, UNFINISHED)) else None


def open_orbax(path: str | Path) -> OrbaxCheckpoint:
    """Opens the folder that holds `grokjax.json` and checks that all units are there; no array is read.

    Raises:
      CheckpointError: It is unfinished, of a newer format, or damaged.
    """
    folder = Path(path).absolute()
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder / MANIFEST}: the writing of this checkpoint was interrupted: {_how_to_go_on(folder)}."
        )
    manifest = read_manifest(folder / MANIFEST)
    tensors = {parameter: _tensor(folder, manifest, parameter) for parameter in manifest.specs}
    problems = _shape_problems(tensors, manifest.config) or _unit_problems(folder, manifest)
    if problems:
        advice = (
            "Pass no configuration, or the one of grokjax.json; restore damaged folders from a copy or convert again."
        )
        raise CheckpointError(list_problems(folder, problems, advice))
    return OrbaxCheckpoint(folder, manifest, manifest.config, types.MappingProxyType(tensors))


def write_unit(folder: Path, name: str, arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes one unit whole or not at all: part name -> `weight`, `scales` -> NumPy or JAX array.

    All processes that work together call it; each writes its own shards, and the first the NumPy arrays.

    Raises:
      CheckpointError: The disk is full, or the folder cannot be written.
    """
    path = unit_path(folder, name)
    try:
        with _ORBAX, _uninterrupted(), _context():
            ocp.save(path, {part: dict(leaves) for part, leaves in arrays.items()})
    except Exception as error:  # Orbax passes on whatever its libraries raise
        raise CheckpointError(
            f"{path}: cannot be written ({_reason(error)}), {naturalsize(free_bytes(folder))} are free: "
            f"make room or check the permissions, then {_how_to_go_on(folder)}."
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
    path = unit_path(folder, name)
    # All that is in the unit must be named, so that one in another's place is an error.
    tree = {
        part.name: dict.fromkeys(manifest.specs[part.parameter].leaves(), ocp.PLACEHOLDER)
        | dict(wanted.get(part.name, {}))
        for part in manifest.units[name].parts
    }
    largest = max((math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted)), default=0)
    try:
        with (
            _ORBAX,
            _uninterrupted(),
            _context(wanted, max(max_bytes, largest + 1)),
        ):  # Orbax wants more than the largest
            found: dict[str, dict[str, Any]] = ocp.load(path, tree)
            return found
    except Exception as error:  # Orbax itself raises bare Exceptions for damaged files
        raise CheckpointError(
            f"{path}: cannot be read ({_reason(error)}): restore this folder from a copy or convert again."
        ) from error


def unit_path(folder: Path, name: str) -> Path:
    """The folder of one unit."""
    return folder / _WEIGHTS / name


def finished_units(folder: Path, manifest: Manifest) -> set[str]:
    """Names of the units that are there with all their bytes: after a power cut, files may have lost theirs."""
    weights = folder / _WEIGHTS
    there = {entry.name for entry in weights.iterdir()} if weights.is_dir() else set()
    return {name for name in manifest.units if name in there and _missing_bytes(folder, manifest, name) == 0}


def prepare_units(folder: Path, manifest: Manifest) -> None:
    """Makes room for the units: removes what an interrupted write left of others than the finished ones.

    Raises:
      CheckpointError: The folder cannot be written.
    """
    weights = folder / _WEIGHTS
    try:
        weights.mkdir(exist_ok=True)
        finished = finished_units(folder, manifest)
        for entry in weights.iterdir():
            if entry.name not in finished:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{weights}: cannot be written ({error.strerror}): make room or check the permissions, then "
            f"{_how_to_go_on(folder)}."
        ) from error


def commit(folder: Path) -> None:
    """Makes a folder with all its units a checkpoint.

    As after a copy, the kernel writes the bytes back when it likes; if it never does, `open_orbax` misses them.

    Raises:
      CheckpointError: The folder cannot be written.
    """
    try:
        (folder / UNFINISHED).replace(folder / MANIFEST)
    except OSError as error:
        raise CheckpointError(
            f"{folder / UNFINISHED}: cannot be renamed to {MANIFEST} ({error.strerror}): every array is written; check "
            "the permissions, then rename it."
        ) from error


def _how_to_go_on(folder: Path) -> str:
    if read_manifest(folder / UNFINISHED).origin.get("made_by") == "save":
        return "remove the folder and save the model again"
    return "run the same conversion again; it goes on where it stopped"


def _tensor(folder: Path, manifest: Manifest, parameter: str) -> OrbaxTensor:
    leaves = manifest.specs[parameter].leaves()
    weight, scales = (OrbaxArray(folder, manifest, parameter, leaf) for leaf in ("weight", "scales"))
    return OrbaxTensor(weight, scales if "scales" in leaves else None)


def _shape_problems(tensors: Mapping[str, StoredTensor], config: GrokConfig) -> list[str]:
    shapes = parameter_shapes(config)
    problems = [f"{parameter}: missing" for parameter in shapes if parameter not in tensors]
    problems += [f"{parameter}: surplus" for parameter in tensors if parameter not in shapes]
    for parameter in [parameter for parameter in shapes if parameter in tensors]:
        problems += [f"{parameter}: {text}" for text in mismatches(tensors[parameter], parameter, shapes[parameter])]
    return problems


def _unit_problems(folder: Path, manifest: Manifest) -> list[str]:
    units = manifest.units
    there = {entry.name for entry in (folder / _WEIGHTS).iterdir()} if (folder / _WEIGHTS).is_dir() else set()
    problems = [f"{_WEIGHTS}/{name}: missing" for name in units if name not in there]
    problems += [f"{_WEIGHTS}/{name}: surplus" for name in sorted(there - set(units))]
    for name in [name for name in units if name in there]:
        missing = _missing_bytes(folder, manifest, name)
        if missing:
            problems.append(f"{_WEIGHTS}/{name}: {missing} bytes of its arrays are missing")
    return problems


def _missing_bytes(folder: Path, manifest: Manifest, name: str) -> int:
    """Of the arrays of a unit; a file that describes them and is empty counts as all of them."""
    state = unit_path(folder, name) / "state"
    missing = 0
    for part in manifest.units[name].parts:
        for leaf, spec in manifest.specs[part.parameter].part(part).leaves().items():
            array = state / f"{part.name}.{leaf}"
            needed = math.prod(spec.shape) * spec.dtype.itemsize
            # Zarr keeps the chunks of an array in a folder `c`, all of one size, each with an index behind its values.
            sizes = [file.stat().st_size for file in (array / "c").rglob("*") if file.is_file()]
            expected = max(needed + _CHUNK_INDEX_BYTES * len(sizes), max(sizes, default=0) * len(sizes))
            is_described = _has_text(array / "zarr.json") and _has_text(state / "_METADATA")
            missing += expected - sum(sizes) if is_described else needed
    return missing


def _has_text(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


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


def _context(wanted: Any = (), read_bytes: int | None = None) -> ocp.Context:
    """Options for a save, in which all processes take part, or a load: this one alone, unless arrays span them."""
    logging.getLogger("absl").addFilter(_is_wanted)
    context = ocp.Context()
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
    options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=_TABLE_CHUNK_BYTES)
    return options if "embedding.table" in jax.tree_util.keystr(path) else None


def _reason(error: Exception) -> str:
    """What a library says, without the whole specification of an array that it adds."""
    return re.split(r" \[tensorstore_spec|\. See full TensorStore details", first_line(error))[0]
