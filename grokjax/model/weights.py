"""Stacked weights: random ones, and those of one layer as it uses them, gathered where they are split."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.model.base import Parameter
from grokjax.quantization import QuantizedArray, Weight, partition_specs
from grokjax.sharding import Axes, Partitioner


def weight_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, *, dtype: DTypeLike, quantized: bool = False
) -> Parameter:
    """A random weight [L, ..., C, O] that keeps the scale of what it multiplies, its logical axes beside it.

    Plain weights are normal with deviation `C ** -0.5`; quantised ones are born as uniform int8 of that deviation.
    They are drawn layer by layer: the random words of a whole stack would take three times its memory.
    """
    deviation = shape[-2] ** -0.5
    if not quantized:

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, shape[1:], dtype) * jnp.asarray(deviation, dtype)

        return Parameter(lax.map(draw, jax.random.split(rngs.params(), shape[0])), logical_axes=axes)
    weight = lax.map(lambda key: _random_int8(key, shape[1:]), jax.random.split(rngs.params(), shape[0]))
    uniform_deviation = (127 * 128 / 3) ** 0.5  # of the integers -127 ... 127
    scales = jnp.full((*shape[:-2], 1, shape[-1]), deviation / uniform_deviation, jnp.bfloat16)
    return Parameter(QuantizedArray(weight, scales), logical_axes=axes)


def _random_int8(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform integers -127 ... 127, four from each random word: large models are made of many."""
    *lead, last = shape
    words = jax.random.bits(key, (*lead, -(-last // 4)), jnp.uint32)
    weight = lax.bitcast_convert_type(words, jnp.int8).reshape(*lead, -1)[..., :last]
    return jnp.maximum(weight, -127)


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """Some stacked weights as one layer uses them on every device, inside `shard_map`.

    Attributes:
      stacks: the weights [L or 1, ...], no dimension split by the `embed` rule.
      layer: int32 [], the index of the layer in them.
      partition_specs: of each weight, in its own structure.
    """

    stacks: tuple[Weight, ...]
    layer: jax.Array
    partition_specs: tuple[Any, ...]

    @classmethod
    def of(cls, params: Sequence[nnx.Param], layer: jax.Array, partitioner: Partitioner) -> Self:
        """The weights of layer `layer`, int32 [], of parameters that are all stacked over the same layers."""
        stacks, layers = zip(*(_gather_embed(param, layer, partitioner) for param in params), strict=True)
        whole = partitioner.without_embed()
        split = tuple(partition_specs(w, param.logical_axes, whole) for w, param in zip(stacks, params, strict=True))
        return cls(stacks, layers[0], split)


def _gather_embed(param: nnx.Param, layer: jax.Array, partitioner: Partitioner) -> tuple[Weight, jax.Array]:
    """A stacked weight as a layer uses it: no dimension split by the `embed` rule.

    Without that rule this is the stack itself, to be indexed at its use; with it, one layer, cut out and gathered.

    Returns:
      The weight [L or 1, ...] and the index, int32 [], of the layer in it.
    """
    stack: Weight = param.get_value()
    if partitioner.rules.embed is None:
        return stack, layer
    split = partition_specs(stack, param.logical_axes, partitioner)
    whole = partition_specs(stack, param.logical_axes, partitioner.without_embed())

    def cut(stack: Weight, layer: jax.Array) -> Weight:
        one = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer), stack)
        return jax.tree.map(gather, one, split, whole)

    def gather(leaf: jax.Array, split: PartitionSpec, whole: PartitionSpec) -> jax.Array:
        dimensions = [i for i, names in enumerate(zip(split, whole, strict=True)) if names[0] != names[1]]
        return partitioner.all_gather(leaf, "embed", dimension=dimensions[0]) if dimensions else leaf

    # A mere constraint on the layer would spread to the stack, and all layers would be gathered at once.
    run = partitioner.shard_map(cut, in_specs=(split, PartitionSpec()), out_specs=whole)
    return run(stack, layer), jnp.zeros((), jnp.int32)
