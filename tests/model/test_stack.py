"""Derivatives through the model: with respect to every float, on any mesh, backwards, forwards and in turn."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import DENSE, EXPERT, FULLY, SMALL, TENSOR, label, or_thorough, random_model
from flax import nnx
from reference_backward import backward

from grokjax import Grok, GrokConfig, ShardingRules, decode, forward, make_mesh, prefill, reference
from grokjax.model import named_parameters, with_values
from grokjax.quantization import QuantizedArray, QuantizedTable, dequantize, partition_specs, quantize

TWO, TWO_DENSE = SMALL.replace(num_layers=2), DENSE.replace(num_layers=2)
LENGTHS = (6, 4)
TOKENS = np.random.default_rng(0).integers(3, SMALL.vocab_size, (2, max(LENGTHS)))
COTANGENTS = np.random.default_rng(1).standard_normal((*TOKENS.shape, SMALL.vocab_size)).astype(np.float32)
IS_REAL = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]


def written(weights: Mapping[str, np.ndarray], model: Grok, *, num_blocks: int | None) -> Grok:
    """The model with the reference's weights, those of attention and experts in int8 if a number of blocks is given."""
    values: dict[str, Any] = {}
    for name, param in named_parameters(model).items():
        old, rest = param.get_value(), name.removeprefix("layers.")
        plain = (
            weights[name]
            if rest == name
            else np.stack([weights[f"layers.{i}.{rest}"] for i in range(model.config.num_layers)])
        )
        value: Any = jnp.asarray(plain.reshape(old.shape), jnp.float32)
        if isinstance(old, QuantizedArray):
            value = quantize(value, num_blocks=num_blocks or 1)
        specs = partition_specs(value, param.logical_axes, model.partitioner)
        values[name] = jax.device_put(value, model.partitioner.shardings(specs))
    return with_values(model, values)


def make(
    config: GrokConfig, mesh: tuple[int, int], rules: ShardingRules, num_blocks: int | None, *, has_ties: bool = False
) -> tuple[Grok, dict[str, np.ndarray]]:
    """A model, and the weights in float64 that it has."""
    weights = reference.random_weights(config, 0)
    if has_ties:  # of two experts, in every layer and for every token
        for i in range(config.num_layers):
            weights[f"layers.{i}.feed_forward.router"][:, 3] = weights[f"layers.{i}.feed_forward.router"][:, 5]
    empty = random_model(config, mesh=make_mesh(mesh), rules=rules, dtype=jnp.float32, quantized=num_blocks is not None)
    model = written(weights, empty, num_blocks=num_blocks)
    for name, param in named_parameters(model).items():
        value = param.get_value()
        if isinstance(value, QuantizedArray):
            for i, layer in enumerate(np.asarray(dequantize(value), np.float64)):
                own = f"layers.{i}.{name.removeprefix('layers.')}"
                weights[own] = layer.reshape(weights[own].shape)
    return model, weights


def floats_of(model: Grok) -> dict[str, jax.Array]:
    """What of a model has derivatives, by the name of its parameter."""
    return {name: _floats(param.get_value()) for name, param in named_parameters(model).items()}


def _floats(value: Any) -> jax.Array:
    return value.scales if isinstance(value, QuantizedArray | QuantizedTable) else value


def with_floats(model: Grok, floats: Mapping[str, jax.Array]) -> Grok:
    values: dict[str, Any] = {}
    for name, param in named_parameters(model).items():
        value: Any = param.get_value()
        is_int8 = isinstance(value, QuantizedArray | QuantizedTable)
        values[name] = dataclasses.replace(value, scales=floats[name]) if is_int8 else floats[name]
    return with_values(model, values)


def loss(floats: Mapping[str, jax.Array], model: Grok) -> jax.Array:
    """A weighted sum of the logits of every real token; the others are padding."""
    model = with_floats(model, floats)
    logits = forward(model, TOKENS)
    return jnp.sum(logits * np.where(IS_REAL[..., None], COTANGENTS, 0))


def loss_by_steps(floats: Mapping[str, jax.Array], model: Grok) -> jax.Array:
    """What `loss` is for the last three real tokens of each row, from a prefill and two steps of decode."""
    model, given = with_floats(model, floats), np.array(LENGTHS) - 2
    rows = np.arange(len(LENGTHS))
    logits, cache = prefill(model, TOKENS[:, : max(given)], given, model.new_cache(len(LENGTHS), 8))
    total = jnp.sum(logits * COTANGENTS[rows, given - 1])
    for i in range(2):
        logits, cache = decode(model, TOKENS[rows, given + i], cache)
        total += jnp.sum(logits * COTANGENTS[rows, given + i])
    return total


def expected(weights: Mapping[str, np.ndarray], config: GrokConfig, *, last: int) -> dict[str, np.ndarray]:
    """The reference's derivatives with respect to every weight, of the last so many tokens of each row."""
    total: dict[str, np.ndarray] = {}
    for tokens, cotangents, length in zip(TOKENS, COTANGENTS, LENGTHS, strict=True):
        wanted = np.where(np.arange(length)[:, None] >= length - last, cotangents[:length], 0)
        found, _ = backward(weights, config, tokens[:length], wanted)
        total = {name: total.get(name, 0) + part for name, part in found.items()}
    return total


def check(found: Mapping[str, jax.Array], wanted: Mapping[str, np.ndarray], model: Grok, *, atol: float = 2e-5) -> None:
    for name, param in named_parameters(model).items():
        value, rest = param.get_value(), name.removeprefix("layers.")
        num_layers = model.config.num_layers
        whole = wanted[name] if rest == name else np.stack([wanted[f"layers.{i}.{rest}"] for i in range(num_layers)])
        if isinstance(value, QuantizedArray):  # the cotangent of a scale is that of all weights that it scales
            blocks = (*value.scales.shape[:-1], -1, value.shape[-1])
            whole = (whole.reshape(value.shape) * np.asarray(value.weight, np.float64)).reshape(blocks).sum(axis=-2)
        whole = whole.reshape(found[name].shape)
        np.testing.assert_allclose(found[name], whole, rtol=0, atol=atol * np.abs(whole).max(), err_msg=name)


CASES = [
    (TWO, (1, 1), TENSOR, None),
    (TWO, (2, 4), TENSOR, 4),
    (TWO_DENSE, (1, 1), TENSOR, None),
    (TWO, (1, 8), EXPERT, None),
    (TWO, (2, 4), FULLY, None),
]


@pytest.mark.parametrize(("config", "mesh", "rules", "num_blocks"), or_thorough(CASES, CASES[:1]), ids=label)
def test_every_float_has_the_reference_s_derivative(
    config: GrokConfig, mesh: tuple[int, int], rules: ShardingRules, num_blocks: int | None
) -> None:
    model, weights = make(config, mesh, rules, num_blocks, has_ties=mesh == (1, 1) and config.num_experts > 1)
    check(jax.jit(jax.grad(loss))(floats_of(model), model), expected(weights, config, last=6), model)


@pytest.mark.thorough
def test_steps_have_the_derivative_of_the_whole() -> None:
    model, weights = make(TWO, (2, 4), TENSOR, 4)
    check(jax.jit(jax.grad(loss_by_steps))(floats_of(model), model), expected(weights, TWO, last=3), model)


@pytest.mark.thorough
def test_modes_agree_and_take_turns() -> None:
    """`jax.grad`, `jax.jvp`, a Hessian's product with a vector, `jax.checkpoint` and `jax.vmap`, at embeddings."""
    model, weights = make(SMALL, (1, 1), TENSOR, 1)
    x = model.embedding.embed(TOKENS[:1])
    directions = jax.random.normal(jax.random.key(0), (2, *x.shape))

    def of_embeddings(x: jax.Array) -> jax.Array:
        return jnp.sum(forward(model, embeddings=x) * COTANGENTS[:1])

    @jax.jit
    def run(x: jax.Array, directions: jax.Array) -> tuple[jax.Array, ...]:
        gradient = jax.grad(jax.checkpoint(of_embeddings))
        change = jax.linearize(of_embeddings, x)[1](directions[0])
        products = jax.vmap(lambda v: jax.jvp(gradient, (x,), (v,))[1])(directions)
        return gradient(x), change, products

    found, change, products = run(x, directions)
    _, wanted = backward(weights, SMALL, TOKENS[0], COTANGENTS[0])
    np.testing.assert_allclose(found[0], wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(change, np.sum(wanted * np.asarray(directions[0, 0], np.float64)), rtol=1e-4)
    crossed = [np.vdot(directions[1 - i], products[i]) for i in range(2)]  # v H u and u H v
    np.testing.assert_allclose(*crossed, rtol=1e-3)
    step = 1e-5 * np.asarray(directions[0, 0], np.float64)
    moved = [_at_embeddings(weights, np.asarray(x[0], np.float64) + sign * step) for sign in (1, -1)]
    product = (moved[0] - moved[1]) / 2e-5
    np.testing.assert_allclose(products[0, 0], product, rtol=0, atol=1e-3 * np.abs(product).max())


def _at_embeddings(weights: Mapping[str, np.ndarray], embeddings: np.ndarray) -> np.ndarray:
    """The reference's derivative with respect to embeddings [T, D]."""
    return backward(weights, SMALL, TOKENS[0], COTANGENTS[0], embeddings=embeddings)[1]


@pytest.mark.thorough
def test_flax_takes_the_derivatives_of_plain_parameters() -> None:
    model, weights = make(SMALL, (1, 1), TENSOR, 1)
    wrt = nnx.DiffState(0, nnx.All(nnx.Param, lambda _, param: isinstance(param.get_value(), jax.Array)))

    def of_model(model: Grok) -> jax.Array:
        return jnp.sum(forward(model, TOKENS[:1]) * COTANGENTS[:1])

    found = nnx.value_and_grad(of_model, argnums=wrt)(model)[1]["layers"]["feed_forward"]["router"].get_value()[0]
    wanted = backward(weights, SMALL, TOKENS[0], COTANGENTS[0])[0]["layers.0.feed_forward.router"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.thorough
def test_rows_that_are_left_out_have_no_derivative() -> None:
    """Of a cache of three rows two are filled, one by one token, and one of them decodes; each step by itself."""
    model, weights = make(DENSE, (1, 1), TENSOR, None)
    x = model.embedding.table[...]

    def by_steps(table: jax.Array) -> jax.Array:
        moved = with_values(model, {"embedding.table": table})
        first, cache = prefill(moved, TOKENS[:, :3], [3, 1], moved.new_cache(3, 8), rows=[2, 0])
        after, _ = decode(moved, TOKENS[[0, 0, 0], 3], cache, active=[False, False, True])
        return jnp.sum(first * COTANGENTS[:, 0]) + jnp.sum(after[2] * COTANGENTS[0, 1])

    wanted = np.zeros(x.shape)
    rows = (TOKENS[0, :4], {2: COTANGENTS[0, 0], 3: COTANGENTS[0, 1]}), (TOKENS[1, :1], {0: COTANGENTS[1, 0]})
    for tokens, places in rows:
        cotangents = np.stack([places.get(i, np.zeros(DENSE.vocab_size)) for i in range(len(tokens))])
        wanted += backward(weights, DENSE, tokens, cotangents)[0]["embedding.table"]
    np.testing.assert_allclose(jax.grad(by_steps)(x), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_a_derivative_through_an_int8_cache_is_refused() -> None:
    model = random_model(DENSE, dtype=jnp.float32)

    def of_scale(scale: jax.Array) -> jax.Array:
        moved = with_values(model, {"layers.pre_attention_norm.scale": scale})
        return prefill(moved, TOKENS, [6, 6], model.new_cache(2, 8, dtype=jnp.int8))[0].sum()

    with pytest.raises(ValueError, match=r"derivative through an int8 cache.*create the cache with dtype=float32"):
        jax.grad(of_scale)(model.layers.pre_attention_norm.scale[...])
