"""Rules for derivatives, and the rules of the operations where they cannot be run: on GPUs and TPUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import program_for
from jax import lax

from grokjax.kernels import CachePlace, attend, evaluate_experts, matmul, unembed, with_rule
from grokjax.quantization import quantize, quantize_table

X, W = (jax.random.normal(jax.random.key(i), (3, 3)) for i in range(2))
STEPS = jnp.int32(2)


def looping(x: jax.Array, w: jax.Array, steps: jax.Array) -> jax.Array:
    return lax.fori_loop(0, steps, lambda _, y: jnp.sin(y @ w), x)


def unrolled(x: jax.Array, w: jax.Array, steps: int = int(STEPS)) -> jax.Array:
    for _ in range(steps):
        x = jnp.sin(x @ w)
    return x


def pull(operands: tuple[jax.Array, ...], saved: tuple[()], out: jax.Array) -> tuple[jax.Array | None, ...]:
    assert saved == ()
    return *jax.vjp(unrolled, *operands[:2])[1](out), None


RULED = with_rule(looping, pull)


def energy(function: Callable[..., jax.Array], *given: Any) -> Callable[..., jax.Array]:
    return lambda *operands: (function(*operands, *given) ** 2).sum()


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f: jax.grad(f, argnums=(0, 1)),
        lambda f: jax.grad(f, argnums=1),
        jax.hessian,
        lambda f: lambda x, w: jax.jvp(f, (x, w), (w, x)),
        lambda f: lambda x, w: jax.linearize(f, x, w)[1](w, x),
        lambda f: lambda x, w: jax.vmap(jax.grad(f, argnums=(0, 1)), in_axes=(0, None))(jnp.stack([x, w]), w),
        lambda f: jax.grad(jax.checkpoint(f), argnums=(0, 1)),
    ],
    ids=["grad", "grad of one", "hessian", "jvp", "linearize", "vmap", "checkpoint"],
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_loop_with_a_rule_has_every_derivative(derivative: Callable[..., Any], *, is_compiled: bool) -> None:
    compiled: Callable[..., Any] = jax.jit if is_compiled else lambda f: f
    found = compiled(derivative(energy(RULED, STEPS)))(X, W)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, derivative(energy(unrolled))(X, W)
    )


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f: jax.grad(lambda x: jax.grad(f)(x, W).sum()),
        lambda f: jax.grad(lambda x: jax.jvp(f, (x, W), (W, X))[1]),
    ],
    ids=["grad of grad", "grad of jvp"],
)
def test_a_derivative_of_a_derivative_is_refused_backwards(derivative: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"backwards, as by jax.grad of jax.grad.*take jax.jvp of jax.grad"):
        jax.jit(derivative(energy(RULED, STEPS)))(X)


def test_what_is_saved_reaches_the_rule() -> None:
    def saving(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(x), jnp.cos(x)

    ruled = with_rule(jnp.sin, lambda _, saved, out: (saved * out * 2,), saving=saving)  # twice too much, on purpose
    np.testing.assert_allclose(jax.grad(lambda x: ruled(x).sum())(X), 2 * np.cos(X), rtol=1e-6)


def test_rules_within_rules_are_not_traced_anew_at_every_level() -> None:
    """A gradient of a model took 20 seconds to trace where JAX traced a rule, and those in it, for each use's types."""
    calls = 0

    def innermost(x: jax.Array) -> jax.Array:
        nonlocal calls
        calls += 1
        return jnp.sin(x)

    def ruled(function: Callable[..., Any]) -> Callable[..., Any]:
        return with_rule(function, lambda operands, _, out: jax.vjp(function, *operands)[1](out))

    outermost = ruled(ruled(ruled(innermost)))
    jax.make_jaxpr(jax.grad(lambda x: lax.fori_loop(0, 3, lambda _, y: outermost(y), x).sum()))(X)
    assert calls < 4
    np.testing.assert_allclose(jax.grad(lambda x: outermost(x).sum())(X), np.cos(X), rtol=1e-6)


def bfloat16(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def product(platform: str) -> Callable[[jax.Array], jax.Array]:
    return lambda x: matmul(x, quantize(bfloat16(1, 2, 128, 128)), at=(jnp.int32(1),), platform=platform)


def experts(platform: str) -> Callable[[jax.Array], jax.Array]:
    weights = tuple(quantize(bfloat16(i, 1, 4, 128, 128)) for i in range(3))
    routes = jnp.tile(jnp.array([[0, 2]], jnp.int32), (len(bfloat16(0, 4, 128)), 1))
    return lambda x: evaluate_experts(
        x, jnp.full(routes.shape, 0.5), routes, weights, layer=jnp.int32(0), num_experts=4, platform=platform
    )


def attention(platform: str) -> Callable[[jax.Array], jax.Array]:
    place = CachePlace(layer=jnp.int32(0), start=jnp.zeros(1, jnp.int32), count=jnp.full(1, 4, jnp.int32))
    entries = bfloat16(3, 1, 1, 2, 128, 128)
    return lambda x: attend(
        jnp.tile(x[None, :, None], (1, 1, 4, 1)),
        entries,
        entries,
        place,
        multiplier=0.1,
        softcap=30.0,
        platform=platform,
    )


def table(platform: str) -> Callable[[jax.Array], jax.Array]:
    return lambda x: unembed(x, quantize_table(bfloat16(1, 256, 128)), platform=platform)


@pytest.mark.parametrize("operation", [product, experts, attention, table], ids=lambda f: f.__name__)
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_every_operation_has_derivatives_on_accelerators(operation: Callable[..., Any], platform: str) -> None:
    def total(x: jax.Array) -> jax.Array:
        return operation(platform)(x).astype(jnp.float32).sum()

    program = program_for(platform, jax.grad(total), bfloat16(0, 4, 128))
    assert "-> (tensor<4x128xbf16>" in program
    forwards = program_for(platform, lambda x: jax.jvp(total, (x,), (x,)), bfloat16(0, 4, 128))
    assert "-> (tensor<f32>" in forwards


@pytest.mark.parametrize("operation", [product, experts, attention, table], ids=lambda f: f.__name__)
def test_the_rules_for_accelerators_are_those_of_a_cpu(operation: Callable[..., Any]) -> None:
    def gradient(platform: str) -> np.ndarray:
        found = jax.jit(jax.grad(lambda x: jnp.sin(operation(platform)(x).astype(jnp.float32)).sum()))
        return np.asarray(found(bfloat16(0, 4, 128)), np.float32)

    expected = gradient("cpu")
    np.testing.assert_allclose(gradient("tpu"), expected, rtol=0, atol=2e-2 * np.abs(expected).max())
