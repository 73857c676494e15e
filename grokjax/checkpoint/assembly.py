"""Builds the model's stacked, sharded parameters from the pieces of a checkpoint, and takes them apart again."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from grokjax.checkpoint.formats.orbax import OrbaxCheckpoint, read_unit
from grokjax.checkpoint.stored import (
    Checkpoint,
    Piece,
    Shaped,
    StoredArray,
    StoredTensor,
    TensorSpec,
    pieces_of,
    unit_name,
)
from grokjax.quantization import QuantizedArray, Weight, partition_specs, shardable_blocks
from grokjax.sharding import Axes, Partitioner


@dataclasses.dataclass(frozen=True)
class Stack:
    """One parameter of the model, and where its layers come from.

    Attributes:
      name: path without the layer, such as `layers.feed_forward.gate` or `embedding.table`.
      shape: [L, ...] for a parameter of the layers.
      dtype: of plain values; int8 values stay int8, and scales keep the checkpoint's dtype.
      axes: logical axes, one for each dimension.
      sources: the checkpoint's path of each layer, None where it keeps its fresh value; one entry without layers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: Axes
    sources: tuple[str | None, ...]

    @property
    def is_layered(self) -> bool:
        """Whether there is a layer axis."""
        return self.axes[:1] == ("layers",)

    @property
    def has_experts(self) -> bool:
        """Whether an expert axis follows the layer axis."""
        return self.axes[1:2] == ("experts",)

    @property
    def num_stacked(self) -> int:
        """Leading axes that a piece does not have."""
        return self.is_layered + self.has_experts


@dataclasses.dataclass(frozen=True)
class Slot:
    """A piece of the checkpoint and its place in the model."""

    piece: Piece
    stack: Stack
    at: tuple[int, ...]


def stack_shapes(stack: Stack, tensors: Mapping[str, StoredTensor | TensorSpec], partitioner: Partitioner) -> Any:
    """The stack as `jax.ShapeDtypeStruct`s, its scale blocks fit for all layers and the mesh."""
    chosen = [tensors[source] for source in stack.sources if source is not None]
    scales: list[Shaped] = [tensor.scales for tensor in chosen if tensor.scales is not None]
    if not scales:
        return jax.ShapeDtypeStruct(stack.shape, stack.dtype)
    blocks = math.lcm(*(array.shape[-2] for array in scales))
    blocks = shardable_blocks(blocks, stack.axes, partitioner)
    dtype = functools.reduce(np.promote_types, (array.dtype for array in scales))
    leaves: list[Any] = [
        jax.ShapeDtypeStruct(stack.shape, jnp.int8),
        jax.ShapeDtypeStruct((*stack.shape[:-2], blocks, stack.shape[-1]), dtype),
    ]
    return QuantizedArray(*leaves)


class Builder:
    """Fills stacks piece by piece: on the host there is one piece, on a device never more than its own part.

    Args:
      checkpoint: of any layout.
      partitioner: mesh and rules.
      max_host_bytes: what reading may hold on the host at once; a single array is always allowed.
    """

    def __init__(self, checkpoint: Checkpoint, partitioner: Partitioner, max_host_bytes: int):
        self.checkpoint, self.partitioner, self.max_host_bytes = checkpoint, partitioner, max_host_bytes

    def build(
        self, stacks: Iterable[Stack], fresh: dict[str, Weight], placed: Callable[[Slot], None] | None = None
    ) -> dict[str, Weight]:
        """The values of all `stacks` by name.

        Args:
          stacks: what to fill.
          fresh: starting values, by name, of stacks that keep some; the others start as zeros.
          placed: called after each piece.
        """
        values: dict[str, Weight] = {}
        slots: dict[str, list[Slot]] = {}
        for stack in stacks:
            values[stack.name] = self._start(stack, fresh.get(stack.name))
            for slot in self._slots(stack):
                slots.setdefault(unit_name(slot.piece), []).append(slot)
        for unit, members in slots.items():
            for slot, part in zip(members, self._read(unit, members), strict=True):
                value = values.pop(slot.stack.name)
                # Waiting keeps one unit, not many, in the host's memory.
                values[slot.stack.name] = jax.block_until_ready(self._put(value, part, slot))
                if placed is not None:
                    placed(slot)
        return values

    def _slots(self, stack: Stack) -> list[Slot]:
        slots = []
        for layer, source in enumerate(stack.sources):
            for piece in pieces_of(source, self.checkpoint.config) if source is not None else ():
                expert = (piece.expert or 0,) if stack.has_experts else ()
                slots.append(Slot(piece, stack, ((layer,) if stack.is_layered else ()) + expert))
        return slots

    def _start(self, stack: Stack, fresh: Weight | None) -> Weight:
        if fresh is not None and not any(stack.sources):
            return fresh
        shapes = stack_shapes(stack, self.checkpoint.tensors, self.partitioner)
        place = self.partitioner.shardings(partition_specs(shapes, stack.axes, self.partitioner))
        if fresh is not None:
            blocks = shapes.num_blocks if isinstance(shapes, QuantizedArray) else None
            cast = functools.partial(_fit_fresh, blocks=blocks, like=shapes)
            started: Weight = jax.jit(cast, out_shardings=place)(fresh)
            return started
        return jax.tree.map(lambda leaf, where: jnp.zeros(leaf.shape, leaf.dtype, device=where), shapes, place)

    def _read(self, unit: str, slots: Sequence[Slot]) -> list[dict[str, jax.Array]]:
        """The pieces of one unit on the devices: `weight` and, where it has any, `scales`."""
        wanted = [self._targets(slot) for slot in slots]
        if isinstance(self.checkpoint, OrbaxCheckpoint):
            names = [slot.piece.name for slot in slots]
            tree = dict(zip(names, wanted, strict=True))
            manifest = self.checkpoint.manifest
            found = read_unit(self.checkpoint.path, manifest, unit, tree, self.max_host_bytes)
            return [found[name] for name in names]
        return [self._from_file(slot.piece, targets) for slot, targets in zip(slots, wanted, strict=True)]

    def _targets(self, slot: Slot) -> dict[str, jax.ShapeDtypeStruct]:
        """What to read of a piece, and which device reads what."""
        stored = TensorSpec.of(self.checkpoint.tensors[slot.piece.parameter]).piece(slot.piece)
        spec = _read_spec(self.partitioner, slot.stack, stored.weight.shape)
        dtype = slot.stack.dtype if stored.scales is None else stored.weight.dtype
        targets = {"weight": (stored.weight.shape, dtype, spec)}
        if stored.scales is not None:
            # All rows: how many blocks a device needs depends on the mesh, and they are few.
            targets["scales"] = (stored.scales.shape, stored.scales.dtype, PartitionSpec(None, spec[-1]))
        return {
            leaf: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.partitioner.mesh, spec))
            for leaf, (shape, dtype, spec) in targets.items()
        }

    def _from_file(self, piece: Piece, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        tensor = self.checkpoint.tensors[piece.parameter]
        arrays: dict[str, StoredArray | None] = {"weight": tensor.weight, "scales": tensor.scales}
        return {leaf: _from_slices(array, piece, targets[leaf]) for leaf, array in arrays.items() if array is not None}

    def _put(self, value: Weight, part: dict[str, jax.Array], slot: Slot) -> Weight:
        if not slot.stack.is_layered:
            return part["weight"]
        piece: Weight = QuantizedArray(part["weight"], part["scales"]) if "scales" in part else part["weight"]
        at = jnp.asarray(slot.at, jnp.int32)
        return _put_piece(value, piece, at, axes=slot.stack.axes, partitioner=self.partitioner)


@functools.partial(jax.jit, static_argnames=("num_stacked",))
def take_piece(value: Weight, at: jax.Array, num_stacked: int) -> Weight:
    """One piece of a stack; `at` is int32 [num_stacked], the place of the piece."""

    def take(leaf: jax.Array) -> jax.Array:
        index = (*at, *[jnp.zeros((), at.dtype)] * (leaf.ndim - num_stacked))
        piece = lax.dynamic_slice(leaf, index, (1,) * num_stacked + leaf.shape[num_stacked:])
        return piece.reshape(leaf.shape[num_stacked:])

    return jax.tree.map(take, value)


def _fit_fresh(value: Weight, *, blocks: int | None, like: Any) -> Weight:
    if blocks is not None:
        assert isinstance(value, QuantizedArray)
        value = value.refine(blocks)
    return jax.tree.map(lambda leaf, target: leaf.astype(target.dtype), value, like)


def _gathered(partitioner: Partitioner, stack: Stack, shape: tuple[int, ...]) -> int | None:
    """With whole experts on a device: the dimension that its axis reads a share of, and then gathers; None for none."""
    if not stack.has_experts or partitioner.shards("experts") == 1:
        return None
    taken = partitioner.spec(stack.axes[stack.num_stacked :], shape)
    free = [i for i, size in enumerate(shape) if taken[i] is None and size % partitioner.shards("experts") == 0]
    return free[-1] if free else None


def _read_spec(partitioner: Partitioner, stack: Stack, shape: tuple[int, ...]) -> PartitionSpec:
    """Each device reads its own part; where that would be whole experts, all of an axis share the reading of each."""
    names = list(partitioner.spec(stack.axes[stack.num_stacked :], shape))
    shared = _gathered(partitioner, stack, shape)
    if shared is not None:
        names[shared] = partitioner.rules.experts
    return PartitionSpec(*names)


def _from_slices(array: StoredArray, piece: Piece, target: jax.ShapeDtypeStruct) -> jax.Array:
    """An array whose shards are read from the file, each its own slice, and cast."""

    def read(index: Any) -> np.ndarray:
        whole = all(part in (slice(None), slice(0, size)) for part, size in zip(index, target.shape, strict=True))
        data = array.read(piece.index if whole else (*piece.index, *index))
        return data.astype(target.dtype, copy=False)

    return jax.make_array_from_callback(target.shape, target.sharding, read)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("axes", "partitioner"))
def _put_piece(value: Weight, piece: Weight, at: jax.Array, *, axes: Axes, partitioner: Partitioner) -> Weight:
    """Writes one piece into its place in the stack, `at` int32 [1] or [2]. DONATES `value`."""
    if isinstance(value, QuantizedArray):
        assert isinstance(piece, QuantizedArray)
        piece = QuantizedArray(piece.weight, piece.refine(value.num_blocks).scales.astype(value.scales.dtype))
    skipped = 2 if axes[1:2] == ("experts",) else 1
    into = partition_specs(value, axes, partitioner)
    whole = jax.tree.map(lambda spec: PartitionSpec(*spec[skipped:]), into, is_leaf=_is_spec)

    def write(stack: jax.Array, new: jax.Array) -> jax.Array:
        start = [at[0], *[jnp.zeros((), at.dtype)] * (stack.ndim - 1)]
        new = new.reshape((1,) * skipped + new.shape)
        if skipped == 2:
            first = partitioner.index("experts") * stack.shape[1]
            start[1] = jnp.clip(at[1] - first, 0, stack.shape[1] - 1)
            old = lax.dynamic_slice(stack, start, new.shape)
            new = jnp.where(start[1] == at[1] - first, new, old)
        return lax.dynamic_update_slice(stack, new, start)

    def write_all(stacks: Weight, news: Weight) -> Weight:
        return jax.tree.map(write, stacks, news)

    written: Weight = partitioner.shard_map(write_all, in_specs=(into, whole), out_specs=into)(value, piece)
    return written


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
