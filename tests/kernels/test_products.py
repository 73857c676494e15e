"""Products with plain and int8 weights, in every form, inside jit, vmap, scan and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import check_generation, load_case

from grokjax import kernels
from grokjax.checkpoint import load
from grokjax.kernels.matmul_cpu import blocked_matmul, column_matmul, summed_matmul
from grokjax.kernels.products import direct_matmul
from grokjax.quantization import Weight, dequantize, partition_specs, quantize
from grokjax.sharding import Partitioner, ShardingRules, make_mesh

matmul = functools.partial(kernels.matmul, platform="cpu")


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def product_in_float64(x: jax.Array, w: Weight) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64)


def assert_close(out: jax.Array, expected: np.ndarray, dtype: str = "float32") -> None:
    """Within 1e-5 (float32) or 1e-2 (bfloat16) of the largest value."""
    assert out.dtype == jnp.float32
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "num_blocks"),
    [*((rows, 4) for rows in (1, 2, 8, 9, 16, 17, 200)), *((rows, blocks) for rows in (1, 17) for blocks in (0, 1, 8))],
)
def test_every_form_of_the_product_is_its_definition(rows: int, num_blocks: int, dtype: str) -> None:
    """The forms for accelerators run on CPUs too, so that each is held to the definition here."""
    stack = jnp.asarray(random(2, 3, 96, 40))
    w = quantize(stack, num_blocks=num_blocks, scale_dtype=dtype) if num_blocks else stack.astype(dtype)
    x = jnp.asarray(random(rows, 96)).astype(dtype)
    at = (jnp.int32(1), jnp.int32(2))
    forms = (direct_matmul, blocked_matmul, summed_matmul, column_matmul)
    every_form = jax.jit(lambda x, w, at: [form(x, w, at) for form in forms])
    expected = product_in_float64(x, jax.tree.map(lambda leaf: leaf[1, 2], w))
    for out in every_form(x, w, at):
        assert_close(out, expected, dtype)


@pytest.mark.usefixtures("core_for_each_device")
@pytest.mark.parametrize("rows", [4, 5])
def test_four_rows_are_a_sum_where_each_device_has_a_core(rows: int) -> None:
    w, x = quantize(jnp.asarray(random(96, 40)), num_blocks=2), jnp.asarray(random(rows, 96))
    product = jax.jit(matmul)
    assert ("dot_general" in product.lower(x, w).as_text()) == (rows > 4)
    assert_close(product(x, w), product_in_float64(x, w))


@pytest.mark.thorough
@pytest.mark.parametrize("processor", ["planes_everywhere", "core_for_each_device"])
def test_goldens_hold_in_the_forms_of_other_processors(processor: str, request: pytest.FixtureRequest) -> None:
    """An int8 model of the release, with every product of a weight in planes or some more as sums."""
    request.getfixturevalue(processor)
    golden = load_case("tiny-moe-s8")
    model = load(golden.checkpoint, golden.config, make_mesh((1, 1)), jnp.float32)
    check_generation(golden, model, rows=range(len(golden.lengths)))


@pytest.mark.parametrize("stack", [(), (3,), (2, 3)], ids=str)
def test_every_index_of_a_stack_is_multiplied_by_its_own(stack: tuple[int, ...]) -> None:
    w, x = quantize(jnp.asarray(random(*stack, 16, 8)), num_blocks=2), jnp.asarray(random(4, 16))
    product = jax.jit(matmul)
    for index in np.ndindex(stack):
        expected = product_in_float64(x, jax.tree.map(lambda leaf, index=index: leaf[index], w))
        assert_close(product(x, w, at=tuple(map(jnp.int32, index))), expected)


def test_blocks_may_leave_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """103 rows of a scale block by blocks of 32, and by steps of 8 or of 24; 100 columns by blocks of 64."""
    monkeypatch.setattr("grokjax.kernels.matmul_cpu.BLOCK_BYTES", 40 * 32)
    w = quantize(jnp.asarray(random(2 * 103, 40)), num_blocks=2)
    x = jnp.asarray(random(3, 206))
    assert_close(blocked_matmul(x, w, ()), product_in_float64(x, w))
    for numbers in (40, 3 * 40):
        monkeypatch.setattr("grokjax.kernels.matmul_cpu.SLICE_NUMBERS", numbers)
        assert_close(summed_matmul(x, w, ()), product_in_float64(x, w))
    wide = quantize(jnp.asarray(random(206, 100)), num_blocks=2)
    assert_close(column_matmul(x, wide, ()), product_in_float64(x, wide))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_leading_axes_are_kept(shape: tuple[int, ...]) -> None:
    w, x = quantize(jnp.asarray(random(16, 8))), jnp.asarray(random(*shape, 16))
    assert_close(matmul(x, w), product_in_float64(x, w))


def test_works_inside_vmap() -> None:
    w, x = quantize(jnp.asarray(random(3, 16, 8)), num_blocks=2), jnp.asarray(random(3, 5, 16))
    expected = np.stack([product_in_float64(rows, one) for rows, one in zip(x, dequantize(w), strict=True)])
    assert_close(jax.vmap(matmul)(x, w), expected)


@pytest.mark.parametrize(
    ("axes", "num_blocks"), [(("heads", "embed"), 1), (("heads", "embed"), 8), (("embed", "ffn"), 8)]
)
def test_works_on_a_mesh(axes: tuple[str, str], num_blocks: int) -> None:
    """Each device multiplies its own rows or columns, with its own scales, as inside the model."""
    partitioner = Partitioner(make_mesh((1, 8)), ShardingRules())
    w, x = quantize(jnp.asarray(random(64, 16)), num_blocks=num_blocks), jnp.asarray(random(5, 64))
    in_specs = (partitioner.spec((None, axes[0]), x.shape), partition_specs(w, axes, partitioner))
    product = partitioner.shard_map(
        lambda x, w: partitioner.psum(matmul(x, w), axes[0]),
        in_specs=in_specs,
        out_specs=partitioner.spec((None, axes[1]), (5, 16)),
    )
    assert_close(jax.jit(product)(x, w), product_in_float64(x, w))


def test_works_inside_a_scan() -> None:
    w, x = quantize(jnp.asarray(random(4, 16, 16)) / 4), jnp.asarray(random(2, 16))
    out, _ = jax.jit(lambda x, w: jax.lax.scan(lambda x, layer: (matmul(x, layer), None), x, w))(x, w)
    expected = np.asarray(x)
    for layer in np.asarray(dequantize(w)):
        expected = expected @ layer
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize(("x_shape", "num_indices"), [((3, 8), 1), ((3, 16), 0), ((3, 16), 2)])
def test_shapes_that_do_not_fit_are_refused(x_shape: tuple[int, int], num_indices: int) -> None:
    w = quantize(jnp.ones((2, 16, 4)))
    with pytest.raises(ValueError, match=r"indices do not fit a weight of shape \(2, 16, 4\)"):
        matmul(jnp.ones(x_shape), w, at=(jnp.int32(0),) * num_indices)
