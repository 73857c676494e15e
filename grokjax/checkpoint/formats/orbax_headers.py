"""What lies in the units of our own checkpoints, looked at without the storage library.

What the files say of themselves is compared with the manifest, and their sizes are counted, before that library sees
them: a header that asks for more memory than there is would end the process. Values are also read without it.
"""

import itertools
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
# Of a chunk whose rows are cut, so much is read at once: it is still in the processor's cache when it is copied.
BLOCK_BYTES = 1 << 20
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


def read_chunks(array: Path, spec: ArraySpec, index: Index, out: Array) -> bool:
    """Reads a region of an array into `out`; the storage library would take new memory for every chunk.

    Args:
      array: its folder, in a unit that was looked at.
      spec: what the manifest says of it.
      index: of the region.
      out: of its shape, in C order.

    Returns:
      Whether it was so; not where the files are otherwise than we write them. Then the storage library reads them, or
      says what is wrong.
    """
    chunk = _chunk_shape(array / _HEADER, spec)
    whole = (*index, *[slice(None)] * (len(spec.shape) - len(index)))
    ranges = [
        range(size)[entry if isinstance(entry, slice) else slice(entry, entry + 1)]
        for entry, size in zip(whole, spec.shape, strict=True)
    ]
    if not out.flags.c_contiguous or any(taken.step != 1 for taken in ranges):
        return False
    region = out.reshape([len(taken) for taken in ranges])
    rows = max(1, BLOCK_BYTES // (math.prod(chunk[1:]) * out.itemsize))
    scratch = np.empty((min(rows, chunk[0]), *chunk[1:]), out.dtype)
    numbers = [range(taken.start // step, -(-taken.stop // step)) for taken, step in zip(ranges, chunk, strict=True)]
    for place in itertools.product(*numbers):
        target, within = [], []  # the region's part in this chunk: where it is wanted, and where it is stored
        for number, step, taken in zip(place, chunk, ranges, strict=True):
            start, stop = max(taken.start, number * step), min(taken.stop, (number + 1) * step)
            target.append(slice(start - taken.start, stop - taken.start))
            within.append(slice(start - number * step, stop - number * step))
        if not _read_chunk(array.joinpath("c", *map(str, place)), region[tuple(target)], within, chunk, scratch):
            return False
    return True


def _read_chunk(file: Path, out: Array, within: Sequence[slice], chunk: Sequence[int], scratch: Array) -> bool:
    """Reads a region of a chunk, if its values are the beginning of the file, as the index behind them says.

    Whole rows are read to where they stay, parts of them by way of `scratch`, which holds some rows of the chunk.
    """
    is_direct = out.shape[1:] == scratch.shape[1:] and out.flags.c_contiguous
    step, row_bytes = chunk[0] if is_direct else len(scratch), scratch[0].nbytes
    num_bytes, index = chunk[0] * row_bytes, bytearray(_CHUNK_INDEX_BYTES)
    try:
        with file.open("rb", buffering=0) as stream:
            # In the order of the file: the system reads ahead.
            for start in range(0, len(out), step):
                taken = out[start : start + step]
                rows = taken if is_direct else scratch[: len(taken)]
                into = rows.reshape(-1).view(np.uint8).data
                if not read_bytes(stream, (within[0].start + start) * row_bytes, into):
                    return False
                if not is_direct:
                    taken[...] = rows[(slice(None), *within[1:])]
            has_index = read_bytes(stream, num_bytes, memoryview(index)) and not stream.read(1)
            return has_index and struct.unpack_from("<QQ", index) == (0, num_bytes)
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
