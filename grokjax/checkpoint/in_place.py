"""On CPUs weights are read straight into the memory where they stay: nothing is copied, and no zeros come first."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from grokjax.checkpoint.stacks import Placement, Stack, stack_shapes
from grokjax.checkpoint.stored import Array, Checkpoint, StoredArray, aligned_empty
from grokjax.quantization import Weight, partition_specs
from grokjax.sharding import Partitioner

# Of an array that changes its dtype, so much is read at once.
_CAST_BYTES = 16 << 20

# Gives memory for an array of a shape and dtype, as `aligned_empty` does.
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]


def allocate_again(held: list[Array], allocate_new: Allocate = aligned_empty) -> Allocate:
    """What gives the memory that is held, array by array, to what has no use any more for what it took before.

    Pages that a process has not used yet must first be cleared, which takes the system as long as reading into them.

    Args:
      held: what was given before, in this order; what is new is added.
      allocate_new: gives what is new.
    """
    numbers = itertools.count()

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        number = next(numbers)
        if number == len(held) or (held[number].shape, held[number].dtype) != (shape, dtype):
            held[number:] = [allocate_new(shape, dtype)]
        return held[number]

    return allocate


def can_be_in_place(stack: Stack, checkpoint: Checkpoint, partitioner: Partitioner) -> bool:
    """Whether a stack lies on CPUs and all of it comes from the checkpoint, as int8 where it is int8 there."""
    tensors = [None if source is None else checkpoint.tensors[source] for source in stack.sources]
    return partitioner.platform == "cpu" and all(
        tensor is not None and (tensor.scales is None or stack.keeps_int8) for tensor in tensors
    )


class InPlace:
    """One stack in host memory, filled part by part, of which CPU devices then make their arrays without a copy.

    Args:
      stack: one that `can_be_in_place`.
      checkpoint: of any layout.
      partitioner: mesh and rules.
      allocate: gives the memory.
    """

    def __init__(self, stack: Stack, checkpoint: Checkpoint, partitioner: Partitioner, allocate: Allocate):
        self._tensors = checkpoint.tensors
        shapes = stack_shapes(stack, checkpoint.tensors, partitioner)
        places = partitioner.shardings(partition_specs(shapes, stack.axes, partitioner))
        self._value: Any = jax.tree.map(functools.partial(_Shards, allocate), shapes, places)

    def read(self, placement: Placement) -> None:
        """Reads one part into its place. Threads may read different parts at once.

        Raises:
          CheckpointError: It is missing, damaged, or was changed since the checkpoint was opened.
        """
        tensor, part = self._tensors[placement.part.parameter], placement.part.index
        if tensor.scales is None:
            self._value.read(tensor.weight, part, placement.at)
        else:
            self._value.weight.read(tensor.weight, part, placement.at)
            self._value.scales.read(tensor.scales, part, placement.at)

    def finish(self) -> Weight:
        """The parameter, whose memory is that which was read into."""
        value: Weight = jax.tree.map(_Shards.finish, self._value)
        return value


_Bounds = tuple[tuple[int, int], ...]


class _Shards:
    """Memory for each different shard of an array that a device of this process holds."""

    def __init__(self, allocate: Allocate, shape: jax.ShapeDtypeStruct, sharding: NamedSharding):
        self._shape, self._sharding = shape.shape, sharding
        self._bounds: dict[jax.Device, _Bounds] = {
            device: tuple(entry.indices(size)[:2] for entry, size in zip(index or (), shape.shape, strict=True))
            for device, index in sharding.addressable_devices_indices_map(shape.shape).items()
        }
        self._memory = {
            bounds: allocate(tuple(stop - start for start, stop in bounds), shape.dtype)
            for bounds in self._bounds.values()
        }

    def read(self, stored: StoredArray, part: tuple[int, ...], at: tuple[int, ...]) -> None:
        """Reads a part of a stored array into the place `at` of the stack, wherever a device holds some of it."""
        for bounds, memory in self._memory.items():
            stacked, inner = bounds[: len(at)], bounds[len(at) :]
            if all(start <= number < stop for number, (start, stop) in zip(at, stacked, strict=True)):
                out = memory[tuple(number - start for number, (start, _) in zip(at, stacked, strict=True))]
                _read(stored, part, inner, self._shape[len(at) :], out)

    def finish(self) -> jax.Array:
        """The array, of which each device uses its memory as it lies there."""
        shards = [jax.device_put(self._memory[bounds], device) for device, bounds in self._bounds.items()]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


def _read(stored: StoredArray, part: tuple[int, ...], bounds: _Bounds, shape: tuple[int, ...], out: Array) -> None:
    """Reads a region of a part into `out`, cast to its dtype, scales repeated where `shape` asks for more blocks."""
    rows, *others = [slice(start, stop) for start, stop in bounds]
    repeats = shape[0] // stored.shape[len(part)]
    if repeats > 1:
        scales = stored.read((*part, slice(None), *others))
        out[...] = scales.repeat(repeats, axis=0)[rows]
    elif stored.dtype == out.dtype:
        stored.read_into(out, (*part, rows, *others))
    else:
        step = max(1, _CAST_BYTES * len(out) // out.nbytes)
        for start in range(0, len(out), step):
            first = rows.start + start
            taken = slice(first, min(first + step, rows.stop))
            out[start : start + step] = stored.read((*part, taken, *others))
