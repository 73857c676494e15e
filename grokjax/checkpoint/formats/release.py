"""Reads the released checkpoint `ckpt-0`: which file is which parameter, and where its bytes lie.

Nothing is unpickled (see `release_pickle`) and nothing is loaded: a checkpoint is opened by reading a few hundred bytes
of each file, and what a caller wants of an array is read later, as `payload` does.
"""

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from grokjax.checkpoint.disk import Stamp, stamp_of
from grokjax.checkpoint.formats.payload import Payload
from grokjax.checkpoint.formats.release_pickle import ArrayHeader, PickleFormatError, parse_tensor
from grokjax.checkpoint.parameters import Part, find_parameter, parameter_shapes
from grokjax.checkpoint.sizes import check_count, recognise
from grokjax.checkpoint.stored import (
    ANOTHER_CONFIG,
    CheckpointError,
    DamageError,
    Shards,
    Wanted,
    list_problems,
    mismatches,
    read_slices,
    sample_rows,
)
from grokjax.config import GrokConfig


@dataclasses.dataclass(frozen=True)
class ReleaseTensor:
    """One file: a plain weight, or an int8 weight with scales blocked along its second-to-last axis.

    Attributes:
      file: the file.
      weight: [..., C, O], C the contracting axis; or any shape when plain.
      scales: [..., Q, O], Q a divisor of C: block q scales rows q*C/Q to (q+1)*C/Q. None for a plain weight.
    """

    file: Path
    weight: Payload
    scales: Payload | None


@dataclasses.dataclass(frozen=True)
class ReleaseCheckpoint:
    """A checkpoint whose files all fit its configuration.

    Attributes:
      path: the folder that holds the files.
      config: the configuration that the files were checked against.
      tensors: our parameter path -> its file, in the order of the files.
      layout: `release`.
      read_copies: 1: slices are read into the place where they are used.
    """

    path: Path
    config: GrokConfig
    tensors: Mapping[str, ReleaseTensor]
    layout: str = "release"
    read_copies: int = 1

    def read_parts(self, unit: str, wanted: Sequence[Wanted], max_host_bytes: int) -> list[Shards]:
        """Reads parts as `Checkpoint.read_parts` says; one slice at a time is in flight, whatever is allowed."""
        return read_slices(self.tensors, wanted)

    def sample(self, part: Part) -> bytes:
        """A few bytes of a part, as `Checkpoint.sample` says."""
        return sample_rows(self.tensors, part)


# Five digits, as the release wrote them; a hostile name with more of them would ask for a huge range of numbers.
_FILE_NAME = re.compile(r"tensor([0-9]{5})_([0-9]{3})")
# A release has the ranks of one of these, with experts or dense, in the files up to the last that tells a size.
_KINDS = tuple(GrokConfig.tiny().replace(num_layers=1, num_experts=count, experts_per_token=1) for count in (8, 1))
_TABLE, _GATE, _KEY, _QUERY = (
    "embedding.table",
    "layers.0.feed_forward.gate",
    "layers.0.attention.key",
    "layers.0.attention.query",
)


def read_tensor(path: str | Path) -> ReleaseTensor:
    """Reads the header of one file, a few hundred bytes whatever the size of its arrays.

    Raises:
      CheckpointError: The file cannot be read, or is anything but one array of the release's format.
    """
    path = Path(path)
    # Opening a named pipe would wait for its writer for ever.
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file; a file of the release is needed: check the path.")
    try:
        stamp = stamp_of(path)
        with path.open("rb", buffering=1024) as stream:
            header = parse_tensor(stream, stamp.num_bytes)
    except PickleFormatError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check its permissions.") from error
    scales = None if header.scales is None else _payload(path, header.scales, stamp)
    return ReleaseTensor(path, _payload(path, header.weight, stamp), scales)


def find_release(path: str | Path) -> Path | None:
    """The folder with the release's files: `path`, its child `ckpt-0` or `ckpt` (early uploads), or None."""
    for folder in (Path(path), Path(path, "ckpt-0"), Path(path, "ckpt")):
        if folder.is_dir() and any(name.endswith("_000") for name in _file_names(folder)):
            return folder
    return None


def release_name(parameter: str, config: GrokConfig) -> str:
    """The release's name of one of our paths: module and parameter, as in `transformer/decoder_layer_3/router w`."""
    name = Part(parameter).fill(find_parameter(parameter).release)
    return name.replace("/moe/", "/") if config.num_experts == 1 else name


def parameter_names(config: GrokConfig) -> dict[str, str]:
    """File name -> our parameter path, in the order of the files.

    The files follow the sorted order of the release's NAMES, so layers come as 0, 1, 10, 11, ..., 2, 20, ...; numeric
    order would load without an error and compute gibberish.

    Source: JAX flattens dictionaries by sorted keys, and the release numbered the leaves of its parameter tree.
    """
    ordered = sorted(parameter_shapes(config), key=lambda parameter: release_name(parameter, config))
    return {_file_name(number): parameter for number, parameter in enumerate(ordered)}


def infer_sizes(path: str | Path) -> dict[str, int]:
    """The sizes that the number and the shapes of the files tell.

    Returns:
      `vocab_size`, `model_dim`, `num_layers`, `num_experts` (1: dense), `ffn_dim`, and the products
      `num_heads*head_dim` and `num_kv_heads*head_dim`, which the files do not tell apart.

    Raises:
      CheckpointError: There are no files, a number is missing, or the files do not make whole layers.
    """
    folder = _folder(path)
    numbers = _numbers(_file_names(folder))
    gaps = _ranges({_file_name(number) for number in set(range(max(numbers))) - numbers})
    if gaps:
        raise CheckpointError(f"{folder}: missing {', '.join(gaps)}: download the missing files.")
    leading = _leading_shapes(_KINDS[0])
    # They are those of layer 0 in both kinds, however many layers there are.
    shapes = {
        parameter: read_tensor(folder / _file_name(number)).weight.shape
        for parameter, number in zip(leading, sorted(numbers), strict=False)
    }
    num_layers = _count_layers(shapes, len(numbers))
    if num_layers is None:
        raise CheckpointError(
            f"{folder}: {len(numbers)} files, the first with the shapes {[list(shape) for shape in shapes.values()]}; "
            "a release has 2 files and then 12 for each layer, or 11 for a dense one, in the sorted order of their "
            "names: compare the files with the published ones."
        )
    gate = shapes[_GATE]
    return {
        "vocab_size": shapes[_TABLE][0],
        "model_dim": shapes[_TABLE][1],
        "num_layers": num_layers,
        "num_experts": gate[0] if len(gate) == 3 else 1,
        "ffn_dim": gate[-1],
        "num_heads*head_dim": shapes[_QUERY][1],
        "num_kv_heads*head_dim": shapes[_KEY][1],
    }


def _leading_shapes(config: GrokConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter path -> its shape, for the first files of a release and up to the last that tells a size."""
    shapes = parameter_shapes(config)
    names = list(parameter_names(config).values())
    last = max(names.index(name) for name in (_TABLE, _GATE, _KEY, _QUERY))
    return {name: shapes[name] for name in names[: last + 1]}


def _count_layers(shapes: Mapping[str, tuple[int, ...]], num_files: int) -> int | None:
    """How many layers so many files make, the first with these shapes; None where they make no release."""
    for kind in _KINDS:
        per_layer = sum(name.startswith("layers.") for name in parameter_names(kind).values())
        layers, left = divmod(num_files - (len(parameter_names(kind)) - per_layer), per_layer)
        ranks = {name: len(shape) for name, shape in _leading_shapes(kind).items()}
        if not left and ranks == {name: len(shape) for name, shape in shapes.items()}:
            return layers
    return None


def open_release(path: str | Path, config: GrokConfig | None = None) -> ReleaseCheckpoint:
    """Opens a checkpoint and checks each file against the configuration; no array is read.

    Layers whose files were numbered in numeric order have the same shapes and cannot be told apart here.

    Args:
      path: the folder of the files, or its parent (see `find_release`).
      config: what the checkpoint was made with. Without it the sizes are inferred, which is enough for Grok-1 alone.

    Raises:
      CheckpointError: There is no checkpoint, its configuration is not known, or files are missing, surplus, malformed
        or of the wrong shape or dtype; all of them are listed.
      DamageError: All that is wrong is that files are malformed.
    """
    folder = _folder(path)
    config = recognise(folder, infer_sizes(folder), "pass") if config is None else config
    present = _file_names(folder)
    check_count(folder, config, "num_layers", len(present), "files in it")
    names, shapes = parameter_names(config), parameter_shapes(config)
    problems = [f"missing {files}" for files in _ranges(set(names) - present)]
    problems += [f"surplus {files}" for files in _ranges(present - set(names))]
    num_damaged = 0
    tensors: dict[str, ReleaseTensor] = {}
    for name in [name for name in names if name in present]:
        parameter = names[name]
        try:
            tensors[parameter] = read_tensor(folder / name)
        except CheckpointError as error:
            problems.append(str(error))
            num_damaged += 1
            continue
        where = f"{name} ({release_name(parameter, config)})"
        problems += [f"{where}: {text}" for text in mismatches(tensors[parameter], parameter, shapes[parameter])]
    if problems and num_damaged == len(problems):
        what, advice = "files are damaged", "Download these files again."
        raise DamageError(list_problems(folder, problems, advice, what=what))
    if problems:
        raise CheckpointError(list_problems(folder, problems, ANOTHER_CONFIG))
    return ReleaseCheckpoint(folder, config, types.MappingProxyType(tensors))


def _payload(path: Path, header: ArrayHeader, stamp: Stamp) -> Payload:
    return Payload(path, header.offset, header.shape, header.dtype, stamp)


def _file_name(number: int) -> str:
    return f"tensor{number:05d}_000"


def _file_names(folder: Path) -> set[str]:
    """The files that look like tensors, whichever process wrote them (the release's were all written by 000)."""
    return {entry.name for entry in folder.iterdir() if _FILE_NAME.fullmatch(entry.name)}


def _numbers(names: Iterable[str]) -> set[int]:
    return {int(name[6:11]) for name in names if name.endswith("_000")}


def _ranges(names: set[str]) -> list[str]:
    """The file names in order, runs of consecutive numbers as `first to last`."""
    runs: list[list[str]] = []
    for name in sorted(names):
        if runs and _file_name(int(runs[-1][-1][6:11]) + 1) == name:
            runs[-1][1:] = [name]
        else:
            runs.append([name])
    return [" to ".join(run) for run in runs]


def _folder(path: str | Path) -> Path:
    folder = find_release(path)
    if folder is None:
        raise CheckpointError(
            f"{path}: found no files tensorNNNNN_000 in it, nor in its children ckpt-0 and ckpt: "
            "pass the folder of a downloaded release."
        )
    return folder
