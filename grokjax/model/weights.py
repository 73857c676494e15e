"""Stacked weights: random ones, and those of one layer as it uses them, gathered where they are split."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
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
        draw = functools.partial(random_normal, shape=shape[1:], dtype=dtype, deviation=deviation)
        return Parameter(lax.map(draw, jax.random.split(rngs.params(), shape[0])), logical_axes=axes)
    draw = functools.partial(_in_parts, _random_int8, shape=shape[1:])
    weight = lax.map(draw, jax.random.split(rngs.params(), shape[0]))
    uniform_deviation = (127 * 128 / 3) ** 0.5  # of the integers -127 ... 127
    scales = jnp.full((*shape[:-2], 1, shape[-1]), deviation / uniform_deviation, jnp.bfloat16)
    return Parameter(QuantizedArray(weight, scales), logical_axes=axes)


def random_normal(key: jax.Array, *, shape: tuple[int, ...], dtype: DTypeLike, deviation: float) -> jax.Array:
    """Normal numbers [..., C, O] of a deviation, in bfloat16 of 256 values, as many as one random byte tells apart."""
    draw = _normal_of_bytes if jnp.dtype(dtype) == jnp.bfloat16 else functools.partial(jax.random.normal, dtype=dtype)
    return _in_parts(draw, key, shape=shape) * jnp.asarray(deviation, dtype)


# Numbers that are drawn at once: their words stay in a processor's cache, and take little memory beside the result.
_PART = 1 << 22
# An axis of a part can be split evenly over so many devices, and over any number that divides it.
_DEVICES = 64


def _in_parts(draw: Callable[..., jax.Array], key: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    """`draw(key, shape)` for an array [..., C, O], if it is large in parts, of which each has numbers of every device.

    Of n parts each is every n-th row, or column where the rows give no even share to every device.
    """
    wanted = 1 << (max(1, math.prod(shape) // _PART) - 1).bit_length()
    for axis in (-2, -1):
        num_parts = math.gcd(wanted, shape[axis] // _DEVICES)
        if num_parts > 1 and shape[axis] % _DEVICES == 0:
            part = list(shape)
            part[axis] //= num_parts
            parts = lax.map(functools.partial(draw, shape=tuple(part)), jax.random.split(key, num_parts))
            return jnp.moveaxis(parts, 0, axis).reshape(shape)
    return draw(key, shape)


def _normal_of_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal bfloat16 numbers, each the middle of one of 256 parts that are as likely as each other."""

    def normal(numbers: jax.Array) -> jax.Array:
        uniform = (numbers.astype(jnp.float32) - 127.5) / 128
        return (lax.erf_inv(uniform) * math.sqrt(2)).astype(jnp.bfloat16)

    def looked_up(numbers: jax.Array) -> jax.Array:
        return normal(jnp.arange(256, dtype=jnp.uint8))[numbers]

    return lax.platform_dependent(_random_bytes(key, shape, jnp.uint8), cpu=looked_up, default=normal)


def _random_int8(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform integers -127 ... 127."""
    return jnp.maximum(_random_bytes(key, shape, jnp.int8), -127)


def _random_bytes(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Random bytes, four from each random word: large models are made of many."""
    *lead, last = shape
    words = jax.random.bits(key, (*lead, -(-last // 4)), jnp.uint32)
    return lax.bitcast_convert_type(words, dtype).reshape(*lead, -1)[..., :last]


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
