"""Builds the model's stacked, sharded parameters from the parts of a checkpoint, and takes them apart again."""

import functools
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from grokjax.checkpoint.in_place import Allocate, InPlace, can_be_in_place
from grokjax.checkpoint.parameters import Part, parts_of, stack_name
from grokjax.checkpoint.progress import Report, Tally
from grokjax.checkpoint.stacks import Placement, Stack, stack_shapes
from grokjax.checkpoint.stored import Checkpoint, Shards, Targets, TensorSpec, aligned_empty, specs_of
from grokjax.model import Grok, init_parameters, named_parameters, with_values
from grokjax.quantization import QuantizedArray, Weight, dequantize, partition_specs, shardable_blocks
from grokjax.sharding import Axes, Partitioner, with_shardings, zeros

# Threads that read into place: enough to keep a disk busy, and the cores that copy from the page cache.
_READERS = 4


class Builder:
    """Fills stacks part by part: on the host there is one part, on a device never more than its own share.

    Args:
      checkpoint: of any layout.
      partitioner: mesh and rules.
      max_host_bytes: what reading may hold on the host at once; a single array is always allowed.
    """

    def __init__(self, checkpoint: Checkpoint, partitioner: Partitioner, max_host_bytes: int):
        self.checkpoint, self.partitioner, self.max_host_bytes = checkpoint, partitioner, max_host_bytes

    def build_model(
        self,
        abstract: Grok,
        sources: Mapping[str, str | None],
        stacks: Sequence[Stack],
        *,
        seed: int,
        progress: Report | None,
    ) -> Grok:
        """The model of an abstract one.

        Args:
          abstract: of `abstract_model`, with plain weights.
          sources: each of its parameters, with the layer's number -> the checkpoint's path, None for a fresh value.
          stacks: of these, from `stacks_of`.
          seed: of the fresh values.
          progress: called after each part, and first for each fresh value.
        """
        specs = specs_of(self.checkpoint)
        total_bytes = sum(specs[source].num_bytes for source in sources.values() if source is not None)
        tally = Tally("loaded", total_bytes, progress)
        for parameter in [parameter for parameter, source in sources.items() if source is None]:
            tally.add(0, parameter, None)
        return with_values(abstract, self._build(stacks, self._fresh(abstract, stacks, seed), tally))

    def build_parameters(self, one_layer: Grok, names: Sequence[str]) -> dict[str, Weight]:
        """Some of the checkpoint's parameters by its paths, without a layer axis.

        Args:
          one_layer: of `abstract_model`, with the checkpoint's sizes but for a single layer.
          names: the checkpoint's paths.
        """
        params, specs = named_parameters(one_layer), specs_of(self.checkpoint)
        stacks = [Stack.of(name, params[stack_name(name)], (name,)) for name in names]
        values = self._build(stacks, {}, Tally("loaded", sum(specs[name].num_bytes for name in names), None))
        layered = {stack.name for stack in stacks if stack.is_layered}
        return {
            name: jax.tree.map(lambda leaf: leaf[0], value) if name in layered else value
            for name, value in values.items()
        }

    def _build(self, stacks: Sequence[Stack], fresh: dict[str, Weight], tally: Tally) -> dict[str, Weight]:
        """The values of all `stacks` by name; those of layers start as what `fresh` has, else as zeros."""
        in_place = [stack for stack in stacks if can_be_in_place(stack, self.checkpoint, self.partitioner)]
        others = [stack for stack in stacks if stack not in in_place]
        return self.build_in_place(in_place, tally) | self._build_from_parts(others, fresh, tally)

    def build_in_place(
        self,
        stacks: Sequence[Stack],
        tally: Tally,
        allocate: Allocate = aligned_empty,
        *,
        experts: Collection[int] | None = None,
    ) -> dict[str, Weight]:
        """The values of some stacks, all of the checkpoint and int8 where it is, each read into host memory as a whole.

        It runs no program, so any thread may call it. On CPUs that memory is the devices'; others are sent copies.

        Args:
          stacks: of which parameters.
          tally: told of each part.
          allocate: gives the host memory.
          experts: of stacks of experts, the only ones to read; memory of the others stays as it is given. None for all.
        """
        values = {stack.name: InPlace(stack, self.checkpoint, self.partitioner, allocate) for stack in stacks}
        placements = [placement for stack in stacks for placement in self._placements(stack)]
        if experts is not None:
            placements = [placement for placement in placements if placement.part.expert in experts]
        with ThreadPoolExecutor(_READERS) as readers:
            reads = [readers.submit(values[placement.stack.name].read, placement) for placement in placements]
            try:
                for placement, read in zip(placements, reads, strict=True):
                    read.result()
                    self._tell(tally, placement)
            except BaseException:
                readers.shutdown(cancel_futures=True)
                raise
        return {name: value.finish() for name, value in values.items()}

    def _build_from_parts(self, stacks: Sequence[Stack], fresh: dict[str, Weight], tally: Tally) -> dict[str, Weight]:
        values: dict[str, Weight] = {}
        placements: dict[str, list[Placement]] = {}
        for stack in stacks:
            values[stack.name] = self._start(stack, fresh.get(stack.name))
            for placement in self._placements(stack):
                placements.setdefault(placement.part.unit, []).append(placement)
        for unit, members in placements.items():
            for placement, arrays in zip(members, self._read(unit, members), strict=True):
                value = values.pop(placement.stack.name)
                # Waiting keeps one unit, not many, in the host's memory.
                values[placement.stack.name] = jax.block_until_ready(self._put(value, arrays, placement))
                self._tell(tally, placement)
        return values

    def _tell(self, tally: Tally, placement: Placement) -> None:
        tally.add(self._stored(placement.part).num_bytes, placement.parameter, placement.part.name)

    def _stored(self, part: Part) -> TensorSpec:
        return TensorSpec.of(self.checkpoint.tensors[part.parameter]).part(part)

    def _fresh(self, model: Grok, stacks: Sequence[Stack], seed: int) -> dict[str, Weight]:
        """Random values of the stacks that keep some: int8 where their other layers are, or any of the checkpoint."""
        tensors = self.checkpoint.tensors
        any_int8 = any(tensor.scales is not None for tensor in tensors.values())
        names: dict[bool, list[str]] = {True: [], False: []}
        for stack in stacks:
            found = [tensors[source].scales is not None for source in stack.sources if source is not None]
            if None in stack.sources:
                names[stack.keeps_int8 and (found[0] if found else any_int8)].append(stack.name)
        make = functools.partial(init_parameters, model.config, self.partitioner, seed=seed, dtype=model.dtype)
        values: dict[str, Weight] = {}
        for quantized, wanted in names.items():
            if wanted:
                values |= make(quantized=quantized, names=frozenset(wanted))
        return values

    def _placements(self, stack: Stack) -> list[Placement]:
        placements = []
        for layer, source in enumerate(stack.sources):
            for part in parts_of(source, self.checkpoint.config) if source is not None else ():
                expert = (part.expert or 0,) if stack.has_experts else ()
                placements.append(Placement(part, stack, ((layer,) if stack.is_layered else ()) + expert))
        return placements

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
        empty: Weight = zeros(with_shardings(shapes, place))
        return empty

    def _read(self, unit: str, placements: Sequence[Placement]) -> list[Shards]:
        """The parts of one unit on the devices: `weight` and, where it has any, `scales`."""
        wanted = [(placement.part, self._targets(placement)) for placement in placements]
        return self.checkpoint.read_parts(unit, wanted, self.max_host_bytes)

    def _targets(self, placement: Placement) -> Targets:
        """What to read of a part, and which device reads what."""
        stored = self._stored(placement.part)
        spec = _read_spec(self.partitioner, placement.stack, stored.weight.shape)
        dtype = placement.stack.dtype if stored.scales is None else stored.weight.dtype
        targets = {"weight": (stored.weight.shape, dtype, spec)}
        if stored.scales is not None:
            # All rows: how many blocks a device needs depends on the mesh, and they are few.
            targets["scales"] = (stored.scales.shape, stored.scales.dtype, PartitionSpec(None, spec[-1]))
        return {
            leaf: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.partitioner.mesh, spec))
            for leaf, (shape, dtype, spec) in targets.items()
        }

    def _put(self, value: Weight, arrays: Shards, placement: Placement) -> Weight:
        if not placement.stack.is_layered:
            return arrays["weight"]
        part: Weight = QuantizedArray(arrays["weight"], arrays["scales"]) if "scales" in arrays else arrays["weight"]
        at = jnp.asarray(placement.at, jnp.int32)
        return _put_part(value, part, at, axes=placement.stack.axes, partitioner=self.partitioner)


@functools.partial(jax.jit, static_argnames=("num_stacked",))
def take_part(value: Weight, at: jax.Array, num_stacked: int) -> Weight:
    """One part of a stack; `at` is int32 [num_stacked], the place of the part."""

    def take(leaf: jax.Array) -> jax.Array:
        index = (*at, *[jnp.zeros((), at.dtype)] * (leaf.ndim - num_stacked))
        part = lax.dynamic_slice(leaf, index, (1,) * num_stacked + leaf.shape[num_stacked:])
        return part.reshape(leaf.shape[num_stacked:])

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


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("axes", "partitioner"))
def _put_part(value: Weight, part: Weight, at: jax.Array, *, axes: Axes, partitioner: Partitioner) -> Weight:
    """Writes one part into its place in the stack, `at` int32 [1] or [2], plain where the stack is. DONATES `value`."""
    skipped = 2 if axes[1:2] == ("experts",) else 1
    into = partition_specs(value, axes, partitioner)
    if isinstance(part, QuantizedArray):
        blocks, dtype = shardable_blocks(part.num_blocks, axes, partitioner), part.scales.dtype
        if isinstance(value, QuantizedArray):
            blocks, dtype = value.num_blocks, value.scales.dtype
        part = QuantizedArray(part.weight, part.refine(blocks).scales.astype(dtype))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(value.shape[:skipped] + leaf.shape, leaf.dtype), part)
    as_stacked = partition_specs(stacked, axes, partitioner)
    whole = jax.tree.map(lambda spec: PartitionSpec(*spec[skipped:]), as_stacked)

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
        if not isinstance(stacks, QuantizedArray):
            # Here, where each device has its own share: in floats the part is never whole.
            news = dequantize(news, stacks.dtype)
        return jax.tree.map(write, stacks, news)

    written: Weight = partitioner.shard_map(write_all, in_specs=(into, whole), out_specs=into)(value, part)
    return written
