"""The experts: each token gets the gated sum over its own, and no other expert is looked at."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import EXPERT, TENSOR, or_thorough
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from grokjax.config import GrokConfig
from grokjax.kernels import matmul_gpu
from grokjax.model.feed_forward import (
    FeedForward,
    block_sizes,
    evaluate_experts,
    evaluate_together,
    fits_kernel,
    gated_unit,
)
from grokjax.quantization import quantize
from grokjax.sharding import Partitioner, ShardingRules, make_mesh

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
                out[token] += share * gated(row, gate, up, down)
    return out


def gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    z = x @ gate
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    return (gelu * (x @ up)) @ down


def routed(num_tokens: int, per_token: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, DIM)).astype(np.float32)
    experts = np.stack([rng.permutation(EXPERTS)[:per_token] for _ in range(num_tokens)]).astype(np.int32)
    return x, rng.random((num_tokens, per_token)).astype(np.float32), experts


def run(x: np.ndarray, gates: np.ndarray, experts: np.ndarray, stacks, layer: int = 1, platform="cpu") -> np.ndarray:
    sizes = block_sizes(len(x), per_token=experts.shape[1], num_experts=EXPERTS, platform=platform)
    compiled = jax.jit(functools.partial(evaluate_experts, sizes=sizes))
    return np.asarray(compiled(x, gates, experts, stacks, layer=jnp.int32(layer)))


@pytest.mark.parametrize(
    ("platform", "num_tokens", "sizes"),
    [
        ("cpu", 1, (1,)),
        ("cpu", 2, (1, 2)),
        ("cpu", 9, (1, 2, 4, 8, 9)),
        ("cpu", 128, (8, 16, 32, 48, 64, 96, 128)),
        ("cpu", 8192, (384,)),
        ("gpu", 1, (1,)),
        ("gpu", 8, (1, 2, 8)),
        ("tpu", 33, (1, 2, 8)),
        ("gpu", 40, (16,)),
        ("gpu", 128, (32,)),
        ("gpu", 2048, (128,)),
        ("gpu", 8192, (512, 1024, 1536, 2048, 2560, 3072, 4096)),
        ("gpu", 2049, (128, 256, 384, 512, 640, 768, 1024)),
        ("gpu", 2052, (129, 258, 387, 516, 645, 774, 1032)),
    ],
)
def test_sizes_of_blocks_suit_the_platform(platform: str, num_tokens: int, sizes: tuple[int, ...]) -> None:
    assert block_sizes(num_tokens, per_token=2, num_experts=8, platform=platform) == sizes


@pytest.mark.parametrize(
    ("platform", "num_tokens", "per_token"),
    [
        ("cpu", 1, 1),
        ("cpu", 1, 8),
        ("cpu", 2, 2),
        ("cpu", 9, 8),
        ("cpu", 129, 1),
        ("cpu", 800, 2),
        ("gpu", 30, 2),
        ("gpu", 383, 2),
        ("gpu", 2052, 2),
    ],
)
def test_experts_give_the_definition(platform: str, num_tokens: int, per_token: int) -> None:
    x, gates, experts = routed(num_tokens, per_token, seed=num_tokens)
    out = run(x, gates, experts, tuple(map(jnp.asarray, weights())), platform=platform)
    np.testing.assert_allclose(out, definition(x, gates, experts, 1), atol=2e-5)


@pytest.mark.parametrize(("num_tokens", "held"), or_thorough([(1, 8), (17, 8), (200, 8), (40, 4)], [(1, 8), (40, 4)]))
def test_one_kernel_gives_the_same_as_blocks(num_tokens: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For GPUs, run as plain JAX: the same as block by block, with experts that nobody chose and that others hold."""
    kernel = functools.partial(matmul_gpu.stack_matmul, interpret=True)
    monkeypatch.setattr(matmul_gpu, "stack_matmul", kernel)
    rng = np.random.default_rng(num_tokens)
    shapes = ((128, 256), (128, 256), (256, 128))
    stacks = tuple(quantize(jnp.asarray(rng.standard_normal((2, held, *shape)), jnp.float32)) for shape in shapes)
    x = jnp.asarray(rng.standard_normal((num_tokens, 128)), jnp.bfloat16)
    _, gates, experts = routed(num_tokens, 2, seed=num_tokens)
    experts = np.where(experts == 7, -1, experts)  # an expert that nobody chose, and pairs of nobody
    experts[4::5] = -1
    assert fits_kernel(x, stacks, per_token=2, num_experts=8)
    together = evaluate_together(x, gates, experts, stacks, layer=jnp.int32(1), num_experts=8)
    blocks = evaluate_experts(x, gates, experts, stacks, layer=jnp.int32(1), sizes=(8, 16))
    np.testing.assert_allclose(together, blocks, atol=1e-5 * np.abs(blocks).max())
    nothing = evaluate_together(x, gates, experts * 0 - 3, stacks, layer=jnp.int32(0), num_experts=8)
    np.testing.assert_array_equal(nothing, np.zeros_like(blocks))


def test_more_tokens_than_the_room_are_not_lost() -> None:
    """On GPUs, many tokens: those of one expert beyond two fair shares come in a second block."""
    x, gates, experts = routed(2052, 2)
    experts[:] = [3, 5]
    out = run(x, gates, experts, tuple(map(jnp.asarray, weights())), platform="gpu")
    np.testing.assert_allclose(out, definition(x, gates, experts, 1), atol=2e-5)


def test_one_kernel_is_not_used_where_it_is_slower() -> None:
    """An expert with more tokens than KERNEL_ROWS has its weights cast first; other dtypes have no kernel."""
    stacks = tuple(quantize(jnp.zeros((1, 8, *shape))) for shape in ((64, 128), (64, 128), (128, 128)))
    fits = functools.partial(fits_kernel, weights=stacks, per_token=2, num_experts=8)
    assert fits(jax.ShapeDtypeStruct((2048, 64), jnp.bfloat16))
    assert not fits(jax.ShapeDtypeStruct((2049, 64), jnp.bfloat16))
    assert not fits(jax.ShapeDtypeStruct((1, 64), jnp.float32))


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

    def noted(x: jax.Array, weights, *, at: tuple[jax.Array, ...], platform: str | None) -> jax.Array:
        jax.debug.callback(lambda layer, expert: evaluated.append((int(layer), int(expert))), *at)
        return gated_unit(x, weights, at=at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grokjax.model.feed_forward.gated_unit", noted)
        return Recorded(jax.jit(function).lower(*args, **kwargs).compile(), evaluated)


@functools.cache
def recorded_blocks(sizes: tuple[int, ...]) -> Recorded:
    stacks = tuple(map(jnp.asarray, weights()))
    return recorded(functools.partial(evaluate_experts, sizes=sizes), *routed(30, 2), stacks, layer=jnp.int32(0))


@settings(max_examples=30)
@pytest.mark.parametrize("sizes", [(4,), (1, 2, 5, 16)], ids=str)
@given(seed=st.integers(0, 10**6), chosen=st.sets(st.integers(-1, EXPERTS), min_size=2), layer=st.integers(0, 1))
def test_any_routes_give_the_definition_and_evaluate_no_other_expert(
    sizes: tuple[int, ...], seed: int, chosen: set[int], layer: int
) -> None:
    """Some experts crowded, some empty, some numbers outside, as of padding and of other devices' experts.

    Each expert is evaluated as often as its tokens fill blocks, one that nobody chose never.
    """
    x, gates, _ = routed(30, 2, seed)
    rng, numbers = np.random.default_rng(seed), sorted(chosen)
    experts = np.stack([rng.choice(numbers, 2, replace=False) for _ in x]).astype(np.int32)
    stacks = tuple(jnp.asarray(poisoned(stack, layer, experts)) for stack in weights())
    out, evaluated = recorded_blocks(sizes)(x, gates, experts, stacks, layer=jnp.int32(layer))
    np.testing.assert_allclose(out, definition(x, gates, experts, layer), atol=2e-5)
    blocks = {expert: -(-int((experts == expert).sum()) // sizes[-1]) for expert in range(EXPERTS)}
    assert evaluated == [(layer, expert) for expert, times in blocks.items() for _ in range(times)]


def poisoned(stack: np.ndarray, layer: int, experts: np.ndarray) -> np.ndarray:
    """The stack [L, E, ...] with NaN for all but the experts of one layer that are chosen."""
    chosen = np.intersect1d(experts, np.arange(EXPERTS))
    out = np.full_like(stack, np.nan)
    out[layer, chosen] = stack[layer, chosen]
    return out


def test_all_tokens_may_choose_one_expert() -> None:
    x, gates, _ = routed(261, 1)
    experts = np.full((len(x), 1), 6, np.int32)
    out = run(x, gates, experts, tuple(map(jnp.asarray, weights())))
    np.testing.assert_allclose(out, definition(x, gates, experts, 1), atol=2e-5)


def test_nothing_is_evaluated_where_nobody_chose_anything() -> None:
    x, gates, experts = routed(30, 2)
    stacks = tuple(map(jnp.asarray, weights()))
    out, evaluated = recorded_blocks((4,))(x, gates, np.full_like(experts, EXPERTS), stacks, layer=jnp.int32(0))
    assert evaluated == []
    np.testing.assert_array_equal(out, np.zeros_like(x))


def test_quantised_experts_are_close() -> None:
    x, gates, experts = routed(20, 2)
    stacks = tuple(quantize(jnp.asarray(stack), num_blocks=4) for stack in weights())
    out = run(x, gates, experts, stacks)
    exact = definition(x, gates, experts, 1)
    assert np.abs(out - exact).max() < 0.03 * np.abs(exact).max()


SMALL = GrokConfig.tiny().replace(model_dim=DIM, ffn_dim=HIDDEN, num_layers=2)


def block_on(mesh: tuple[int, int], rules: ShardingRules, config: GrokConfig = SMALL) -> FeedForward:
    partitioner = Partitioner.create(config, make_mesh(mesh), rules)
    return FeedForward(config, dtype=jnp.float32, quantized=False, partitioner=partitioner, rngs=nnx.Rngs(0))


def second_layer(module: FeedForward, x: jax.Array, valid: jax.Array) -> jax.Array:
    return module(x, valid, layer=jnp.int32(1))


@pytest.mark.parametrize(
    ("mesh", "rules", "devices_of_an_expert"),
    [
        pytest.param((1, 1), TENSOR, 1, id="one device"),
        pytest.param((1, 8), TENSOR, 8, id="tensor parallel"),
        pytest.param((1, 8), EXPERT, 1, id="expert parallel"),
    ],
)
def test_invalid_tokens_evaluate_nothing(
    mesh: tuple[int, int], rules: ShardingRules, devices_of_an_expert: int
) -> None:
    module, x = block_on(mesh, rules), jnp.asarray(routed(8, 1)[0].reshape(2, 4, DIM))
    valid = np.array([[True, True, False, False], [True, False, False, False]])
    experts = np.asarray(module.route(x, layer=jnp.int32(1))[1])
    chosen = set(experts[valid].flat)
    assert set(experts[~valid].flat) - chosen, "the padding must have chosen experts of its own"
    out, evaluated = recorded(second_layer, module, x, valid)(module, x, valid)
    assert len(evaluated) == devices_of_an_expert * len(chosen)
    assert (out[~valid] == 0).all()
    assert (out[valid] != 0).any(axis=-1).all()


def test_dense_block_is_one_expert() -> None:
    """One expert: no router, no gate."""
    module = block_on((1, 1), ShardingRules(), SMALL.replace(num_experts=1, experts_per_token=1))
    assert not hasattr(module, "router")
    x = routed(8, 1)[0]
    gate, up, down = (np.asarray(p.get_value(), np.float64)[1, 0] for p in (module.gate, module.up, module.down))
    out = jax.jit(second_layer)(module, jnp.asarray(x.reshape(2, 4, DIM)), np.ones((2, 4), bool))
    np.testing.assert_allclose(out, gated(x, gate, up, down).reshape(2, 4, DIM), atol=2e-5)
