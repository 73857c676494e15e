"""Products of integers: as exact as promised on any processor, row by row, and used only where they are faster."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokjax import quantize
from grokjax.kernels import matmul, matmuls, unembed
from grokjax.kernels.matmul_cpu import planes_matmul
from grokjax.kernels.planes import LONGEST_SUM, to_planes
from grokjax.quantization import QuantizedArray, QuantizedTable, dequantize

LAYER = jnp.int32(1)


def random(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


def stack_of(*shape: int, num_blocks: int = 1) -> QuantizedArray:
    return quantize(random(2, *shape), num_blocks=num_blocks)


@jax.jit
def in_planes(x: jax.Array, w: QuantizedArray) -> jax.Array:
    return planes_matmul(to_planes(x), w, (LAYER,))


def exact(x: jax.Array, w: QuantizedArray) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64)[1]


def error(found: jax.Array, expected: np.ndarray) -> float:
    """The root mean square of what is wrong, as a part of that of the result."""
    assert found.dtype == jnp.float32
    return float(np.sqrt(np.mean((np.asarray(found, np.float64) - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("shape", [(96, 131), (131, 96), (1100, 1300)], ids=str)
@pytest.mark.parametrize(("rows", "num_blocks"), [(1, 1), (9, 1), (130, 1), (3, 0)])
def test_the_error_is_a_tenth_of_that_of_bfloat16(shape: tuple[int, int], rows: int, num_blocks: int) -> None:
    """In whole blocks and a rest, wide and narrow, for one row and for more than one product takes; 0: every block."""
    w = stack_of(*shape, num_blocks=num_blocks or {96: 4, 131: 131, 1100: 2}[shape[0]])
    x = random(rows, shape[0], dtype="bfloat16")
    rounding = error(exact(x, w).astype(np.float32), exact(random(rows, shape[0]), w))
    assert error(in_planes(x, w), exact(x, w)) < min(2e-4, rounding / 10)


def test_float32_keeps_its_precision() -> None:
    w, x = stack_of(96, 131, num_blocks=4), random(9, 96)
    assert error(in_planes(x, w), exact(x, w)) < 1e-6


def test_a_row_has_the_same_bits_in_any_company() -> None:
    """One of a hundred rows, alone, and beside rows of huge numbers, of zeros, of NaN and of infinity."""
    w, x = stack_of(96, 131, num_blocks=4), random(140, 96, dtype="bfloat16")
    found = np.asarray(in_planes(x, w))
    for rows in (slice(0, 1), slice(5, 14), slice(100, 140)):
        np.testing.assert_array_equal(in_planes(x[rows], w), found[rows])
    x = x.at[0, 7].set(1e30).at[1].set(0).at[2, 3].set(jnp.nan).at[3, 3].set(jnp.inf).at[4].multiply(1e-30)
    hard = np.asarray(in_planes(x, w))
    np.testing.assert_array_equal(hard[5:], found[5:])
    np.testing.assert_array_equal(hard[1], np.zeros(131))
    assert np.isnan(hard[2:4]).all()
    expected = exact(x[jnp.array([0, 4])], w)
    for row, wanted in zip(hard[[0, 4]], expected, strict=True):
        assert error(row, wanted) < 2e-4


def test_no_sum_overflows() -> None:
    """The longest sums of the largest products; longer ones are not made of integers."""
    weight = jnp.full((LONGEST_SUM, 2), -128, jnp.int8)
    x = jnp.ones((1, LONGEST_SUM), jnp.bfloat16)
    out = planes_matmul(to_planes(x), QuantizedArray(weight, jnp.ones((1, 2))), ())
    np.testing.assert_allclose(out, np.full((1, 2), -128 * LONGEST_SUM), rtol=1e-6)


def program(num_rows: int, *weights: QuantizedArray | jax.Array, dtype: str = "bfloat16") -> str:
    """The products of so many rows with weights of stacks [2, C, O]."""
    x = jax.ShapeDtypeStruct((num_rows, weights[0].shape[1]), dtype)
    run = jax.jit(lambda x, weights: matmuls(x, weights, at=(LAYER,), platform="cpu"))
    return run.lower(x, weights).as_text()


def test_planes_are_taken_for_the_rows_and_weights_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of bfloat16, and of int8 weights that are short enough; anywhere else the program is that of before."""
    w, plain = stack_of(32, 40), random(2, 32, 40)
    shapes = [jax.ShapeDtypeStruct((2, size, 8), jnp.int8) for size in (LONGEST_SUM, LONGEST_SUM + 1)]
    short, long = (QuantizedArray(shape, jax.ShapeDtypeStruct((2, 1, 8), jnp.float32)) for shape in shapes)
    cases = [(7, w, "bfloat16"), (8, w, "bfloat16"), (128, w, "bfloat16"), (129, w, "bfloat16"), (8, w, "float32")]
    cases += [(8, plain, "bfloat16"), (8, short, "bfloat16"), (8, long, "bfloat16")]
    found = {}
    for rows in (range(0), range(8, 129)):
        monkeypatch.setattr("grokjax.kernels.cpu_features.plane_rows", lambda rows=rows: rows)
        found[rows] = [program(num_rows, w, dtype=dtype) for num_rows, w, dtype in cases]
    changed = [before != after for before, after in zip(*found.values(), strict=True)]
    assert changed == [False, True, True, False, False, False, True, False]
    assert changed == ["xi32>" in "".join(products(text)) for text in found[range(8, 129)]]


def products(text: str) -> list[str]:
    return [line for line in text.splitlines() if "stablehlo.dot_general" in line]


@pytest.mark.usefixtures("planes_everywhere")
def test_products_have_at_most_256_rows_and_activations_are_rounded_once() -> None:
    """Of gate and up in blocks, none of which is a whole matrix."""
    text = program(300, stack_of(1024, 1100), stack_of(1024, 1100))
    assert {line.rpartition("tensor<")[2].partition("x")[0] for line in products(text)} == {"256", "88"}
    assert text.count("call @round(") == 2
    assert "1024x1100xi8" not in text.replace("tensor<2x1024x1100xi8>", "")


@pytest.mark.usefixtures("planes_everywhere")
def test_derivatives_are_those_without_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding has no derivative of its own: the gradient of a product of integers is that of the product."""
    w, x, way = stack_of(96, 40, num_blocks=2), random(9, 96, dtype="bfloat16"), random(9, 96, dtype="bfloat16")

    def derivatives() -> list[np.ndarray]:
        def loss(x: jax.Array, scales: jax.Array) -> jax.Array:
            return matmul(x, QuantizedArray(w.weight, scales), at=(LAYER,), platform="cpu")[:, 3].sum()

        _, change = jax.jvp(functools.partial(loss, scales=w.scales), (x,), (way,))
        return [np.asarray(part, np.float32) for part in (*jax.grad(loss, (0, 1))(x, w.scales), change)]

    found = derivatives()
    monkeypatch.setattr("grokjax.kernels.matmul_cpu.takes_planes", lambda num_rows, dtype: False)
    for ours, expected in zip(found, derivatives(), strict=True):
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.usefixtures("planes_everywhere")
def test_results_are_float32_where_jax_has_float64() -> None:
    w, x = stack_of(96, 40), random(9, 96, dtype="bfloat16")
    found = matmul(x, w, at=(LAYER,), platform="cpu")
    with jax.enable_x64(True):
        wide = matmul(x, w, at=(LAYER,), platform="cpu")
    assert wide.dtype == found.dtype == jnp.float32
    np.testing.assert_array_equal(wide, found)


@pytest.mark.usefixtures("planes_everywhere")
@pytest.mark.parametrize("num_rows", [17, 130])
def test_the_table_is_multiplied_in_planes(num_rows: int) -> None:
    numbers = np.random.default_rng(0).integers(-127, 128, (1030, 24))
    table = QuantizedTable(jnp.asarray(numbers, jnp.int8), jnp.abs(random(1030)))
    x = random(num_rows, 24, dtype="bfloat16")
    expected = np.asarray(x, np.float64) @ numbers.T * np.asarray(table.scales, np.float64)
    assert error(unembed(x, table, platform="cpu"), expected) < 2e-4
