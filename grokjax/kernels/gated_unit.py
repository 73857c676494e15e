"""The gated unit of an expert: its activation is written here, once, for every form of the product."""

from collections.abc import Callable, Sequence

import jax

from grokjax.quantization import Weight

GatedWeights = tuple[Weight, Weight, Weight]


def gated_unit(
    x: jax.Array, weights: GatedWeights, multiply: Callable[[jax.Array, Sequence[Weight]], list[jax.Array]]
) -> jax.Array:
    """`(gelu(x @ gate) * (x @ up)) @ down` with the tanh form of GELU.

    Args:
      x: [..., D] in the compute dtype.
      weights: gate and up [*stack, D, F] and down [*stack, F, D].
      multiply: the product of activations with some weights, or with a part of their stacks; float32 for each.

    Returns:
      float32 [..., D].
    """
    gate, up, down = weights
    inputs, factors = multiply(x, (gate, up))
    hidden = activate(inputs, factors)
    return multiply(hidden.astype(x.dtype), (down,))[0]


def activate(inputs: jax.Array, factors: jax.Array) -> jax.Array:
    """What the unit makes of its two first products [..., F]: the tanh form of GELU of one, times the other."""
    return jax.nn.gelu(inputs, approximate=True) * factors
