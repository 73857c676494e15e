"""Writes a model as a checkpoint of ours."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from grokjax.checkpoint.assembly import take_part
from grokjax.checkpoint.disk import check_room, make_folder
from grokjax.checkpoint.formats.manifest import UNFINISHED, Manifest
from grokjax.checkpoint.formats.orbax_units import commit, prepare_units, write_unit
from grokjax.checkpoint.parameters import Part, Unit, parameter_shapes, stack_name, units_of
from grokjax.checkpoint.progress import Report, Tally
from grokjax.checkpoint.stored import ArraySpec, CheckpointError, TensorSpec, find_misfits, unit_bytes
from grokjax.context import own_context
from grokjax.distributed import on_first
from grokjax.model import Grok, abstract_model, named_parameters
from grokjax.quantization import QuantizedArray, QuantizedTable, Weight


@own_context()
def save(model: Grok, path: str | Path, *, progress: Report | None = None) -> None:
    """Writes a model as a checkpoint of ours, which `load` restores onto any mesh.

    The host holds two matrices at a time, one of which is written. Until all is written the folder is no checkpoint,
    and `load` says so. If the model spans processes, all of them call it, and each writes its own shards.

    Args:
      model: on any mesh.
      path: a folder that does not exist yet, on a disk that all processes share.
      progress: called after each unit; without it the logger is told now and then.

    Raises:
      CheckpointError: The folder exists, cannot be written, or the disk is full.
      ValueError: The model has parameters that a checkpoint has no place for, or lacks some, or some have another shape
        or dtype than a checkpoint holds; all are listed. Or its embedding table is int8, it is edited, or it is no
        model.
    """
    if not isinstance(model, Grok):
        raise ValueError(f"the model must be one that init or load makes, not a {type(model).__name__}.")
    if isinstance(model.embedding.table.get_value(), QuantizedTable):
        raise ValueError(
            "the embedding table is int8, and checkpoints hold it plain: save the model made without quantized_table."
        )
    if model.edits is not None:
        listed = "".join(f"\n  {one!r}" for one in model.edits.get_value())
        raise ValueError(
            f"the model is edited, and checkpoints hold parameters alone:{listed}\nSave "
            "grokjax.research.unedited(model), and edit it again when it is loaded."
        )
    _check_parameters(model)
    folder = Path(path).absolute()
    values = named_parameters(model)
    specs = {name: _saved_spec(values, name, shape) for name, shape in parameter_shapes(model.config).items()}
    manifest = Manifest(model.config, specs, {"made_by": "save"})
    tally = Tally("saved", sum(spec.num_bytes for spec in specs.values()), progress)
    together = model.partitioner.mesh.is_multi_process
    on_first(f"the beginning of {folder}", lambda: _begin(folder, manifest, tally.total_bytes), together=together)
    for unit, arrays in _take_units(values, units_of(model.config)):
        write_unit(folder, unit.name, arrays)
        tally.add(unit_bytes(specs, unit), unit.name, unit.name)
    on_first(f"the end of {folder}", lambda: commit(folder, manifest), together=together)


def _check_parameters(model: Grok) -> None:
    """Refuses a model that would not come back from its checkpoint as it is."""
    found = named_parameters(model)
    known = named_parameters(abstract_model(model.config, model.partitioner, dtype=model.dtype, quantized=False))
    problems = [f"{name}: checkpoints have no place for it" for name in found if name not in known]
    specs = {name: _spec_of(param.get_value()) for name, param in found.items() if name in known}
    problems += find_misfits(specs, {name: param.get_value().shape for name, param in known.items()})
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(
            f"the model does not fit into a checkpoint:{listed}\nKeep what was added in a file of its own, take it out "
            "of the model, and save again; restore what is missing or has another shape or dtype."
        )


def _spec_of(value: Weight) -> TensorSpec:
    if not isinstance(value, QuantizedArray):
        return TensorSpec(ArraySpec(value.shape, value.dtype), None)
    weight, scales = (ArraySpec(leaf.shape, leaf.dtype) for leaf in (value.weight, value.scales))
    return TensorSpec(weight, scales)


def _begin(folder: Path, manifest: Manifest, num_bytes: int) -> None:
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already: choose another path, or remove it first.")
    check_room(folder, num_bytes)
    make_folder(folder)
    manifest.write(folder, UNFINISHED)
    prepare_units(folder, manifest)


def _saved_spec(values: dict[str, nnx.Variable], name: str, shape: tuple[int, ...]) -> TensorSpec:
    value: Weight = values[stack_name(name)].get_value()
    if not isinstance(value, QuantizedArray):
        return TensorSpec(ArraySpec(shape, value.dtype), None)
    scales = (*shape[:-2], value.num_blocks, shape[-1])
    return TensorSpec(ArraySpec(shape, value.weight.dtype), ArraySpec(scales, value.scales.dtype))


def _take_units(
    values: dict[str, nnx.Variable], units: Sequence[Unit]
) -> Iterator[tuple[Unit, dict[str, dict[str, jax.Array]]]]:
    """The units in order, the arrays of the next one being taken from the model while the caller writes one."""

    def take(unit: Unit) -> dict[str, dict[str, jax.Array]]:
        return {part.name: _take(values, part) for part in unit.parts}

    coming = take(units[0])
    for unit, following in itertools.zip_longest(units, units[1:]):
        arrays, coming = coming, {} if following is None else take(following)  # JAX does not wait for it
        yield unit, arrays


def _take(values: dict[str, nnx.Variable], part: Part) -> dict[str, jax.Array]:
    """The arrays of one part of a model, in their shards."""
    param = values[stack_name(part.parameter)]
    value: Weight = param.get_value()
    if part.layer is not None:
        at = (part.layer, part.expert or 0) if param.logical_axes[1] == "experts" else (part.layer,)
        value = take_part(value, jnp.asarray(at, jnp.int32), len(at))
    if isinstance(value, QuantizedArray):
        return {"weight": value.weight, "scales": value.scales}
    return {"weight": value}
