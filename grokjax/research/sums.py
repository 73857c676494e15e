"""What sums over the tokens of some texts have in common: which tokens count, that two of them add, how they print."""

from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from grokjax.context import own_context
from grokjax.printing import describe_fields


def is_real(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Which of tokens [B, T] are no padding, bool [B, T], for texts of lengths int32 [B]."""
    return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]


class Sums:
    """The base of dataclasses of arrays, each summed over the real tokens of some texts."""

    @own_context()
    def __add__(self, other: Self) -> Self:
        """The sums over the texts of both.

        Raises:
          ValueError: They are of models of other sizes.
        """
        if [np.shape(one) for one in vars(self).values()] != [np.shape(one) for one in vars(other).values()]:
            raise ValueError(f"{self} and {other} do not add: take those of models of one size.")
        return jax.tree.map(lambda one, two: one + two, self, other)

    def __radd__(self, other: int) -> Self:
        """`sum` begins with 0."""
        return self if other == 0 else NotImplemented

    def __repr__(self) -> str:
        return describe_fields(self)
