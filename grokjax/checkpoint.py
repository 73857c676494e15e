"""Loads checkpoints straight into a model's shards, one tensor at a time."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.model import Grok, abstract_model, check_dtype
from grokjax.quantization import QuantizedArray, Weight, shardable_blocks, specs
from grokjax.release import CheckpointError, Payload, ReleaseCheckpoint, ReleaseTensor, open_release
from grokjax.sharding import Axes, Partitioner, ShardingRules


def load(
    path: str | Path,
    config: GrokConfig | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    rules: ShardingRules | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Grok:
    """Reads the released checkpoint, or one in its format, into a sharded model.

    The files are mapped, never unpickled, and every device is given its own slice of one tensor at a time: the host
    needs no more memory than the slices of a single tensor, and no device ever holds another's.

    Args:
      path: the directory of `tensorNNNNN_000` files, or its parent.
      config: the sizes; without it they are inferred, which only works for the released model.
      mesh: from `make_mesh`; one device by default.
      dtype: compute dtype and dtype of the plain weights, float32 or bfloat16. int8 weights and their scales stay as
        they are, norms and router are float32.
      rules: sharding rules; tensor parallel by default.
      progress: called after each tensor with its parameter path, the bytes read so far and the bytes in all.

    Raises:
      CheckpointError: Files are missing, surplus, damaged, foreign, or do not fit the configuration.
      ValueError: The mesh or the rules do not fit the configuration, or the dtype is not a compute dtype.
    """
    check_dtype(dtype)
    checkpoint = open_release(path, config)
    partitioner = Partitioner.create(checkpoint.config, mesh, rules)

    graphdef, state = nnx.split(abstract_model(checkpoint.config, partitioner, dtype=dtype, quantized=False))
    loader = _Loader(checkpoint, partitioner, progress)
    params = [(path, param.replace(loader.load(path, param))) for path, param in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(params))


class _Loader:
    """Places one parameter after the other, counting bytes."""

    def __init__(
        self,
        checkpoint: ReleaseCheckpoint,
        partitioner: Partitioner,
        progress: Callable[[str, int, int], None] | None,
    ):
        self.checkpoint, self.partitioner, self.progress = checkpoint, partitioner, progress
        self.done, self.total = 0, sum(_num_bytes(tensor) for tensor in checkpoint.tensors.values())

    def load(self, path: tuple[Any, ...], param: nnx.Variable) -> Weight:
        """The value of the model's parameter at `path`: one tensor, or the stack of the tensors of all layers."""
        template: jax.Array = param.get_value()
        if path[0] != "layers":
            name = ".".join(path)
            [value] = self._parts([name], template.shape, template.dtype, param.logical_axes)
            return value
        names = [f"layers.{i}.{'.'.join(path[1:])}" for i in range(self.checkpoint.config.num_layers)]
        stack = None
        for i, part in enumerate(self._parts(names, template.shape[1:], template.dtype, param.logical_axes[1:])):
            stack = self._empty_stack(part, len(names), param.logical_axes) if stack is None else stack
            # Waiting keeps the slices of one tensor, not of many, in the host's memory.
            stack = jax.block_until_ready(_put_layer(stack, part, i))
        assert stack is not None
        return stack

    def _parts(
        self, names: Sequence[str], shape: tuple[int, ...], dtype: np.dtype[Any], axes: Axes
    ) -> Iterator[Weight]:
        tensors = [self.checkpoint.tensors[name] for name in names]
        blocks = self._common_blocks(names, tensors, axes)
        for name, tensor in zip(names, tensors, strict=True):
            yield self._place(tensor, blocks, shape, dtype, axes)
            self.done += _num_bytes(tensor)
            if self.progress is not None:
                self.progress(name, self.done, self.total)

    def _common_blocks(self, names: Sequence[str], tensors: Sequence[ReleaseTensor], axes: Axes) -> int | None:
        """Scale blocks that suit all layers and the mesh; None for plain weights."""
        counts = [tensor.scales.shape[-2] for tensor in tensors if tensor.scales is not None]
        if len(counts) == len(tensors):
            return shardable_blocks(math.lcm(*counts), axes, self.partitioner)
        if counts:
            raise CheckpointError(
                f"{self.checkpoint.path}: of the tensors {names[0]} to {names[-1]} some are quantised and some are "
                "plain: all layers must be alike; quantise the plain ones or restore the int8 files."
            )
        return None

    def _place(
        self,
        tensor: ReleaseTensor,
        blocks: int | None,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        axes: Axes,
    ) -> Weight:
        if tensor.scales is None or blocks is None:
            return _from_file(tensor.weight, shape, self.partitioner.sharding(axes, shape), dtype)
        scales_shape = (*shape[:-2], blocks, shape[-1])
        shapes: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(scales_shape, dtype)]
        abstract = QuantizedArray(*shapes)
        place = self.partitioner.shardings(specs(abstract, axes, self.partitioner))
        copies = blocks // tensor.scales.shape[-2]
        weight = _from_file(tensor.weight, shape, place.weight, np.dtype(np.int8))
        return QuantizedArray(weight, _from_file(tensor.scales, scales_shape, place.scales, copies=copies))

    def _empty_stack(self, part: Weight, num_layers: int, axes: Axes) -> Weight:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((num_layers, *leaf.shape), leaf.dtype), part)
        place = self.partitioner.shardings(specs(shapes, axes, self.partitioner))
        return jax.tree.map(lambda leaf, where: jnp.zeros(leaf.shape, leaf.dtype, device=where), shapes, place)


def _from_file(
    payload: Payload,
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: np.dtype[Any] | None = None,
    copies: int = 1,
) -> jax.Array:
    """An array whose shards are read from the mapped file, cast, and each scale block repeated `copies` times.

    A dense block's weights have no expert axis in the file; `shape` has one of size 1.
    """
    source = payload.array().reshape((*shape[:-2], shape[-2] // copies, shape[-1]) if copies > 1 else shape)

    def read(index: Any) -> np.ndarray:
        if copies > 1:
            *lead, blocks, outputs = index
            wanted = np.arange(shape[-2])[blocks] // copies
            part = source[(*lead, slice(None), outputs)][..., wanted, :]
        else:
            part = source[index]
        return np.ascontiguousarray(part, dtype=dtype)

    return jax.make_array_from_callback(shape, sharding, read)


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack: Weight, part: Weight, layer: int) -> Weight:
    """Writes one layer into the stack in place. DONATES `stack`."""
    return jax.tree.map(lambda leaf, one: lax.dynamic_update_index_in_dim(leaf, one, layer, axis=0), stack, part)


def _num_bytes(tensor: ReleaseTensor) -> int:
    return tensor.weight.num_bytes + (tensor.scales.num_bytes if tensor.scales is not None else 0)
