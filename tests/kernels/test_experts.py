"""The experts: each token gets the gated sum over its own, and no other expert is looked at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import or_thorough
from evaluated_experts import Recorded, gated, recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from grokjax.kernels import experts_gpu, matmul_gpu
from grokjax.kernels.experts import block_sizes
from grokjax.kernels.experts_blocks import evaluate_in_blocks
from grokjax.quantization import quantize

LAYERS, EXPERTS, DIM, HIDDEN = 2, 8, 16, 24


@functools.cache
def weights() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM))
    gate, up, down = (rng.standard_normal((LAYERS, EXPERTS, *shape)).astype(np.float32) / 4 for shape in shapes)
    return gate, up, down


def definition(x: np.ndarray, probabilities: np.ndarray, experts: np.ndarray, layer: int) -> np.ndarray:
    """Token by token and choice by choice, in float64."""
    out = np.zeros_like(x, np.float64)
    for token, (row, chosen, shares) in enumerate(zip(x, experts, probabilities, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            if 0 <= expert < EXPERTS:
                gate, up, down = (np.asarray(w[layer, expert], np.float64) for w in weights())
                out[token] += share * gated(row, gate, up, down)
    return out


def routed(num_tokens: int, per_token: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, DIM)).astype(np.float32)
    experts = np.stack([rng.permutation(EXPERTS)[:per_token] for _ in range(num_tokens)]).astype(np.int32)
    return x, rng.random((num_tokens, per_token)).astype(np.float32), experts


def run(
    x: np.ndarray, probabilities: np.ndarray, experts: np.ndarray, stacks, layer: int = 1, platform="cpu"
) -> np.ndarray:
    sizes = block_sizes(len(x), per_token=experts.shape[1], num_experts=EXPERTS, platform=platform)
    runs_as = "tpu" if platform == "tpu" else "cpu"  # the kernels of GPUs do not run here
    compiled = jax.jit(functools.partial(evaluate_in_blocks, sizes=sizes, platform=runs_as))
    return np.asarray(compiled(x, probabilities, experts, stacks, layer=jnp.int32(layer)))


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
def test_sizes_of_blocks_suit_the_platform(
    platform: str, num_tokens: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grokjax.kernels.experts.summed_rows", lambda: 2)
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
        ("tpu", 8, 2),
        ("tpu", 256, 3),
        ("tpu", 600, 2),
    ],
)
def test_experts_give_the_definition(platform: str, num_tokens: int, per_token: int) -> None:
    x, probabilities, experts = routed(num_tokens, per_token, seed=num_tokens)
    out = run(x, probabilities, experts, tuple(map(jnp.asarray, weights())), platform=platform)
    np.testing.assert_allclose(out, definition(x, probabilities, experts, 1), atol=2e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_device_with_one_expert_gives_its_share(layer: int, platform: str) -> None:
    """That its weights are not copied on TPUs is told by `benchmarks/compile_targets.py --check`."""
    x, probabilities, experts = routed(300, 2)
    one = tuple(jnp.asarray(stack[:, :1]) for stack in weights())
    out = run(x, probabilities, experts, one, layer=layer, platform=platform)
    own = np.where(experts == 0, 0, -1)
    np.testing.assert_allclose(out, definition(x, probabilities, own, layer), atol=2e-5)


@pytest.mark.usefixtures("core_for_each_device")
def test_where_each_device_has_a_core_each_of_four_rows_has_a_program() -> None:
    assert block_sizes(9, per_token=2, num_experts=8, platform="cpu") == (1, 2, 3, 4, 8, 9)
    x, probabilities, experts = routed(9, 2)
    found = run(x, probabilities, experts, tuple(map(jnp.asarray, weights())))
    np.testing.assert_allclose(found, definition(x, probabilities, experts, 1), atol=2e-5)


@pytest.mark.usefixtures("planes_nowhere")
@pytest.mark.parametrize(("num_tokens", "held"), or_thorough([(1, 8), (17, 8), (200, 8), (40, 4)], [(1, 8), (40, 4)]))
def test_one_kernel_gives_the_same_as_blocks(num_tokens: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For GPUs, run as plain JAX: the same as block by block, with experts that nobody chose and that others hold."""
    kernel = functools.partial(matmul_gpu.stack_matmul, interpret=True)
    monkeypatch.setattr(matmul_gpu, "stack_matmul", kernel)
    rng = np.random.default_rng(num_tokens)
    shapes = ((128, 256), (128, 256), (256, 128))
    stacks = tuple(quantize(jnp.asarray(rng.standard_normal((2, held, *shape)), jnp.float32)) for shape in shapes)
    x = jnp.asarray(rng.standard_normal((num_tokens, 128)), jnp.bfloat16)
    _, probabilities, experts = routed(num_tokens, 2, seed=num_tokens)
    experts = np.where(experts == 7, -1, experts)  # an expert that nobody chose, and pairs of nobody
    experts[4::5] = -1
    assert experts_gpu.fits(x, stacks, per_token=2, num_experts=8)
    together = experts_gpu.evaluate_in_one_kernel(x, probabilities, experts, stacks, layer=jnp.int32(1), num_experts=8)
    blocks = evaluate_in_blocks(x, probabilities, experts, stacks, layer=jnp.int32(1), sizes=(8, 16), platform="cpu")
    np.testing.assert_allclose(together, blocks, atol=1e-5 * np.abs(blocks).max())
    nothing = experts_gpu.evaluate_in_one_kernel(
        x, probabilities, experts * 0 - 3, stacks, layer=jnp.int32(0), num_experts=8
    )
    np.testing.assert_array_equal(nothing, np.zeros_like(blocks))


def test_more_tokens_than_the_room_are_not_lost() -> None:
    """On GPUs, many tokens: those of one expert beyond two fair shares come in a second block."""
    x, probabilities, experts = routed(2052, 2)
    experts[:] = [3, 5]
    out = run(x, probabilities, experts, tuple(map(jnp.asarray, weights())), platform="gpu")
    np.testing.assert_allclose(out, definition(x, probabilities, experts, 1), atol=2e-5)


def test_one_kernel_is_not_used_where_it_is_slower() -> None:
    """An expert with more tokens than KERNEL_ROWS has its weights cast first; other dtypes have no kernel."""
    stacks = tuple(quantize(jnp.zeros((1, 8, *shape))) for shape in ((64, 128), (64, 128), (128, 128)))
    fits = functools.partial(experts_gpu.fits, weights=stacks, per_token=2, num_experts=8)
    assert fits(jax.ShapeDtypeStruct((2048, 64), jnp.bfloat16))
    assert not fits(jax.ShapeDtypeStruct((2049, 64), jnp.bfloat16))
    assert not fits(jax.ShapeDtypeStruct((1, 64), jnp.float32))


@functools.cache
def recorded_blocks(sizes: tuple[int, ...]) -> Recorded:
    stacks = tuple(map(jnp.asarray, weights()))
    in_blocks = functools.partial(evaluate_in_blocks, sizes=sizes, platform="cpu")
    return recorded(in_blocks, *routed(30, 2), stacks, layer=jnp.int32(0))


@settings(max_examples=30)
@pytest.mark.parametrize("sizes", [(4,), (1, 2, 5, 16)], ids=str)
@given(seed=st.integers(0, 10**6), chosen=st.sets(st.integers(-1, EXPERTS), min_size=2), layer=st.integers(0, 1))
def test_any_routes_give_the_definition_and_evaluate_no_other_expert(
    sizes: tuple[int, ...], seed: int, chosen: set[int], layer: int
) -> None:
    """Some experts crowded, some empty, some numbers outside, as of padding and of other devices' experts.

    Each expert is evaluated as often as its tokens fill blocks, one that nobody chose never.
    """
    x, probabilities, _ = routed(30, 2, seed)
    rng, numbers = np.random.default_rng(seed), sorted(chosen)
    experts = np.stack([rng.choice(numbers, 2, replace=False) for _ in x]).astype(np.int32)
    stacks = tuple(jnp.asarray(poisoned(stack, layer, experts)) for stack in weights())
    out, evaluated = recorded_blocks(sizes)(x, probabilities, experts, stacks, layer=jnp.int32(layer))
    np.testing.assert_allclose(out, definition(x, probabilities, experts, layer), atol=2e-5)
    blocks = {expert: -(-int((experts == expert).sum()) // sizes[-1]) for expert in range(EXPERTS)}
    assert evaluated == [(layer, expert) for expert, times in blocks.items() for _ in range(times)]


def poisoned(stack: np.ndarray, layer: int, experts: np.ndarray) -> np.ndarray:
    """The stack [L, E, ...] with NaN for all but the experts of one layer that are chosen."""
    chosen = np.intersect1d(experts, np.arange(EXPERTS))
    out = np.full_like(stack, np.nan)
    out[layer, chosen] = stack[layer, chosen]
    return out


def test_all_tokens_may_choose_one_expert() -> None:
    x, probabilities, _ = routed(261, 1)
    experts = np.full((len(x), 1), 6, np.int32)
    out = run(x, probabilities, experts, tuple(map(jnp.asarray, weights())))
    np.testing.assert_allclose(out, definition(x, probabilities, experts, 1), atol=2e-5)


def test_nothing_is_evaluated_where_nobody_chose_anything() -> None:
    x, probabilities, experts = routed(30, 2)
    stacks = tuple(map(jnp.asarray, weights()))
    out, evaluated = recorded_blocks((4,))(x, probabilities, np.full_like(experts, EXPERTS), stacks, layer=jnp.int32(0))
    assert evaluated == []
    np.testing.assert_array_equal(out, np.zeros_like(x))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("num_blocks", [1, 4])
def test_quantised_experts_are_close(num_blocks: int, platform: str) -> None:
    x, probabilities, experts = routed(20, 2)
    stacks = tuple(quantize(jnp.asarray(stack), num_blocks=num_blocks) for stack in weights())
    out = run(x, probabilities, experts, stacks, platform=platform)
    exact = definition(x, probabilities, experts, 1)
    assert np.abs(out - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_no_tokens_give_nothing(platform: str) -> None:
    x, probabilities, experts = routed(8, 2)
    out = run(x[:0], probabilities[:0], experts[:0], tuple(map(jnp.asarray, weights())), platform=platform)
    assert out.shape == (0, DIM)
