"""What the parts of a decoder layer share: random weights, weights gathered where they are split, RMSNorm, RoPE."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.quantization import QuantizedArray, Weight, specs
from grokjax.sharding import Axes, Partitioner


def weight_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, *, dtype: DTypeLike, quantized: bool = False
) -> nnx.Param:
    """A random weight [L, ..., C, O] that keeps the scale of what it multiplies, its logical axes beside it.

    Plain weights are normal with deviation `C ** -0.5`; quantised ones are born as uniform int8 of that deviation.
    They are drawn layer by layer: the random words of a whole stack would take three times its memory.
    """
    deviation = shape[-2] ** -0.5
    if not quantized:

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, shape[1:], dtype) * jnp.asarray(deviation, dtype)

        return nnx.Param(lax.map(draw, jax.random.split(rngs.params(), shape[0])), logical_axes=axes)
    weight = lax.map(lambda key: _random_int8(key, shape[1:]), jax.random.split(rngs.params(), shape[0]))
    uniform_deviation = (127 * 128 / 3) ** 0.5  # of the integers -127 ... 127
    scales = jnp.full((*shape[:-2], 1, shape[-1]), deviation / uniform_deviation, jnp.bfloat16)
    return nnx.Param(QuantizedArray(weight, scales), logical_axes=axes)


def _random_int8(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform integers -127 ... 127, four from each random word: large models are made of many."""
    *lead, last = shape
    words = jax.random.bits(key, (*lead, -(-last // 4)), jnp.uint32)
    levels = lax.bitcast_convert_type(words, jnp.int8).reshape(*lead, -1)[..., :last]
    return jnp.maximum(levels, -127)


def gather_embed(param: nnx.Param, layer: jax.Array, partitioner: Partitioner) -> tuple[Weight, jax.Array]:
    """A stacked weight as a layer uses it: no dimension split by the `embed` rule.

    Without that rule this is the stack itself, to be indexed at its use; with it, one layer, cut out and gathered.

    Returns:
      The weight [L or 1, ...] and the index, int32 [], of the layer in it.
    """
    stack: Weight = param.get_value()
    if partitioner.rules.embed is None:
        return stack, layer
    split = specs(stack, param.logical_axes, partitioner)
    whole = specs(stack, param.logical_axes, partitioner.without_embed())

    def cut(stack: Weight, layer: jax.Array) -> Weight:
        one = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer), stack)
        return jax.tree.map(gather, one, split, whole)

    def gather(leaf: jax.Array, split: PartitionSpec, whole: PartitionSpec) -> jax.Array:
        dimensions = [i for i, names in enumerate(zip(split, whole, strict=True)) if names[0] != names[1]]
        return partitioner.all_gather(leaf, "embed", dimension=dimensions[0]) if dimensions else leaf

    # A mere constraint on the layer would spread to the stack, and all layers would be gathered at once.
    run = partitioner.shard_map(cut, in_specs=(split, PartitionSpec()), out_specs=whole)
    return run(stack, layer), jnp.zeros((), jnp.int32)


class RMSNorm(nnx.Module):
    """Scales vectors [..., D] to unit root mean square, then by a learnt factor; in float32 inside."""

    def __init__(self, config: GrokConfig, *, num_layers: int | None = None):
        stack = () if num_layers is None else (num_layers,)
        axes: Axes = (None,) if num_layers is None else ("layers", None)
        self.epsilon = config.norm_eps
        self.scale = nnx.Param(jnp.ones((*stack, config.model_dim), jnp.float32), logical_axes=axes)

    def __call__(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """Normalises x [..., D]; `layer`, int32 [], picks the factor where the norm is stacked."""
        scale = self.scale[...]
        if layer is not None:
            scale = lax.dynamic_index_in_dim(scale, layer, keepdims=False)
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (wide * lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding in float32, pairing the first half of the features with the second.

    Args:
      x: float32 [B, T, heads, H].
      positions: int32 [B, T].
      base: of the geometric sequence of wavelengths.

    Returns:
      float32 [B, T, heads, H].

    Source: Su et al., RoFormer (arXiv 2104.09864), in the half-split form of GPT-NeoX.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    phases = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]  # [B, T, 1, H / 2]
    cos, sin = jnp.cos(phases), jnp.sin(phases)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
