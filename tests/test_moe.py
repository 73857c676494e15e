"""The experts: each token gets the gated sum over its own, and no other expert is looked at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokjax.moe import evaluate_experts, rows_per_block
from grokjax.quantization import quantize

LAYERS, EXPERTS, DIM, HIDDEN = 2, 8, 16, 24


@functools.cache
def weights() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM))
    gate, up, down = (rng.standard_normal((LAYERS, EXPERTS, *shape)).astype(np.float32) / 4 for shape in shapes)
    return gate, up, down


def definition(x: np.ndarray, gates: np.ndarray, experts: np.ndarray, layer: int) -> np.ndarray:
    """Token by token and choice by choice, in float64."""
    out = np.zeros_like(x, np.float64)
    for token, (row, chosen, shares) in enumerate(zip(x, experts, gates, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            if 0 <= expert < EXPERTS:
                gate, up, down = (np.asarray(w[layer, expert], np.float64) for w in weights())
                z = row @ gate
                gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
                out[token] += share * ((gelu * (row @ up)) @ down)
    return out


def routed(num_tokens: int, per_token: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, DIM)).astype(np.float32)
    experts = np.stack([rng.permutation(EXPERTS)[:per_token] for _ in range(num_tokens)]).astype(np.int32)
    return x, rng.random((num_tokens, per_token)).astype(np.float32), experts


def run(x: np.ndarray, gates: np.ndarray, experts: np.ndarray, stacks, layer: int = 1) -> np.ndarray:
    block = rows_per_block(len(x), per_token=experts.shape[1], num_experts=EXPERTS)
    compiled = jax.jit(functools.partial(evaluate_experts, block=block))
    return np.asarray(compiled(x, gates, experts, stacks, layer=jnp.int32(layer)))


@pytest.mark.parametrize(
    ("num_tokens", "rows"), [(1, 1), (2, 2), (8, 8), (32, 8), (33, 8), (40, 16), (128, 32), (512, 128), (8192, 128)]
)
def test_rows_of_a_block(num_tokens: int, rows: int) -> None:
    assert rows_per_block(num_tokens, per_token=2, num_experts=8) == rows


@pytest.mark.parametrize("per_token", [1, 2, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 128, 129, 383])
def test_against_the_definition(num_tokens: int, per_token: int) -> None:
    x, gates, experts = routed(num_tokens, per_token, seed=num_tokens)
    out = run(x, gates, experts, tuple(map(jnp.asarray, weights())))
    np.testing.assert_allclose(out, definition(x, gates, experts, 1), atol=2e-5)


def test_all_tokens_on_one_expert() -> None:
    x, gates, _ = routed(261, 1)
    experts = np.full((len(x), 1), 6, np.int32)
    out = run(x, gates, experts, tuple(map(jnp.asarray, weights())))
    np.testing.assert_allclose(out, definition(x, gates, experts, 1), atol=2e-5)


def test_only_chosen_experts_are_evaluated() -> None:
    """Whatever touches an expert of NaN is NaN: here, nothing is."""
    x, gates, experts = routed(40, 2)
    experts = np.where(experts == 3, -1, experts)  # left out, as another device's experts and padding are
    poisoned = []
    for stack in weights():
        stack = stack.copy()
        stack[:, 3] = np.nan
        stack[0] = np.nan
        poisoned.append(jnp.asarray(stack))
    out = run(x, gates, experts, tuple(poisoned))
    np.testing.assert_allclose(out, definition(x, gates, experts, 1), atol=2e-5)


def test_nobody_chose_anything() -> None:
    x, gates, experts = routed(5, 2)
    poisoned = tuple(jnp.full_like(jnp.asarray(stack), jnp.nan) for stack in weights())
    np.testing.assert_array_equal(run(x, gates, np.full_like(experts, EXPERTS), poisoned), np.zeros_like(x))


def test_quantised_experts() -> None:
    x, gates, experts = routed(20, 2)
    stacks = tuple(quantize(jnp.asarray(stack), num_blocks=4) for stack in weights())
    out = run(x, gates, experts, stacks)
    exact = definition(x, gates, experts, 1)
    assert np.abs(out - exact).max() < 0.03 * np.abs(exact).max()
