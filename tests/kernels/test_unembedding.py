"""Logits of a plain and an int8 table, in every form of the product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokjax.kernels import unembed
from grokjax.kernels.unembedding import direct_unembed, integer_unembed, padded_unembed
from grokjax.quantization import QuantizedTable


def unembed_with_columns(x: jax.Array, table: jax.Array) -> jax.Array:
    """What CPUs do, with scales of 1."""
    return unembed(x, QuantizedTable(table, jnp.ones(len(table)), table.T), platform="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17])
def test_every_form_of_the_product_is_its_definition(num_rows: int, dtype: str) -> None:
    """With 1030 tokens, which blocks of 1024 do not divide; a row of zeros among the others."""
    table = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (1030, 24)), jnp.int8)
    x = (
        jnp.asarray(np.random.default_rng(num_rows).standard_normal((num_rows, 24)), dtype)
        .at[num_rows // 2 - 1]
        .multiply(0)
    )
    expected = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    for form in (integer_unembed, direct_unembed, padded_unembed, unembed_with_columns):
        out = np.asarray(jax.jit(form)(x, table))
        tolerance = {"float32": 1e-6, "bfloat16": 5e-5}[dtype]
        np.testing.assert_allclose(out, expected, atol=tolerance * max(1, np.abs(expected).max()), rtol=0)


@pytest.mark.usefixtures("core_for_each_device")
@pytest.mark.parametrize("num_rows", [3, 5])
def test_where_each_device_has_a_core_no_more_than_four_rows_take_the_columns_and_more_are_cast(num_rows: int) -> None:
    random = np.random.default_rng(num_rows)
    table = jnp.asarray(random.integers(-127, 128, (1030, 24)), jnp.int8)
    x = jnp.asarray(random.standard_normal((num_rows, 24)), jnp.bfloat16)
    product = jax.jit(unembed_with_columns)
    products = [line for line in product.lower(x, table).as_text().splitlines() if "dot_general" in line]
    assert len(products) == (num_rows > 4)
    assert not any("xi8" in line for line in products)
    expected = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    np.testing.assert_allclose(product(x, table), expected, rtol=0, atol=5e-5 * np.abs(expected).max())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_has_no_finite_logits(value: float) -> None:
    """Of which an engine would draw tokens; in a batch large enough for XLA's fast, careless search for the largest."""
    x = jnp.ones((8, 1024), jnp.bfloat16)
    table = jnp.ones((32, 1024), jnp.int8)
    found = np.asarray(jax.jit(integer_unembed)(x.at[3, 5].set(value), table))
    assert not np.isfinite(found[3]).any()
    np.testing.assert_allclose(np.delete(found, 3, axis=0), np.full((7, 32), 1024), rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_derivatives_are_those_without_columns(num_rows: int) -> None:
    """Backwards and forwards, of the rows and of the scales."""
    random = np.random.default_rng(num_rows)
    weight = jnp.asarray(random.integers(-127, 128, (70, 24)), jnp.int8)
    shapes = (num_rows, 24), (70,), (num_rows, 70)
    x, scales, of_logits = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)

    def derivatives(columns: jax.Array | None) -> tuple[Any, ...]:
        def logits(x: jax.Array, scales: jax.Array) -> jax.Array:
            return unembed(x, QuantizedTable(weight, scales, columns), platform="cpu")

        out, pull = jax.vjp(logits, x, scales)
        return out, pull(of_logits), jax.jvp(logits, (x, scales), (jnp.sin(x), jnp.cos(scales)))[1]

    both = jax.tree.leaves(derivatives(weight.T)), jax.tree.leaves(derivatives(None))
    for found, expected in zip(*both, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
