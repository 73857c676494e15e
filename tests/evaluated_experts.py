"""What tests of the experts share: an expert's definition, and a record of which experts are evaluated."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from grokjax.kernels import GatedWeights, gated_unit


def gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    z = x @ gate
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    return (gelu * (x @ up)) @ down


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A compiled function that notes each evaluation of an expert as (layer, expert) while it runs.

    NaN in the weights of the others would not do: the rows that fill up a block are dropped, NaN or not, so an expert
    evaluated for nobody leaves no trace in the result.
    """

    run: Callable[..., jax.Array]
    evaluated: list[tuple[int, int]]

    def __call__(self, *args, **kwargs) -> tuple[np.ndarray, list[tuple[int, int]]]:
        self.evaluated.clear()
        out = np.asarray(self.run(*args, **kwargs))
        jax.effects_barrier()
        return out, sorted(self.evaluated)


def recorded(function: Callable[..., jax.Array], *args, **kwargs) -> Recorded:
    """Compiles for arguments like these."""
    evaluated = []

    def noted(x: jax.Array, weights: GatedWeights, multiply: functools.partial) -> jax.Array:
        at = multiply.keywords["at"]
        jax.debug.callback(lambda layer, expert: evaluated.append((int(layer), int(expert))), *at)
        return gated_unit(x, weights, multiply)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grokjax.kernels.experts_blocks.gated_unit", noted)
        return Recorded(jax.jit(function).lower(*args, **kwargs).compile(), evaluated)
