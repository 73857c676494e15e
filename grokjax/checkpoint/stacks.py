"""The stacked parameters of a model, and which part of a checkpoint has its place where in them."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from grokjax.checkpoint.mapping import check_quantized, is_found
from grokjax.checkpoint.parameters import Part, stack_name
from grokjax.checkpoint.stored import Shaped, StoredTensor, TensorSpec
from grokjax.model import Grok, named_parameters
from grokjax.quantization import QuantizedArray, partition_specs, shardable_blocks
from grokjax.sharding import Axes, Partitioner, device_bytes, with_shardings

Tensor = StoredTensor | TensorSpec


@dataclasses.dataclass(frozen=True)
class Stack:
    """One parameter of the model, and where its layers come from.

    Attributes:
      name: path without the layer, such as `layers.feed_forward.gate` or `embedding.table`.
      shape: [L, ...] for a parameter of the layers.
      dtype: of plain values; scales keep the checkpoint's dtype.
      axes: logical axes, one for each dimension.
      sources: the checkpoint's path of each layer, None where it keeps its fresh value; one entry without layers.
      keeps_int8: whether what the checkpoint has in int8 stays so, or becomes plain.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: Axes
    sources: tuple[str | None, ...]
    keeps_int8: bool = True

    @classmethod
    def of(cls, name: str, param: nnx.Variable, sources: tuple[str | None, ...], *, keeps_int8: bool = True) -> Self:
        """The stack of a parameter of an abstract model."""
        value = param.get_value()
        return cls(name, value.shape, value.dtype, param.logical_axes, sources, keeps_int8)

    def of_layer(self, number: int) -> "Stack":
        """One layer of a stack that has a layer axis."""
        return dataclasses.replace(self, shape=(1, *self.shape[1:]), sources=self.sources[number : number + 1])

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
        """Leading axes that a part does not have."""
        return self.is_layered + self.has_experts


@dataclasses.dataclass(frozen=True)
class Placement:
    """A part of the checkpoint and its place in the model.

    Attributes:
      part: of the checkpoint.
      stack: that it belongs to.
      at: the numbers of the model's layer and of the expert, of those that the stack has.
    """

    part: Part
    stack: Stack
    at: tuple[int, ...]

    @property
    def parameter(self) -> str:
        """The model's path of the part, with the layer's number, and the expert's behind it."""
        layer = f"layers.{self.at[0]}." if self.stack.is_layered else ""
        return Part(layer + self.stack.name.removeprefix("layers."), self.part.expert).name


def stacks_of(model: Grok, sources: Mapping[str, str | None], quantized: bool | Sequence[str]) -> list[Stack]:
    """The parameters of an abstract model.

    Args:
      model: of `abstract_model`.
      sources: each of its parameters, with the layer's number -> the checkpoint's path, or None.
      quantized: as for `load`.

    Raises:
      ValueError: `quantized` is none of what `load` takes.
    """
    check_quantized(quantized)
    stacks = []
    for name, param in named_parameters(model).items():
        own = tuple(source for parameter, source in sources.items() if stack_name(parameter) == name)
        keeps_int8 = quantized if isinstance(quantized, bool) else is_found(name, quantized)
        stacks.append(Stack.of(name, param, own, keeps_int8=keeps_int8))
    return stacks


def bytes_of_stacks(stacks: Iterable[Stack], tensors: Mapping[str, Tensor], partitioner: Partitioner) -> int:
    """Bytes of some stacks on each device; one that keeps its fresh value counts as plain."""
    leaves: list[Any] = []
    for stack in stacks:
        shapes = stack_shapes(stack, tensors, partitioner)
        shardings = partitioner.shardings(partition_specs(shapes, stack.axes, partitioner))
        leaves += jax.tree.leaves(with_shardings(shapes, shardings))
    return device_bytes(leaves)


def stack_shapes(stack: Stack, tensors: Mapping[str, Tensor], partitioner: Partitioner) -> Any:
    """The stack as `jax.ShapeDtypeStruct`s, its scale blocks fit for all layers and the mesh."""
    chosen = [tensors[source] for source in stack.sources if source is not None]
    scales: list[Shaped] = [tensor.scales for tensor in chosen if tensor.scales is not None]
    if not scales or not stack.keeps_int8:
        return jax.ShapeDtypeStruct(stack.shape, stack.dtype)
    blocks = math.lcm(*(array.shape[-2] for array in scales))
    blocks = shardable_blocks(blocks, stack.axes, partitioner)
    dtype = functools.reduce(np.promote_types, (array.dtype for array in scales))
    leaves: list[Any] = [
        jax.ShapeDtypeStruct(stack.shape, jnp.int8),
        jax.ShapeDtypeStruct((*stack.shape[:-2], blocks, stack.shape[-1]), dtype),
    ]
    return QuantizedArray(*leaves)
