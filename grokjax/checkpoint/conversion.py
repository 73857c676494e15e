"""Conversion of a checkpoint of any layout into one of ours, matrix by matrix.

A conversion is a list of units. Each is read, changed if asked, and written whole or not at all; what is there already
is not done again. So a conversion needs the memory of a few matrices, can be interrupted at any moment, and goes on
where it stopped.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from grokjax.checkpoint.disk import check_name, check_room, free_bytes, make_folder
from grokjax.checkpoint.formats.manifest import MANIFEST, UNFINISHED, Manifest
from grokjax.checkpoint.formats.orbax_headers import finished_units
from grokjax.checkpoint.formats.orbax_units import commit, prepare_units, write_unit
from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.parameters import Unit, units_of
from grokjax.checkpoint.progress import EARLIER, Report, Tally
from grokjax.checkpoint.recipe import Leaves, Recipe, WeightFormat
from grokjax.checkpoint.stored import Checkpoint, CheckpointError, TensorSpec, specs_of, unit_bytes
from grokjax.checkpoint.target import check_source, done_units, locked, make_manifest
from grokjax.config import GrokConfig
from grokjax.distributed import is_first, on_first

# Python, NumPy, JAX and Orbax themselves, and the slices that are converted.
_BASE_BYTES = 768 << 20


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

    source: Checkpoint = dataclasses.field(repr=False)
    target: Path
    recipe: Recipe
    specs: Mapping[str, TensorSpec] = dataclasses.field(repr=False)
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
    weights: WeightFormat = "keep",
    scale_blocks: int = 1,
) -> ConversionPlan:
    """Checks a conversion and measures it, writing nothing; the arguments are those of `convert`.

    Raises:
      CheckpointError: The source is no whole checkpoint, or the target exists and is not an interrupted run of this
        same conversion, or has a path that cannot be used.
      ValueError: The options do not fit the source.
    """
    folder = Path(target).absolute()
    check_name(folder)
    checkpoint = open_checkpoint(source, config)
    recipe = Recipe(weights, scale_blocks)
    if folder.resolve().is_relative_to(checkpoint.path.resolve()):
        raise CheckpointError(f"{folder}: the target is the source or lies in it: choose another target.")
    found = specs_of(checkpoint)
    specs = {name: recipe.result(name, spec) for name, spec in found.items()}
    units = units_of(checkpoint.config)
    done = done_units(folder, make_manifest(checkpoint, recipe, specs))
    missing = [unit_bytes(specs, unit) for unit in units if unit.name not in done]
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
    weights: WeightFormat = "keep",
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
      progress: called after each unit, and first for what was there already; without it the logger is told now and
        then.

    Raises:
      CheckpointError: The source is damaged or was changed meanwhile, the target exists, the disk is full, or the
        target cannot be written.
      ValueError: The options do not fit the source.
    """
    plan = plan_conversion(source, target, config, weights=weights, scale_blocks=scale_blocks)
    plan.recipe.check_processor()
    jax.devices()  # Orbax would ask for them in the middle of its work: where there are none, JAX says so now
    tally = Tally("converted", sum(spec.num_bytes for spec in plan.specs.values()), progress)
    if plan.num_done == plan.num_units and (plan.target / MANIFEST).is_file():
        tally.add(tally.total_bytes, EARLIER, EARLIER)
        return
    manifest = make_manifest(plan.source, plan.recipe, plan.specs)
    with contextlib.ExitStack() as until_committed:
        on_first(f"the beginning of {plan.target}", lambda: until_committed.enter_context(_begun(plan, manifest)))
        _write_units(plan, manifest, tally)
        on_first(f"the end of {plan.target}", lambda: _end(plan, manifest))


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


def _end(plan: ConversionPlan, manifest: Manifest) -> None:
    """Makes the target a checkpoint if its source has stayed as it was."""
    check_source(plan.source, manifest)
    commit(plan.target, manifest)


def _write_units(plan: ConversionPlan, manifest: Manifest, tally: Tally) -> None:
    done = finished_units(plan.target, manifest)
    units = [unit for unit in units_of(plan.source.config) if unit.name not in done]
    earlier = tally.total_bytes - sum(unit_bytes(plan.specs, unit) for unit in units)
    if earlier:
        tally.add(earlier, EARLIER, EARLIER)
    for unit, arrays in _convert_units(plan, units) if is_first() else _stand_ins(plan, units):
        write_unit(plan.target, unit.name, arrays)
        _return_freed_memory()
        tally.add(unit_bytes(plan.specs, unit), unit.name, unit.name)


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


def _convert_units(plan: ConversionPlan, units: Sequence[Unit]) -> Iterator[tuple[Unit, dict[str, Leaves]]]:
    """Converted units in order, the next one being read while the caller writes one."""

    def convert_unit(unit: Unit) -> dict[str, Leaves]:
        return {
            part.name: plan.recipe.convert(plan.source, part, plan.specs[part.parameter].part(part))
            for part in unit.parts
        }

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as reader:
        following = [reader.submit(convert_unit, unit) for unit in units[:1]]
        for number, unit in enumerate(units):
            arrays = following.pop().result()
            following += [reader.submit(convert_unit, unit) for unit in units[number + 1 : number + 2]]
            yield unit, arrays


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
        writing = unit_bytes(specs, unit) * (1 if _is_table(unit) else 2) if unit is not None else 0
        reading = _reading_bytes(checkpoint, found, specs, following) if following is not None else 0
        peak = max(peak, writing + reading)
    return _BASE_BYTES + peak


def _reading_bytes(
    checkpoint: Checkpoint, found: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec], unit: Unit
) -> int:
    """Most memory that reading and converting a unit takes, its result included."""
    if _is_table(unit):
        return unit_bytes(specs, unit)
    return unit_bytes(found, unit) * checkpoint.read_copies + (unit_bytes(specs, unit) if found != specs else 0)


def _is_table(unit: Unit) -> bool:
    return unit.name == "embedding.table"


def _return_freed_memory() -> None:
    """Gives back what was freed: glibc keeps it for each thread that Orbax copies chunks in, over a gigabyte in all."""
    trim = None if os.name == "nt" else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
