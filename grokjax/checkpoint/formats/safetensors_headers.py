"""What the files of a safetensors checkpoint say about their tensors: where each lies, its shape and dtype.

The package `safetensors` is optional, and is imported when a file is opened.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from grokjax.checkpoint.disk import Stamp, entries, stamp_of
from grokjax.checkpoint.formats.safetensors_names import INDEX, INSTALL, read_object
from grokjax.checkpoint.stored import CheckpointError, list_problems

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says about one of its tensors.

    Attributes:
      file: the file.
      name: of the tensor.
      start: the place of its first byte in the file.
      shape: as stored.
      dtype: the format's name of it, such as `BF16`.
      stamp: of the file when this was read.
    """

    file: Path
    name: str
    start: int
    shape: tuple[int, ...]
    dtype: str
    stamp: Stamp


def find_safetensors(path: str | Path) -> Path | None:
    """`path` if it is a folder with an index or any `*.safetensors` file, else None."""
    folder = Path(path)
    return folder if folder.is_dir() and ((folder / INDEX).exists() or _file_names(folder)) else None


def read_headers(folder: Path) -> dict[str, Header]:
    """The tensors of all files, which are those of the index where there is one; a warning names others.

    Raises:
      CheckpointError: Files are missing or damaged, or tensors missing, surplus or twice there; all of them are listed.
    """
    present = _file_names(folder)
    index = _read_index(folder / INDEX) if (folder / INDEX).exists() else None
    files = present if index is None else set(index)
    if present - files:
        unread = ", ".join(sorted(present - files))
        _LOGGER.warning("%s: %s does not name %s, which is not read.", folder, INDEX, unread)
    problems = [f"{name}: missing, {INDEX} names it" for name in sorted(files - present)]
    headers: dict[str, Header] = {}
    for file in sorted(files & present):
        try:
            found = _read_file(folder / file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        said = found.keys() if index is None else index[file]
        problems += [f"{file}: lacks {name}, which {INDEX} says it holds" for name in sorted(said - found.keys())]
        problems += [f"{file}: holds {name}, which {INDEX} does not say" for name in sorted(found.keys() - said)]
        twice = sorted(found.keys() & headers.keys())
        problems += [f"{file}: holds {name}, as does {headers[name].file.name}" for name in twice]
        headers |= found
    if problems:
        what, advice = "files are damaged or missing", "Download these files again."
        raise CheckpointError(list_problems(folder, problems, advice, what=what))
    return headers


def _read_index(path: Path) -> dict[str, set[str]]:
    """Name of a file -> names of the tensors that it should hold."""
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: has no weight_map from tensors to files: download it again.")
    files: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: places {name} in {file!r}; a *.safetensors file beside it is allowed.")
        files.setdefault(file, set()).add(name)
    return files


def _read_file(path: Path) -> dict[str, Header]:
    """What a file says about its tensors.

    Raises:
      CheckpointError: The package `safetensors` is absent, or the file cannot be read.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(f"{path}: {INSTALL}") from error
    stamp = stamp_of(path)
    try:
        with safe_open(path, framework="np"):  # checks all that the header says
            start, tensors = _read_header(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): download it again.") from error
    return {
        name: Header(path, name, start + said["data_offsets"][0], tuple(said["shape"]), said["dtype"], stamp)
        for name, said in tensors.items()
    }


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the numbers of a file begin, and what it says of each tensor; the package does not tell where they lie."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        tensors: dict[str, Any] = json.loads(file.read(num_bytes))
    tensors.pop("__metadata__", None)
    return 8 + num_bytes, tensors


def _file_names(folder: Path) -> set[str]:
    return {entry.name for entry in entries(folder) if entry.suffix == ".safetensors" and entry.is_file()}
