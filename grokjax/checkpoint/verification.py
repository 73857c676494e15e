"""Verification: the arrays of a checkpoint of ours beside its source's or kept checksums; whether values are finite."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from grokjax.checkpoint.formats.manifest import MANIFEST
from grokjax.checkpoint.formats.orbax import OrbaxCheckpoint, open_orbax
from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.parameters import Part, parts_of, units_of
from grokjax.checkpoint.progress import Report, Tally
from grokjax.checkpoint.recipe import Leaves, Recipe, read_part
from grokjax.checkpoint.stored import (
    Checkpoint,
    CheckpointError,
    TensorSpec,
    list_problems,
    specs_of,
    unit_bytes,
)
from grokjax.config import GrokConfig

# `PART/weight` or `PART/scales` -> CRC-32 of the array's bytes, in hexadecimal digits.
Checksums = Mapping[str, str]

_MOST_LISTED = 20


def verify(
    target: str | Path,
    source: str | Path | None = None,
    config: GrokConfig | None = None,
    *,
    progress: Report | None = None,
) -> Checksums:
    """Reads a checkpoint of ours back and compares the checksum of every array; nothing is written.

    With the source of its conversion, every array of it is read and converted again. Without it, the arrays are
    compared with the checksums that `keep_checksums` wrote.

    Args:
      target: a checkpoint of ours.
      source: what it was converted from.
      config: what the source was made with; by default what the checkpoint says.
      progress: called after each unit; without it the logger is told now and then.

    Returns:
      The checksums, for `keep_checksums`.

    Raises:
      CheckpointError: Arrays differ, all of them listed; or there is nothing to compare with.
    """
    stored = open_orbax(target)
    if source is not None:
        expected = _of_source(stored, open_checkpoint(source, config or stored.config))
    elif stored.manifest.checksums:
        expected = _of_manifest(stored)
    else:
        raise CheckpointError(
            f"{stored.path / MANIFEST}: holds no checksums: verify the checkpoint once beside what it was converted "
            "from (--source SRC, source=...), and they are kept; what `save` wrote has nothing to compare with."
        )
    return _compare(stored, expected, progress)


def verify_finite(path: str | Path, config: GrokConfig | None = None, *, progress: Report | None = None) -> None:
    """Looks for values that are NaN or infinite among the floats of a checkpoint: plain weights, and scales of int8.

    Args:
      path: a checkpoint of any layout.
      config: what it was made with, where its files cannot tell.
      progress: called after each part, with the bytes of its floats; without it the logger is told now and then.

    Raises:
      CheckpointError: There are such values; the arrays that have any are listed.
    """
    checkpoint = open_checkpoint(path, config)
    parts = [part for parameter in checkpoint.tensors for part in parts_of(parameter, checkpoint.config)]
    floats = {part: _float_bytes(checkpoint, part) for part in parts}
    tally = Tally("looked at", sum(sum(sizes.values()) for sizes in floats.values()), progress)
    problems: list[str] = []
    for part, sizes in floats.items():
        for name in sizes:
            array = getattr(checkpoint.tensors[part.parameter], name).read(part.index)
            count = array.size - np.count_nonzero(np.isfinite(array))
            if count:
                problems.append(f"{part.name}/{name}: {count} of {array.size} values")
        tally.add(sum(sizes.values()), part.name, part.name)
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: {len(problems)} arrays have values that are NaN or infinite:{_listed(problems)}\n"
            "Compare the files with the published ones, or load it with other values there: see `exclude` of load."
        )


def _float_bytes(checkpoint: Checkpoint, part: Part) -> dict[str, int]:
    """The arrays of a part that are floats, and the bytes of each."""
    leaves = TensorSpec.of(checkpoint.tensors[part.parameter]).part(part).leaves()
    return {name: leaf.num_bytes for name, leaf in leaves.items() if leaf.dtype != np.int8}


def _listed(problems: Sequence[str]) -> str:
    """The first of some problems, a line each."""
    return "".join(f"\n  {problem}" for problem in problems[:_MOST_LISTED])


def keep_checksums(target: str | Path, checksums: Checksums) -> None:
    """Writes checksums into `grokjax.json`, for `verify` to compare with later, unless they stand there already.

    Args:
      target: a checkpoint of ours.
      checksums: what `verify` returned for it.

    Raises:
      CheckpointError: The file cannot be written; the checkpoint stays as it is.
    """
    stored = open_orbax(target)
    if checksums == stored.manifest.checksums:
        return
    try:
        dataclasses.replace(stored.manifest, checksums=checksums).write(stored.path, MANIFEST)
    except CheckpointError as error:
        raise CheckpointError(
            f"every array is what it was made from, but the checksums cannot be kept for the next time: {error}"
        ) from error


def _of_manifest(stored: OrbaxCheckpoint) -> Callable[[Part], Checksums]:
    return lambda _: stored.manifest.checksums


def _of_source(stored: OrbaxCheckpoint, original: Checkpoint) -> Callable[[Part], Checksums]:
    """The checksums that a part must have, which is read from the source and converted again for that."""
    recipe, specs = Recipe.of_origin(stored.manifest.origin), stored.manifest.specs
    _check_origin(stored, original, recipe)
    return lambda part: _checksums(part, recipe.convert(original, part, specs[part.parameter].part(part)))


def _compare(stored: OrbaxCheckpoint, expected: Callable[[Part], Checksums], progress: Report | None) -> dict[str, str]:
    """The checksums of all arrays; the error if some are not as expected."""
    specs = stored.manifest.specs
    tally = Tally("verified", sum(spec.num_bytes for spec in specs.values()), progress)
    checksums: dict[str, str] = {}
    differing: list[str] = []
    for unit in units_of(stored.config):
        for part in unit.parts:
            found, wanted = _checksums(part, read_part(stored, part)), expected(part)
            differing += [name for name in found if found[name] != wanted.get(name)]
            checksums |= found
        tally.add(unit_bytes(specs, unit), unit.name, unit.name)
    if differing:
        raise CheckpointError(
            f"{stored.path}: {len(differing)} arrays differ from what they were made from:{_listed(differing)}\n"
            "Remove the folder and convert again; if they differ again, check the disk."
        )
    return checksums


def _checksums(part: Part, leaves: Leaves) -> dict[str, str]:
    return {
        f"{part.name}/{leaf}": f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"
        for leaf, array in leaves.items()
    }


def _check_origin(stored: OrbaxCheckpoint, original: Checkpoint, recipe: Recipe) -> None:
    """Refuses a source that cannot have become this checkpoint, before anything is read."""
    found = specs_of(original)
    ours = stored.manifest.specs
    problems = [f"{name}: only in the source" for name in found if name not in ours]
    problems += [f"{name}: only in the checkpoint" for name in ours if name not in found]
    differing = [name for name in found if name in ours and recipe.result(name, found[name]) != ours[name]]
    problems += [f"{name}: another shape or dtype than the source's becomes" for name in differing]
    if problems:
        advice = (
            f"This is not what {stored.path} was made from: name that source, or leave it out to compare checksums."
        )
        raise CheckpointError(list_problems(original.path, problems, advice))
