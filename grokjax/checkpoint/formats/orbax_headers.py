"""What lies in the units of our own checkpoints, looked at without the storage library.

What the files say of themselves is compared with the manifest, and their sizes are counted, before that library sees
them: a header that asks for more memory than there is would end the process. Whole rows are also read without it.
"""

import json
import math
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grokjax.checkpoint.disk import entries, files_below, is_regular, read_bytes, read_json
from grokjax.checkpoint.formats.manifest import Manifest
from grokjax.checkpoint.stored import Array, ArraySpec, CheckpointError, Index

WEIGHTS = "weights"
_METADATA, _HEADER = "_METADATA", "zarr.json"
_CHUNK_INDEX_BYTES = 20
_LITTLE_ENDIAN = {"endian": "little"}
_ADVICE = "restore it from a copy or convert again"


def unit_path(folder: Path, name: str) -> Path:
    """The folder of one unit."""
    return folder / WEIGHTS / name


def unit_names(folder: Path) -> set[str]:
    """Names of the units that are there, whole or not, and of all else that somebody has put beside them."""
    return {entry.name for entry in entries(folder / WEIGHTS)} if (folder / WEIGHTS).is_dir() else set()


def finished_units(folder: Path, manifest: Manifest) -> set[str]:
    """Names of the units that are there with all their bytes: after a power cut, files may have lost theirs."""
    there = unit_names(folder)
    return {name for name in manifest.units if name in there and unit_fault(folder, manifest, name) is None}


class Units:
    """The units of an open checkpoint, each of which is looked at when its first array is read, and not again.

    Args:
      folder: of the checkpoint.
      manifest: what it should hold.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """The folder of a unit, which the storage library may see. Threads may ask at once.

        Raises:
          CheckpointError: It is not what the manifest says.
        """
        with self._lock:
            if name not in self._checked:
                check_unit(self.folder, self.manifest, name)
                self._checked.add(name)
        return unit_path(self.folder, name)


def check_unit(folder: Path, manifest: Manifest, name: str) -> None:
    """Refuses a unit that the storage library must not see.

    Raises:
      CheckpointError: It is not what the manifest says.
    """
    fault = unit_fault(folder, manifest, name)
    if fault is not None:
        raise CheckpointError(f"{unit_path(folder, name)}: {fault}: restore this folder from a copy or convert again.")


def unit_fault(folder: Path, manifest: Manifest, name: str) -> str | None:
    """What of a unit is not as the manifest says, for a sentence; None if it is whole."""
    unit = unit_path(folder, name)
    if not unit.is_dir():
        return "missing"
    strange = [file for file in files_below(unit) if not is_regular(file)]
    if strange:
        return f"{strange[0].relative_to(unit)} is a link or no file"
    specs = {
        f"{part.name}.{leaf}": spec
        for part in manifest.units[name].parts
        for leaf, spec in manifest.specs[part.parameter].part(part).leaves().items()
    }
    try:
        missing = _missing_bytes(unit / "state", specs)
    except CheckpointError as error:
        return str(error)
    return f"{missing} bytes of its arrays are missing" if missing else None


def read_rows(array: Path, spec: ArraySpec, index: Index, out: Array) -> bool:
    """Reads whole rows of an array straight into `out`; the storage library reads whole chunks, and copies them.

    Args:
      array: its folder, in a unit that was looked at.
      spec: what the manifest says of it.
      index: of the rows.
      out: of their shape, in C order.

    Returns:
      Whether it was so: not where parts of rows are asked for, or the files are otherwise than we write them. Then the
      storage library reads them, or says what is wrong.
    """
    chunk = _chunk_shape(array / _HEADER, spec)
    places: list[int | slice] = [*index, *[slice(None)] * (len(spec.shape) - len(index))]
    first, *others = places
    rows = range(spec.shape[0])[first if isinstance(first, slice) else slice(first, first + 1)]
    has_whole_rows = all(
        isinstance(entry, slice) and range(size)[entry] == range(size) == range(step)
        for entry, size, step in zip(others, spec.shape[1:], chunk[1:], strict=True)
    )
    if not (has_whole_rows and rows.step == 1 and out.flags.c_contiguous):
        return False
    into, row_bytes = out.reshape(-1).view(np.uint8).data, _num_bytes(spec.shape[1:], spec)
    for number in range(rows.start // chunk[0], -(-rows.stop // chunk[0])):
        begin, end = (min(max(row, rows.start), rows.stop) for row in (number * chunk[0], (number + 1) * chunk[0]))
        target = into[(begin - rows.start) * row_bytes : (end - rows.start) * row_bytes]
        file = (array / "c").joinpath(str(number), *["0"] * len(others))
        if not _read_chunk(file, chunk[0] * row_bytes, (begin - number * chunk[0]) * row_bytes, target):
            return False
    return True


def _read_chunk(file: Path, num_bytes: int, start: int, into: memoryview) -> bool:
    """Reads some of a chunk, if its values are the beginning of the file, as the index behind them says."""
    try:
        with file.open("rb", buffering=0) as stream:
            index = bytearray(_CHUNK_INDEX_BYTES)
            has_index = read_bytes(stream, num_bytes, memoryview(index)) and not stream.read(1)
            return has_index and struct.unpack_from("<QQ", index) == (0, num_bytes) and read_bytes(stream, start, into)
    except OSError:
        return False


def _missing_bytes(state: Path, specs: Mapping[str, ArraySpec]) -> int:
    """The bytes that a unit's arrays lack; where a file that describes them is empty, those of all of them.

    Raises:
      CheckpointError: A file says something else than the manifest.
    """
    if not _has_text(state / _METADATA):
        return sum(_num_bytes(spec.shape, spec) for spec in specs.values())
    document = read_json(state / _METADATA, _ADVICE)
    # Otherwise Orbax would look for arrays in files of other kinds.
    if not isinstance(document, dict) or (document.get("use_zarr3"), document.get("use_ocdbt")) != (True, False):
        raise CheckpointError(f"{state / _METADATA} does not say that the arrays are stored as we store them")
    return sum(_missing_of_array(state / name, spec) for name, spec in specs.items())


def _missing_of_array(array: Path, spec: ArraySpec) -> int:
    needed = _num_bytes(spec.shape, spec)
    if not _has_text(array / _HEADER):
        return needed
    chunk = _chunk_shape(array / _HEADER, spec)
    count = math.prod(-(-size // step) for size, step in zip(spec.shape, chunk, strict=True))
    # Zarr keeps the chunks in a folder `c`, each in a file of its own with an index behind its values.
    sizes = [file.stat().st_size for file in files_below(array / "c")] if (array / "c").is_dir() else []
    return max(count * (_num_bytes(chunk, spec) + _CHUNK_INDEX_BYTES) - sum(sizes), 0)


def _chunk_shape(path: Path, spec: ArraySpec) -> Sequence[int]:
    """The shape of the chunks of an array, by its header, which says in all else what we write.

    Raises:
      CheckpointError: It says something else.
    """
    header = read_json(path, _ADVICE)
    try:
        chunk = header["chunk_grid"]["configuration"]["chunk_shape"]
        expected = expected_header(spec, chunk)
        is_ours = all(
            type(step) is int and 0 < step <= size for step, size in zip(chunk, spec.shape, strict=True)
        ) and _as_text({name: header[name] for name in expected}) == _as_text(expected)
    except (KeyError, TypeError, ValueError):
        is_ours = False
    if not is_ours:
        raise CheckpointError(f"{path} does not describe the {spec.dtype.name} {list(spec.shape)} of the manifest")
    found: Sequence[int] = chunk
    return found


def expected_header(spec: ArraySpec, chunk: Sequence[int]) -> dict[str, Any]:
    """What a header says of an array in such chunks, apart from what a reader need not know."""
    values = {"name": "bytes"} | ({} if spec.dtype.itemsize == 1 else {"configuration": _LITTLE_ENDIAN})
    index = [{"name": "bytes", "configuration": _LITTLE_ENDIAN}, {"name": "crc32c"}]
    sharding = {"chunk_shape": chunk, "codecs": [values], "index_codecs": index}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        "data_type": spec.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _as_text(header: Mapping[str, Any]) -> str:
    """A header to compare: as values, 64 would equal 64.0, and 1 true."""
    return json.dumps(header, sort_keys=True)


def _num_bytes(shape: Sequence[int], spec: ArraySpec) -> int:
    return math.prod(shape) * spec.dtype.itemsize


def _has_text(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0
