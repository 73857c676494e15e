"""Products backwards, in blocks of rows that do not divide a weight, or a scale block of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokjax.kernels import evaluate_experts, matmul, unembed
from grokjax.quantization import QuantizedArray, quantize


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
def test_the_last_block_counts_no_row_twice(num_blocks: int) -> None:
    """A block has 512 rows of this weight in int8, and 128 in float32; a scale block has 1400 or 700."""
    random = np.random.default_rng(0)
    plain = jnp.asarray(random.standard_normal((1, 1400, 4096)), jnp.float32)
    w: Any = quantize(plain, num_blocks=num_blocks) if num_blocks else plain
    x, out = (jnp.asarray(random.standard_normal((3, size)), jnp.float32) for size in (1400, 4096))

    def product(x: jax.Array, floats: jax.Array) -> jax.Array:
        own = QuantizedArray(w.weight, floats) if num_blocks else floats
        return matmul(x, own, at=(jnp.int32(0),), platform="cpu")

    floats = w.scales.astype(jnp.float32) if num_blocks else plain
    of_x, of_floats = jax.jit(lambda *given: jax.vjp(product, *given)[1](out))(x, floats)

    scales = np.asarray(floats[0], np.float64)
    numbers = np.asarray(w.weight[0], np.float64).reshape(num_blocks, -1, 4096) if num_blocks else None
    matrix = scales if numbers is None else (numbers * scales[:, None]).reshape(plain.shape[1:])
    of_matrix = np.asarray(x, np.float64).T @ np.asarray(out, np.float64)
    wanted = of_matrix if numbers is None else (of_matrix.reshape(numbers.shape) * numbers).sum(axis=1)
    for found, expected in ((of_x, np.asarray(out, np.float64) @ matrix.T), (of_floats[0], wanted)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("is_quantized", [False, True], ids=["plain", "int8"])
def test_weights_of_an_expert_with_several_blocks_and_of_one_that_nobody_chose(*, is_quantized: bool) -> None:
    """Of 900 tokens expert 0 has three blocks of 384 rows at most, expert 1 two, expert 2 one, expert 3 none."""
    random = np.random.default_rng(0)
    x, mask = (jnp.asarray(random.standard_normal((900, 8)), jnp.float32) for _ in range(2))
    second = np.where(np.arange(900) < 600, 1, np.where(np.arange(900) < 650, 2, -1))
    routes = jnp.asarray(np.stack([np.zeros(900, int), second], axis=1), jnp.int32)
    plain = tuple(
        jnp.asarray(random.standard_normal((1, 4, *shape)) / 4, jnp.float32) for shape in ((8, 16), (8, 16), (16, 8))
    )
    whole = tuple(quantize(w) for w in plain) if is_quantized else plain

    def total(floats: tuple[jax.Array, ...]) -> jax.Array:
        weights: Any = floats
        if is_quantized:
            weights = tuple(QuantizedArray(w.weight, scales) for w, scales in zip(whole, floats, strict=True))
        shares = jnp.full(routes.shape, 0.5)
        out = evaluate_experts(x, shares, routes, weights, layer=jnp.int32(0), num_experts=4, platform="cpu")
        return (out * mask).sum()

    def dense(floats: tuple[jax.Array, ...]) -> jax.Array:
        factors = [w.weight.astype(jnp.float32) if is_quantized else jnp.ones_like(w) for w in whole]
        gate, up, down = (scales[0] * factor[0] for scales, factor in zip(floats, factors, strict=True))
        hidden = jax.nn.gelu(jnp.einsum("md,edf->mef", x, gate)) * jnp.einsum("md,edf->mef", x, up)
        shares = 0.5 * (np.asarray(routes)[:, :, None] == np.arange(4)).sum(axis=1, dtype=np.float32)
        return (jnp.einsum("mef,efd,me->md", hidden, down, shares) * mask).sum()

    floats = tuple(w.scales for w in whole) if is_quantized else whole
    found, wanted = jax.jit(jax.grad(total))(floats), jax.grad(dense)(floats)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
        np.testing.assert_array_equal(one[0, 3], np.zeros_like(one[0, 3]))
        assert (np.abs(np.asarray(one[0, :3])).max(axis=(1, 2)) > 0).all()


def test_what_is_not_a_number_stays_with_the_experts_of_its_token() -> None:
    """Nobody chose experts 0 and 3; what stands beside their empty blocks is expert 1's and 2's."""
    random = np.random.default_rng(0)
    x, mask = (jnp.asarray(random.standard_normal((4, 8)), jnp.float32) for _ in range(2))
    routes = jnp.asarray([[1], [2], [2], [2]], jnp.int32)
    weights = tuple(
        jnp.asarray(random.standard_normal((1, 4, *shape)), jnp.float32) for shape in ((8, 16), (8, 16), (16, 8))
    )

    def total(weights: tuple[jax.Array, ...], x: jax.Array, mask: jax.Array) -> jax.Array:
        given = x, jnp.ones(routes.shape), routes, weights
        return (evaluate_experts(*given, layer=jnp.int32(0), num_experts=4, platform="cpu") * mask).sum()

    for poisoned in ((x.at[:2].set(jnp.nan), mask), (x, mask.at[:2].set(jnp.nan))):
        for found in jax.jit(jax.grad(total))(weights, *poisoned):
            assert np.isnan(found[0, 1:3]).any(axis=(1, 2)).all()
            np.testing.assert_array_equal(found[0, [0, 3]], np.zeros_like(found[0, :2]))


@pytest.mark.thorough
def test_cotangents_of_bfloat16_experts_are_right_and_have_derivatives() -> None:
    """On CPUs they are written as integers, which by themselves have none; one expert is chosen by nobody."""
    random = np.random.default_rng(0)
    x, mask = (jnp.asarray(random.standard_normal((24, 32)), jnp.float32) for _ in range(2))
    routes = jnp.asarray(np.stack([random.permutation(3)[:2] for _ in range(24)]), jnp.int32)

    def total(weights: tuple[jax.Array, ...]) -> jax.Array:
        given = x.astype(weights[0].dtype), jnp.full(routes.shape, 0.5), routes, weights
        return (evaluate_experts(*given, layer=jnp.int32(0), num_experts=4, platform="cpu") * mask).sum()

    @jax.jit
    def both(weights: tuple[jax.Array, ...], changes: tuple[jax.Array, ...]) -> Any:
        return jax.jvp(jax.grad(total), (weights,), (changes,))

    shapes = ((1, 4, 32, 64), (1, 4, 32, 64), (1, 4, 64, 32))
    given = [[jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes] for _ in range(2)]
    found = both(*(tuple(leaves) for leaves in given))
    wanted = both(*(tuple(leaf.astype(jnp.float32) for leaf in leaves) for leaves in given))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0, atol=0.02 * np.abs(other).max())


def cotangent_of_a_product(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.grad(lambda w: matmul(x, w, at=(jnp.int32(0),), platform="cpu").sum())(w[None])


def cotangent_of_a_table(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.grad(lambda w: unembed(x, w, platform="cpu").sum())(w.T)


def cotangent_of_experts(w: jax.Array, x: jax.Array) -> jax.Array:
    layer, routes = jnp.int32(0), jnp.zeros((len(x), 1), jnp.int32)

    def total(w: jax.Array) -> jax.Array:
        weights = w[None, None], w[None, None], w.T[None, None]
        return evaluate_experts(
            x, jnp.ones(routes.shape), routes, weights, layer=layer, num_experts=1, platform="cpu"
        ).sum()

    return jax.grad(total)(w)


@pytest.mark.parametrize("cotangent", [cotangent_of_a_product, cotangent_of_a_table, cotangent_of_experts])
def test_no_product_on_a_cpu_has_a_transposed_factor(cotangent: Any) -> None:
    """XLA's CPU backend takes twice the time for one of bfloat16 numbers, as the cotangent of a weight would have."""
    shapes = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16), jax.ShapeDtypeStruct((16, 128), jnp.bfloat16)
    program = jax.jit(cotangent).lower(*shapes).compile().as_text()
    assert "lhs_contracting_dims={1}" in program
    assert "lhs_contracting_dims={0}" not in program
