"""Writes checkpoints of the safetensors format with the names of a public one (see `safetensors_names`).

Shards are written under names that no reader looks for, `shard-00001.part`, and get their own when all are there; the
index comes last. So an interrupted export is not mistaken for a checkpoint.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from humanize import naturalsize

from grokjax.checkpoint.disk import PARTIAL, check_room, entries, free_bytes, make_folder, write_json
from grokjax.checkpoint.formats.safetensors_names import (
    CONFIG,
    INDEX,
    INSTALL,
    KEYFAN,
    TIED,
    TOKENIZER,
    Scheme,
    config_fields,
    is_transposed,
)
from grokjax.checkpoint.parameters import Part, find_parameter, parameter_shapes, parts_of
from grokjax.checkpoint.stored import Array, CheckpointError
from grokjax.config import GrokConfig

Shard = dict[str, Array]

_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
# Transposed at once: both sides of the copy stay inside the processor's cache.
BLOCK_BYTES = 1 << 20


def write_safetensors(
    path: str | Path,
    config: GrokConfig,
    parts: Iterable[tuple[str, int | None, Array]],
    *,
    dtype: npt.DTypeLike,
    scheme: Scheme = KEYFAN,
    tokenizer: Path | None = None,
    max_shard_bytes: int = 1 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a model as safetensors shards with an index and a `config.json`.

    Memory is needed for one shard and the next part.

    Args:
      path: a folder that does not exist, or is empty.
      config: of the model.
      parts: every part of the model once (`parameters.parts_of`), in any order: our parameter path, the expert or None,
        and the array [C, O], [V, D] or [D], float32 or bfloat16, which must not be changed afterwards.
      dtype: that all of them are written in, norms and router too: float32 or bfloat16.
      scheme: whose names are given, and which classes the configuration names.
      tokenizer: a file to copy beside the shards as `tokenizer.model`; None for none.
      max_shard_bytes: the most that a file holds; a larger part has a file of its own.
      progress: called after each shard with the bytes of the arrays written so far, and in all.

    Raises:
      CheckpointError: The folder exists and is not empty or cannot be written, the disk is full, or the package
        `safetensors` is absent. What was written is removed.
      ValueError: `dtype` or `max_shard_bytes` is impossible, or the parts are not those of the model.
    """
    dtype = np.dtype(dtype)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype.name} cannot be exported: choose float32 or bfloat16.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be a number of bytes, 1 or more.")
    folder = Path(path)
    # Before anything is written, and not after hours of reading.
    _require_package(folder)
    heads = config.vocab_size * config.model_dim if scheme.has_head else 0
    total = (sum(math.prod(shape) for shape in parameter_shapes(config).values()) + heads) * dtype.itemsize
    _make_folder(folder, total)
    with _removed_on_failure() as written:
        places: dict[str, int] = {}
        done = 0
        for number, shard in enumerate(_shards(_tensors(config, parts, dtype, scheme), max_shard_bytes)):
            with _explained(folder):
                _write_shard(folder / f"shard-{number + 1:05d}{PARTIAL}", shard, written)
            places |= dict.fromkeys(shard, number)
            done += sum(array.nbytes for array in shard.values())
            # Neither this loop nor the generator lets go of a shard before the next is full.
            shard.clear()
            if progress is not None:
                progress(done, total)
        with _explained(folder):
            document = {**config_fields(config, scheme), "torch_dtype": dtype.name}
            _commit(folder, document, tokenizer, places, total, written)


def _require_package(path: Path) -> None:
    try:
        import safetensors.numpy  # noqa: F401
    except ImportError as error:
        raise CheckpointError(f"{path}: {INSTALL}") from error


def _make_folder(folder: Path, total: int) -> None:
    """An empty folder with room for `total` bytes."""
    make_folder(folder)
    with _explained(folder):
        found = [entry.name for entry in entries(folder)]
    if found:
        unfinished = any(name.endswith(PARTIAL) for name in found)
        state = "holds what an interrupted export left" if unfinished else "exists and is not empty"
        raise CheckpointError(f"{folder}: {state}: choose another folder, or remove it first.")
    check_room(folder, total)


@contextlib.contextmanager
def _removed_on_failure() -> Iterator[list[Path]]:
    """A list of files, which are removed if the body fails or is interrupted."""
    written: list[Path] = []
    try:
        yield written
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns a failure to write into a sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error}), {naturalsize(free_bytes(folder))} are free: "
            "make room or check the permissions, then export again."
        ) from error


def _tensors(
    config: GrokConfig, parts: Iterable[tuple[str, int | None, Array]], dtype: np.dtype[Any], scheme: Scheme
) -> Iterator[tuple[str, Array]]:
    """Stored names and arrays as they are stored; ends with the error if parts are left over."""
    left = {
        part: shape[len(part.index) :]
        for parameter, shape in parameter_shapes(config).items()
        for part in parts_of(parameter, config)
    }
    num_parts = len(left)
    for parameter, expert, array in parts:
        part = Part(parameter, expert)
        if part not in left:
            raise ValueError(f"{part.name} is no part of the model, or was given before: give each of them once.")
        shape = left.pop(part)
        if array.shape != shape or array.dtype not in _DTYPES:
            raise ValueError(
                f"{part.name} is {array.dtype.name} {list(array.shape)}: float32 or bfloat16 {list(shape)} is needed."
            )
        stored = _transpose(array, dtype) if is_transposed(parameter) else np.ascontiguousarray(array, dtype)
        yield scheme.name(part), stored
        if scheme.has_head and find_parameter(parameter).kind == "table":
            yield TIED, stored
    if left:
        raise ValueError(f"{len(left)} of the {num_parts} parts were not given, such as {next(iter(left)).name}.")


def _transpose(array: Array, dtype: np.dtype[Any]) -> Array:
    """[C, O] as contiguous [O, C]."""
    result = np.empty(array.shape[::-1], dtype)
    # As plain integers: NumPy copies those faster than bfloat16.
    bits = np.dtype(f"u{dtype.itemsize}")
    target = result.view(bits)
    step = max(1, BLOCK_BYTES // (array.shape[1] * dtype.itemsize))
    for start in range(0, array.shape[0], step):
        target[:, start : start + step] = array[start : start + step].astype(dtype, order="C").view(bits).T
    return result


def _shards(tensors: Iterable[tuple[str, Array]], max_bytes: int) -> Iterator[Shard]:
    """Tensors in their order, as many together as fit."""
    shard: Shard = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _write_shard(path: Path, shard: Shard, written: list[Path]) -> None:
    from safetensors.numpy import save_file

    # The package makes files that only their owner may read; this one takes what other new files get.
    path.touch(exist_ok=False)
    written.append(path)
    mode = path.stat().st_mode
    # Source: `transformers` refuses a file whose metadata does not say the format.
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(mode)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _commit(
    folder: Path,
    config: dict[str, Any],
    tokenizer: Path | None,
    places: dict[str, int],
    total: int,
    written: list[Path],
) -> None:
    """Gives the shards their names and writes the other files; `written` is kept up to date."""
    count = len(written)
    if tokenizer is not None:
        written.append(folder / TOKENIZER)
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    written.append(folder / CONFIG)
    write_json(folder / CONFIG, config)
    for i in range(count):
        written[i] = written[i].replace(folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors")
    weight_map = {name: written[i].name for name, i in places.items()}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
