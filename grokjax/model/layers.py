"""What the parts of a decoder layer share beside weights: RMSNorm and RoPE."""

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.config import GrokConfig
from grokjax.model.base import Module, Parameter
from grokjax.sharding import Axes


class RMSNorm(Module):
    """Scales vectors [..., D] to unit root mean square, then by a learnt factor; in float32 inside."""

    def __init__(self, config: GrokConfig, *, num_layers: int | None = None):
        stack = () if num_layers is None else (num_layers,)
        axes: Axes = (None,) if num_layers is None else ("layers", None)
        self.epsilon = config.norm_eps
        self.scale = Parameter(jnp.ones((*stack, config.model_dim), jnp.float32), logical_axes=axes)

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
