"""Activations as planes of int8 numbers, so that CPUs multiply integers with integers: int8 weights as they are.

The first plane has the numbers rounded to 1/127 of the row's largest, each further one what is left, 254 times finer.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

# The longest sum of products of a plane, at most 127, and a weight, at least -128, that is sure to fit into int32.
# Grok-1's longest has 32768.
LONGEST_SUM = (2**31 - 1) // (127 * 128)

# Most int8 rows of one product: of more, XLA's CPU backend makes several times slower ones (jax 0.10, with AMX).
_MOST_ROWS = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Planes:
    """Rows [M, C] of activations, each within 2e-5 of its largest element, or 6e-8 with three planes.

    Attributes:
      rows: int8 [P * M, C], one plane of all rows behind the other; from -127 to 127.
      scale: float32 [M, 1], what 1 in the first plane stands for; NaN of a row with NaN or infinity.
    """

    rows: jax.Array
    scale: jax.Array

    def join(self, products: jax.Array) -> jax.Array:
        """What the rows' products [P * M, O] say of the activations: float32 [M, O]."""
        num_rows = len(self.scale)
        parts = products.astype(jnp.float32).reshape(len(self.rows) // num_rows, num_rows, -1)
        return sum((part / 254**i for i, part in enumerate(parts)), jnp.float32(0)) * self.scale


def to_planes(x: jax.Array) -> Planes:
    """Activations [M, C] in planes, row by row: two for bfloat16, three for float32."""
    num_planes = 2 if x.dtype == jnp.bfloat16 else 3
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=1, keepdims=True)
    # For XLA's CPU backend the largest of some numbers and NaN may be one of the numbers.
    is_finite = jnp.isfinite(wide).all(axis=1, keepdims=True)
    scale = jnp.where(is_finite, jnp.where(largest == 0, 1, largest) / 127, jnp.nan)
    rest, rows = wide / scale, []
    for _ in range(num_planes):
        digit = jnp.round(rest)
        rows.append(digit.astype(jnp.int8))
        rest = (rest - digit) * 254
    return Planes(jnp.concatenate(rows), scale)


def multiply_in_parts(rows: jax.Array, product: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`product(rows)`, of as many int8 rows [M, C] at a time as a product should have."""
    parts = [product(rows[first : first + _MOST_ROWS]) for first in range(0, len(rows), _MOST_ROWS)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
