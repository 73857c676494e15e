"""Conversion of a checkpoint of any layout into one of ours, matrix by matrix, and export to safetensors.

A conversion is a list of units. Each is read, changed if asked, and written whole or not at all; what is there already
is not done again. So a conversion needs the memory of a few matrices, can be interrupted at any moment, and goes on
where it stopped.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import itertools
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from grokjax.checkpoint.disk import check_room, free_bytes, make_folder
from grokjax.checkpoint.formats.manifest import MANIFEST, UNFINISHED, Manifest
from grokjax.checkpoint.formats.orbax import (
    OrbaxCheckpoint,
    commit,
    finished_units,
    open_orbax,
    prepare_units,
    write_unit,
)
from grokjax.checkpoint.formats.safetensors_export import write_safetensors
from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.loading import Progress, Report
from grokjax.checkpoint.parameters import Part, Unit, parts_of, units_of
from grokjax.checkpoint.recipe import Leaves, Recipe, Weights
from grokjax.checkpoint.stored import Array, ArraySpec, Checkpoint, CheckpointError, TensorSpec, list_problems
from grokjax.checkpoint.target import done_units, locked, make_manifest
from grokjax.config import GrokConfig
from grokjax.distributed import is_first, on_first
from grokjax.model import check_dtype

# What `Progress` calls the units that an interrupted run has left.
EARLIER = "an earlier run"
# Python, NumPy, JAX and Orbax themselves, and the slices that are converted.
_BASE_BYTES = 768 << 20
SLICE_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will do, known before anything is written.

    Attributes:
      source: the checkpoint.
      target: folder of the new one.
      recipe: what is done with the weights.
      specs: the new checkpoint's path -> shapes and dtypes.
      num_units: of the new checkpoint.
      num_done: of them are there already, from an interrupted run.
      write_bytes: bytes of the arrays still to be written.
      free_bytes: free on the target's disk.
      peak_host_bytes: the most memory that the process takes.
    """

    source: Checkpoint
    target: Path
    recipe: Recipe
    specs: Mapping[str, TensorSpec]
    num_units: int
    num_done: int
    write_bytes: int
    free_bytes: int
    peak_host_bytes: int


def plan_conversion(
    source: str | Path,
    target: str | Path,
    config: GrokConfig | None = None,
    *,
    weights: Weights = "keep",
    scale_blocks: int = 1,
) -> ConversionPlan:
    """Checks a conversion and measures it, writing nothing; the arguments are those of `convert`.

    Raises:
      CheckpointError: The source is no whole checkpoint, or the target exists and is not an interrupted run of this
        same conversion.
      ValueError: The options do not fit the source.
    """
    checkpoint = open_checkpoint(source, config)
    recipe = Recipe(weights, scale_blocks)
    folder = Path(target).absolute()
    if folder.resolve().is_relative_to(checkpoint.path.resolve()):
        raise CheckpointError(f"{folder}: the target is the source or lies in it: choose another target.")
    found = {name: TensorSpec.of(tensor) for name, tensor in checkpoint.tensors.items()}
    specs = {name: recipe.result(name, spec) for name, spec in found.items()}
    units = units_of(checkpoint.config)
    done = done_units(folder, make_manifest(checkpoint, recipe, specs))
    missing = [_num_bytes(specs, unit) for unit in units if unit.name not in done]
    return ConversionPlan(
        source=checkpoint,
        target=folder,
        recipe=recipe,
        specs=specs,
        num_units=len(units),
        num_done=len(units) - len(missing),
        write_bytes=sum(missing),
        free_bytes=free_bytes(folder),
        peak_host_bytes=peak_bytes(checkpoint, found, specs),
    )


def convert(
    source: str | Path,
    target: str | Path,
    config: GrokConfig | None = None,
    *,
    weights: Weights = "keep",
    scale_blocks: int = 1,
    progress: Report | None = None,
) -> None:
    """Writes a checkpoint of any layout as one of ours, going on where an interrupted run of the same stopped.

    Processes that work together all call it, and the first converts: disks are the limit. Alone is as fast.

    Args:
      source: a checkpoint of any layout.
      target: a folder that does not exist, or that an interrupted run of this conversion left. If it holds all of
        this conversion already, nothing is done.
      config: what the source was made with, where its files cannot tell.
      weights: `keep` leaves every array as it is; `int8` quantises float weights of attention and experts;
        `bfloat16` and `float32` make everything plain in that dtype, norms and router excepted.
      scale_blocks: Q of weights that are quantised here.
      progress: called after each unit, and first for what was there already.

    Raises:
      CheckpointError: The source is damaged, the target exists, the disk is full, or the target cannot be written.
      ValueError: The options do not fit the source.
    """
    plan = plan_conversion(source, target, config, weights=weights, scale_blocks=scale_blocks)
    total = sum(spec.num_bytes for spec in plan.specs.values())
    if plan.num_done == plan.num_units and (plan.target / MANIFEST).is_file():
        if progress is not None:
            progress(Progress(EARLIER, EARLIER, total, total))
        return
    manifest = make_manifest(plan.source, plan.recipe, plan.specs)
    with contextlib.ExitStack() as until_committed:
        on_first(f"the beginning of {plan.target}", lambda: until_committed.enter_context(_begun(plan, manifest)))
        _write_units(plan, manifest, progress)
        on_first(f"the end of {plan.target}", lambda: commit(plan.target))


@contextlib.contextmanager
def _begun(plan: ConversionPlan, manifest: Manifest) -> Iterator[None]:
    """The target, made ready for its units, and ours alone."""
    check_room(plan.target, plan.write_bytes)
    make_folder(plan.target)
    with locked(plan.target):
        done_units(plan.target, manifest)  # what another process may have written since the plan was made
        manifest.write(plan.target, UNFINISHED)
        prepare_units(plan.target, manifest)
        yield


def _write_units(plan: ConversionPlan, manifest: Manifest, progress: Report | None) -> None:
    done = finished_units(plan.target, manifest)
    units = [unit for unit in units_of(plan.source.config) if unit.name not in done]
    total = sum(spec.num_bytes for spec in plan.specs.values())
    written = total - sum(_num_bytes(plan.specs, unit) for unit in units)
    if progress is not None and written:
        progress(Progress(EARLIER, EARLIER, written, total))
    for unit, arrays in _convert_units(plan, units) if is_first() else _stand_ins(plan, units):
        write_unit(plan.target, unit.name, arrays)
        _return_freed_memory()
        written += _num_bytes(plan.specs, unit)
        if progress is not None:
            progress(Progress(unit.name, unit.name, written, total))


def _stand_ins(plan: ConversionPlan, units: Sequence[Unit]) -> Iterator[tuple[Unit, dict[str, Leaves]]]:
    """What the other processes bring to Orbax, which wants all of them at each save: shapes and no memory."""
    for unit in units:
        yield (
            unit,
            {
                part.name: {
                    name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
                    for name, leaf in plan.specs[part.parameter].part(part).leaves().items()
                }
                for part in unit.parts
            },
        )


def verify(
    target: str | Path,
    source: str | Path | None = None,
    config: GrokConfig | None = None,
    *,
    progress: Report | None = None,
) -> None:
    """Reads a checkpoint of ours back and compares the checksum of every array.

    With the source of its conversion, every array of it is read and converted again, and the checksums are kept in
    `grokjax.json`. Without it, the arrays are compared with the checksums kept there.

    Args:
      target: a checkpoint of ours.
      source: what it was converted from.
      config: what the source was made with, where its files cannot tell.
      progress: called after each unit.

    Raises:
      CheckpointError: Arrays differ, all of them listed; or there is nothing to compare with.
    """
    stored = open_orbax(target)
    original = None if source is None else open_checkpoint(source, config)
    if original is None and not stored.manifest.checksums:
        raise CheckpointError(
            f"{stored.path / MANIFEST}: holds no checksums: verify the checkpoint once beside what it was made from."
        )
    recipe = Recipe.of_origin(stored.manifest.origin)
    if original is not None:
        _check_origin(stored, original, recipe)
    checksums: dict[str, str] = {}
    differing: list[str] = []
    done, total = 0, sum(spec.num_bytes for spec in stored.manifest.specs.values())
    for unit in units_of(stored.config):
        for part in unit.parts:
            found = _checksums(part, _read_part(stored, part))
            expected = dict(stored.manifest.checksums)
            if original is not None:
                spec = stored.manifest.specs[part.parameter].part(part)
                expected = _checksums(part, _convert_part(original, part, recipe, spec))
            differing += [name for name in found if found[name] != expected.get(name)]
            checksums |= found
        done += _num_bytes(stored.manifest.specs, unit)
        if progress is not None:
            progress(Progress(unit.name, unit.name, done, total))
    if differing:
        listed = "".join(f"\n  {name}" for name in differing[:20])
        raise CheckpointError(
            f"{stored.path}: {len(differing)} arrays differ from what they were made from:{listed}\n"
            "Remove the folder and convert again; if they differ again, check the disk."
        )
    if checksums == stored.manifest.checksums:
        return
    try:
        dataclasses.replace(stored.manifest, checksums=checksums).write(stored.path, MANIFEST)
    except CheckpointError as error:
        raise CheckpointError(
            f"every array is what it was made from, but the checksums cannot be kept for the next time: {error}"
        ) from error


def export(
    source: str | Path,
    target: str | Path,
    config: GrokConfig | None = None,
    *,
    dtype: DTypeLike = "bfloat16",
    progress: Report | None = None,
) -> None:
    """Writes a checkpoint of any layout as safetensors files with the names of keyfan/grok-1-hf.

    int8 weights are written as what they stand for: exactly so in float32, rounded in bfloat16.

    Args:
      source: a checkpoint of any layout.
      target: a folder that does not exist or is empty.
      config: what the source was made with, where its files cannot tell.
      dtype: of all arrays, float32 or bfloat16.
      progress: called after each part, with the bytes that are written.

    Raises:
      CheckpointError: The source is damaged, the target exists or cannot be written, or the disk is full.
      ValueError: The dtype is neither of the two.
    """
    checkpoint = open_checkpoint(source, config)
    name = check_dtype(dtype).name
    found = {parameter: TensorSpec.of(tensor) for parameter, tensor in checkpoint.tensors.items()}
    total = sum(math.prod(spec.weight.shape) for spec in found.values()) * np.dtype(name).itemsize

    def parts() -> Iterator[tuple[str, int | None, Array]]:
        done = 0
        for part in [part for parameter in found for part in parts_of(parameter, checkpoint.config)]:
            array = _plain(_read_part(checkpoint, part), np.dtype(name))
            yield part.parameter, part.expert, array
            done += array.nbytes
            if progress is not None:
                progress(Progress(part.name, part.name, done, total))

    write_safetensors(target, checkpoint.config, parts(), dtype=name)


def _plain(leaves: Leaves, dtype: np.dtype[Any]) -> Array:
    if "scales" not in leaves:
        return leaves["weight"].astype(dtype, copy=False)
    spec = TensorSpec(ArraySpec(leaves["weight"].shape, dtype), None)
    return Recipe().apply(leaves, spec)["weight"]


def _convert_units(plan: ConversionPlan, units: Sequence[Unit]) -> Iterator[tuple[Unit, dict[str, Leaves]]]:
    """Converted units in order, the next one being read while the caller writes one."""

    def convert_unit(unit: Unit) -> dict[str, Leaves]:
        return {
            part.name: _convert_part(plan.source, part, plan.recipe, plan.specs[part.parameter].part(part))
            for part in unit.parts
        }

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as reader:
        following = [reader.submit(convert_unit, unit) for unit in units[:1]]
        for number, unit in enumerate(units):
            arrays = following.pop().result()
            following += [reader.submit(convert_unit, unit) for unit in units[number + 1 : number + 2]]
            yield unit, arrays


def _convert_part(checkpoint: Checkpoint, part: Part, recipe: Recipe, spec: TensorSpec) -> Leaves:
    tensor = checkpoint.tensors[part.parameter]
    if tensor.scales is not None or spec.scales is not None or tensor.weight.dtype == spec.weight.dtype:
        return recipe.apply(_read_part(checkpoint, part), spec)
    # A cast takes some rows at a time, so that the table is not there twice.
    result = np.empty(spec.weight.shape, spec.weight.dtype)
    step = max(1, SLICE_BYTES * len(result) // result.nbytes)
    for start in range(0, len(result), step):
        result[start : start + step] = tensor.weight.read((*part.index, slice(start, start + step)))
    return {"weight": result}


def _read_part(checkpoint: Checkpoint, part: Part) -> Leaves:
    tensor = checkpoint.tensors[part.parameter]
    leaves = {"weight": tensor.weight.read(part.index)}
    return leaves if tensor.scales is None else leaves | {"scales": tensor.scales.read(part.index)}


def _checksums(part: Part, leaves: Leaves) -> dict[str, str]:
    return {
        f"{part.name}/{leaf}": f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"
        for leaf, array in leaves.items()
    }


def _num_bytes(specs: Mapping[str, TensorSpec], unit: Unit) -> int:
    return sum(specs[part.parameter].part(part).num_bytes for part in unit.parts)


def peak_bytes(checkpoint: Checkpoint, found: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec]) -> int:
    """Most memory, in bytes, that the process of a conversion takes.

    It holds a unit that is being written, its copy in chunks, and the next one, which is being read and converted.

    Args:
      checkpoint: the source.
      found: its parameters -> shapes and dtypes.
      specs: the new checkpoint's parameters -> shapes and dtypes.
    """
    peak = 0
    units = units_of(checkpoint.config)
    for unit, following in itertools.pairwise((None, *units, None)):
        # The table is cut between rows, which needs no copy to write.
        writing = _num_bytes(specs, unit) * (1 if _is_table(unit) else 2) if unit is not None else 0
        reading = _reading_bytes(checkpoint, found, specs, following) if following is not None else 0
        peak = max(peak, writing + reading)
    return _BASE_BYTES + peak


def _reading_bytes(
    checkpoint: Checkpoint, found: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec], unit: Unit
) -> int:
    """Most memory that reading and converting a unit takes, its result included."""
    if _is_table(unit):
        return _num_bytes(specs, unit)
    # Orbax reads whole chunks and copies them into place.
    copies = 2 if isinstance(checkpoint, OrbaxCheckpoint) else 1
    return _num_bytes(found, unit) * copies + (_num_bytes(specs, unit) if found != specs else 0)


def _is_table(unit: Unit) -> bool:
    return unit.name == "embedding.table"


def _return_freed_memory() -> None:
    """Gives back what was freed: glibc keeps it for each thread that Orbax copies chunks in, over a gigabyte in all."""
    trim = None if os.name == "nt" else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _check_origin(stored: OrbaxCheckpoint, original: Checkpoint, recipe: Recipe) -> None:
    """Refuses a source that cannot have become this checkpoint, before anything is read."""
    found = {name: TensorSpec.of(tensor) for name, tensor in original.tensors.items()}
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
