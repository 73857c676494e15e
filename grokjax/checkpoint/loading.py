"""Loads checkpoints of any layout straight into a model's shards, saves models, and tells what a checkpoint holds."""

import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from grokjax.checkpoint.assembly import Builder, Slot, Stack, stack_shapes, take_piece
from grokjax.checkpoint.formats.manifest import UNFINISHED, Manifest
from grokjax.checkpoint.formats.orbax import commit, prepare_units, write_unit
from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.mapping import check_expression, check_layers, check_sources, map_parameters, stack_name
from grokjax.checkpoint.stored import (
    ArraySpec,
    Checkpoint,
    CheckpointError,
    Piece,
    TensorSpec,
    parameter_shapes,
    units_of,
)
from grokjax.config import GrokConfig
from grokjax.distributed import on_first
from grokjax.model import Grok, abstract_model, check_dtype, init_parameters, parameter_name, with_quantized_table
from grokjax.quantization import QuantizedArray, QuantizedTable, Weight, partition_specs
from grokjax.sharding import MESH_AXES, Partitioner, ShardingRules

HOST_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far loading, saving or converting has come.

    Attributes:
      parameter: the path that was just finished, an expert's number behind it.
      source: the checkpoint's path that it was read from; None where it keeps its fresh value.
      done_bytes: so far, of the checkpoint's bytes.
      total_bytes: in all.
    """

    parameter: str
    source: str | None
    done_bytes: int
    total_bytes: int


Report = Callable[[Progress], None]


def load(
    path: str | Path,
    config: GrokConfig | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    quantized_table: bool = False,
    rules: ShardingRules | None = None,
    layers: Sequence[int] | None = None,
    rename: Sequence[tuple[str, str]] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    max_host_bytes: int = HOST_BYTES,
    progress: Report | None = None,
) -> Grok:
    """Reads a checkpoint of any layout into a sharded model, whatever mesh it was written from.

    Every device is given its own slice of one matrix at a time: the host needs no more memory than that, and no device
    ever holds another's. Files of the release are mapped, never unpickled.

    Args:
      path: the folder of the release's files or its parent, of safetensors files, or of `grokjax.json`.
      config: the sizes; without it they are the checkpoint's, which the files of the release only tell for Grok-1.
      mesh: from `make_mesh`; one device by default.
      dtype: compute dtype and dtype of the plain weights, float32 or bfloat16. int8 weights and their scales stay as
        they are, norms and router are float32.
      quantized_table: makes the embedding table int8, with a scale for each token, once it is on the devices; see
        docs/model.md for its error. `save` does not take such a model.
      rules: sharding rules; tensor parallel by default.
      layers: numbers of the checkpoint's layers to use, in this order; all by default. The model has as many layers.
      rename: pairs of a regular expression and its replacement. The first that is found in a parameter's path (as in
        docs/model.md, with the layer's number: `layers.3.attention.query`) turns it into the checkpoint's path. With
        rules, or with `layers`, parameters of the checkpoint may be left unused; otherwise that is an error.
      exclude: regular expressions; a parameter in whose path one is found keeps its fresh random value.
      seed: of the fresh values.
      max_host_bytes: what reading may hold on the host at once; one matrix is always allowed.
      progress: called after each piece, and first for each parameter that keeps its fresh value.

    Raises:
      CheckpointError: There is no checkpoint, it is damaged, or it does not fit the model: every mismatch is listed.
      ValueError: The mesh, the rules, the layers or the dtype do not fit the configuration.

    Source: `layers`, `rename` and `exclude` do what the release's `runners.py` and `checkpoint.py` call rename and
    exclude rules.
    """
    check_dtype(dtype)
    checkpoint = open_checkpoint(path, config)
    config = checkpoint.config if config is None else config
    chosen = range(config.num_layers) if layers is None else check_layers(layers, checkpoint.config)
    config = config.replace(num_layers=len(chosen))
    partitioner = Partitioner.create(config, mesh, rules)
    sources = map_parameters(config, chosen, rename, exclude)
    check_sources(checkpoint, sources, parameter_shapes(config), may_leave=[""] if layers or rename else exclude)

    graphdef, state = nnx.split(abstract_model(config, partitioner, dtype=dtype, quantized=False))
    params = nnx.to_flat_state(state)
    stacks = [_stack(path, param, sources) for path, param in params]
    fresh = _fresh(config, partitioner, dtype, seed, stacks, checkpoint)
    reporter = _Reporter(checkpoint, sources, progress)
    values = Builder(checkpoint, partitioner, max_host_bytes).build(stacks, fresh, reporter)
    filled = [(path, param.replace(values[parameter_name(path)])) for path, param in params]
    model = nnx.merge(graphdef, nnx.from_flat_state(filled))
    return with_quantized_table(model) if quantized_table else model


def load_parameters(
    path: str | Path,
    patterns: Sequence[str],
    config: GrokConfig | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    rules: ShardingRules | None = None,
    max_host_bytes: int = HOST_BYTES,
) -> dict[str, Weight]:
    r"""Reads some parameters of a checkpoint and nothing else.

    Args:
      path: a checkpoint of any layout.
      patterns: regular expressions; a parameter is read if one matches its whole path, as in `layers\.3\..*`.
      config: as for `load`.
      mesh: as for `load`.
      dtype: of plain weights; norms and router are float32.
      rules: as for `load`.
      max_host_bytes: as for `load`.

    Returns:
      The checkpoint's path -> the parameter in its shards, without a layer axis; experts are [E, C, O].

    Raises:
      CheckpointError: As for `load`.
      ValueError: A pattern matches no parameter.
    """
    check_dtype(dtype)
    checkpoint = open_checkpoint(path, config)
    partitioner = Partitioner.create(checkpoint.config, mesh, rules)
    for pattern in patterns:
        check_expression(pattern)
        if not any(re.fullmatch(pattern, parameter) for parameter in checkpoint.tensors):
            raise ValueError(
                f"{pattern!r} matches no parameter: docs/model.md lists them; layers.0 is the first layer."
            )
    wanted = [name for name in checkpoint.tensors if any(re.fullmatch(pattern, name) for pattern in patterns)]
    one_layer = checkpoint.config.replace(num_layers=1)
    state = nnx.split(abstract_model(one_layer, partitioner, dtype=dtype, quantized=False))[1]
    params = {parameter_name(path): param for path, param in nnx.to_flat_state(state)}
    stacks = []
    for name in wanted:
        param = params[re.sub(r"layers\.\d+\.", "layers.", name)]
        value = param.get_value()
        stacks.append(Stack(name, value.shape, value.dtype, param.logical_axes, (name,)))
    values = Builder(checkpoint, partitioner, max_host_bytes).build(stacks, {})
    return {
        stack.name: jax.tree.map(lambda leaf: leaf[0], values[stack.name]) if stack.is_layered else values[stack.name]
        for stack in stacks
    }


def save(model: Grok, path: str | Path, *, progress: Report | None = None) -> None:
    """Writes a model as a checkpoint of ours, which `load` restores onto any mesh.

    The host holds one matrix at a time. Until all is written the folder is no checkpoint, and `load` says so. If the
    model spans processes, all of them call it, and each writes its own shards.

    Args:
      model: on any mesh.
      path: a folder that does not exist yet, on a disk that all processes share.
      progress: called after each unit.

    Raises:
      CheckpointError: The folder exists, cannot be written, or the disk is full.
      ValueError: The model's embedding table is int8.
    """
    if isinstance(model.embedding.table.get_value(), QuantizedTable):
        raise ValueError(
            "the embedding table is int8, and checkpoints hold it plain: save the model made without quantized_table."
        )
    folder = Path(path).absolute()
    values = {parameter_name(path): param for path, param in nnx.to_flat_state(nnx.split(model)[1])}
    specs = {name: _saved_spec(values, name, shape) for name, shape in parameter_shapes(model.config).items()}
    manifest = Manifest(model.config, specs, {"made_by": "save"})
    done, total = 0, sum(spec.num_bytes for spec in specs.values())
    together = model.partitioner.mesh.is_multi_process
    on_first(f"the beginning of {folder}", lambda: _begin(folder, manifest, total), together=together)
    for unit in units_of(model.config):
        write_unit(folder, unit.name, {piece.name: _take(values, piece) for piece in unit.pieces})
        done += sum(specs[piece.parameter].piece(piece).num_bytes for piece in unit.pieces)
        if progress is not None:
            progress(Progress(unit.name, unit.name, done, total))
    on_first(f"the end of {folder}", lambda: commit(folder), together=together)


def _begin(folder: Path, manifest: Manifest, num_bytes: int) -> None:
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already: choose another path, or remove it first.")
    check_room(folder, num_bytes)
    make_folder(folder)
    manifest.write(folder, UNFINISHED)
    prepare_units(folder, manifest)


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuses to begin what the disk has no room for.

    Raises:
      CheckpointError: So many bytes are not free.
    """
    free = free_bytes(folder)
    if num_bytes > free:
        raise CheckpointError(
            f"{folder}: {num_bytes / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free: "
            "make room or choose another disk."
        )


def free_bytes(folder: Path) -> int:
    """Free on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents.

    Raises:
      CheckpointError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be made ({error.strerror}): choose a path that you may write."
        ) from error


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, told without loading it.

    Attributes:
      path: its folder.
      layout: `release`, `safetensors` or `orbax`.
      config: the sizes.
      specs: the checkpoint's path -> shapes and dtypes.
    """

    path: Path
    layout: str
    config: GrokConfig
    specs: dict[str, TensorSpec]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(spec.num_bytes for spec in self.specs.values())

    @property
    def num_parameters(self) -> int:
        """Weights, scales not counted."""
        return sum(math.prod(spec.weight.shape) for spec in self.specs.values())

    def bytes_per_device(
        self,
        mesh: tuple[int, int] = (1, 1),
        *,
        rules: ShardingRules | None = None,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> int:
        """Bytes of the parameters on each device after `load` onto a mesh of (data, model) devices; none are needed.

        Raises:
          ValueError: The mesh or the rules do not fit the configuration, or the dtype is not a compute dtype.
        """
        partitioner = Partitioner.create(self.config, AbstractMesh(mesh, MESH_AXES), rules)  # type: ignore[arg-type]  # sizes and names are all it is asked for
        state = nnx.split(abstract_model(self.config, partitioner, dtype=dtype, quantized=False))[1]
        stacks = [_stack(path, param, {name: name for name in self.specs}) for path, param in nnx.to_flat_state(state)]
        total = 0
        for stack in stacks:
            shapes = stack_shapes(stack, self.specs, partitioner)
            shardings = partitioner.shardings(partition_specs(shapes, stack.axes, partitioner))
            for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
                total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        return total


def describe(path: str | Path, config: GrokConfig | None = None) -> CheckpointInfo:
    """Reads names, shapes and dtypes of a checkpoint of any layout; the arguments and errors are those of `load`."""
    checkpoint = open_checkpoint(path, config)
    specs = {name: TensorSpec.of(tensor) for name, tensor in checkpoint.tensors.items()}
    return CheckpointInfo(checkpoint.path, checkpoint.layout, checkpoint.config, specs)


def _stack(path: tuple[Any, ...], param: nnx.Variable, sources: dict[str, str | None]) -> Stack:
    name, value = parameter_name(path), param.get_value()
    own = tuple(source for parameter, source in sources.items() if stack_name(parameter) == name)
    return Stack(name, value.shape, value.dtype, param.logical_axes, own)


def _fresh(
    config: GrokConfig,
    partitioner: Partitioner,
    dtype: DTypeLike,
    seed: int,
    stacks: Sequence[Stack],
    checkpoint: Checkpoint,
) -> dict[str, Weight]:
    """Random values of the stacks that keep some, int8 where their other layers are, or else any of the checkpoint."""
    any_int8 = any(tensor.scales is not None for tensor in checkpoint.tensors.values())
    names: dict[bool, list[str]] = {True: [], False: []}
    for stack in stacks:
        found = [checkpoint.tensors[source].scales is not None for source in stack.sources if source is not None]
        if None in stack.sources:
            names[found[0] if found else any_int8].append(stack.name)
    values: dict[str, Weight] = {}
    for quantized, wanted in names.items():
        if wanted:
            values |= init_parameters(
                config, partitioner, seed=seed, dtype=dtype, quantized=quantized, names=frozenset(wanted)
            )
    return values


class _Reporter:
    """Turns placed pieces into `Progress`."""

    def __init__(self, checkpoint: Checkpoint, sources: dict[str, str | None], progress: Report | None):
        self.progress, self.done = progress, 0
        self.specs = {name: TensorSpec.of(tensor) for name, tensor in checkpoint.tensors.items()}
        self.total = sum(self.specs[source].num_bytes for source in sources.values() if source is not None)
        for parameter in [parameter for parameter, source in sources.items() if source is None]:
            self._report(parameter, None)

    def __call__(self, slot: Slot) -> None:
        piece = slot.piece
        self.done += self.specs[piece.parameter].piece(piece).num_bytes
        name = (
            slot.stack.name.replace("layers.", f"layers.{slot.at[0]}.", 1) if slot.stack.is_layered else slot.stack.name
        )
        self._report(Piece(name, piece.expert).name, piece.name)

    def _report(self, parameter: str, source: str | None) -> None:
        if self.progress is not None:
            self.progress(Progress(parameter, source, self.done, self.total))


def _saved_spec(values: dict[str, nnx.Variable], name: str, shape: tuple[int, ...]) -> TensorSpec:
    value: Weight = values[stack_name(name)].get_value()
    if not isinstance(value, QuantizedArray):
        return TensorSpec(ArraySpec(shape, value.dtype), None)
    scales = (*shape[:-2], value.num_blocks, shape[-1])
    return TensorSpec(ArraySpec(shape, value.weight.dtype), ArraySpec(scales, value.scales.dtype))


def _take(values: dict[str, nnx.Variable], piece: Piece) -> dict[str, jax.Array]:
    """The arrays of one piece of a model, in their shards."""
    param = values[stack_name(piece.parameter)]
    value: Weight = param.get_value()
    if piece.layer is not None:
        at = (piece.layer, piece.expert or 0) if param.logical_axes[1] == "experts" else (piece.layer,)
        value = take_piece(value, jnp.asarray(at, jnp.int32), len(at))
    if isinstance(value, QuantizedArray):
        return {"weight": value.weight, "scales": value.scales}
    return {"weight": value}
