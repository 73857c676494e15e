"""int8 weights: rounding, scale blocks, products in every form, and life inside jit, scan, shards and checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from grokjax.kernels import matmul
from grokjax.kernels.products import blocked_matmul, column_matmul, direct_matmul, summed_matmul
from grokjax.quantization import QuantizedArray, Weight, dequantize, einsum, quantize, shardable_blocks, specs
from grokjax.sharding import MESH_AXES, Partitioner, ShardingRules, make_mesh


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def product_in_float64(x: jax.Array, w: Weight) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64)


def assert_close(out: jax.Array, expected: np.ndarray, dtype: str = "float32") -> None:
    """Within 1e-5 (float32) or 1e-2 (bfloat16) of the largest value."""
    assert out.dtype == jnp.float32
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_blocks", [1, 4, 8])
def test_rounding_error_is_half_a_step(num_blocks: int, scale_dtype: str) -> None:
    w = random(3, 40, 24)
    quantized = quantize(jnp.asarray(w), num_blocks=num_blocks, scale_dtype=scale_dtype)
    assert quantized.weight.dtype == jnp.int8
    assert quantized.scales.dtype == scale_dtype
    assert quantized.scales.shape == (3, num_blocks, 24)
    step = np.asarray(quantized.scales, np.float32).repeat(40 // num_blocks, axis=1)
    # A bfloat16 scale may round down by 2 ** -9, which cuts the largest level by that of 127.
    slack = 0.5 if scale_dtype == "float32" else 0.5 + 127 * 2**-8
    assert (np.abs(np.asarray(dequantize(quantized)) - w) <= slack * step + 1e-6).all()


def test_blocks_are_consecutive_rows() -> None:
    weight = jnp.ones((4, 1), jnp.int8)
    quantized = QuantizedArray(weight, jnp.array([[1.0], [10.0]]))
    np.testing.assert_array_equal(dequantize(quantized)[:, 0], [1, 1, 10, 10])


def test_zeros_stay_zeros() -> None:
    np.testing.assert_array_equal(dequantize(quantize(jnp.zeros((8, 4)))), np.zeros((8, 4)))


def test_refined_blocks_mean_the_same() -> None:
    quantized = quantize(jnp.asarray(random(2, 16, 8)), num_blocks=2)
    np.testing.assert_array_equal(dequantize(quantized.refine(8)), dequantize(quantized))
    assert quantized.refine(8).num_blocks == 8
    with pytest.raises(ValueError, match="2 scale blocks over 16 rows cannot be cut into 3"):
        quantized.refine(3)


def test_indivisible_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=3 does not divide the 16 rows"):
        quantize(jnp.ones((16, 4)), num_blocks=3)


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
    weight, scales = (w.weight, w.scales) if isinstance(w, QuantizedArray) else (w, None)
    at = (jnp.int32(1), jnp.int32(2))
    forms = (direct_matmul, blocked_matmul, summed_matmul, column_matmul)
    every_form = jax.jit(lambda x, weight, scales, at: [form(x, weight, scales, at) for form in forms])
    expected = product_in_float64(x, jax.tree.map(lambda leaf: leaf[1, 2], w))
    for out in every_form(x, weight, scales, at):
        assert_close(out, expected, dtype)


@pytest.mark.parametrize("stack", [(), (3,), (2, 3)], ids=str)
def test_every_index_of_a_stack_is_multiplied_by_its_own(stack: tuple[int, ...]) -> None:
    w, x = quantize(jnp.asarray(random(*stack, 16, 8)), num_blocks=2), jnp.asarray(random(4, 16))
    product = jax.jit(matmul)
    for index in np.ndindex(stack):
        expected = product_in_float64(x, jax.tree.map(lambda leaf, index=index: leaf[index], w))
        assert_close(product(x, w, at=tuple(map(jnp.int32, index))), expected)


def test_blocks_may_leave_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """103 rows of a scale block by blocks of 32, and by steps of 8 or of 24; 100 columns by blocks of 64."""
    monkeypatch.setattr("grokjax.kernels.products.BLOCK_BYTES", 40 * 32)
    w = quantize(jnp.asarray(random(2 * 103, 40)), num_blocks=2)
    x = jnp.asarray(random(3, 206))
    assert_close(blocked_matmul(x, w.weight, w.scales, ()), product_in_float64(x, w))
    for numbers in (40, 3 * 40):
        monkeypatch.setattr("grokjax.kernels.products.SLICE_NUMBERS", numbers)
        assert_close(summed_matmul(x, w.weight, w.scales, ()), product_in_float64(x, w))
    wide = quantize(jnp.asarray(random(206, 100)), num_blocks=2)
    assert_close(column_matmul(x, wide.weight, wide.scales, ()), product_in_float64(x, wide))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_leading_axes_are_kept(shape: tuple[int, ...]) -> None:
    w, x = quantize(jnp.asarray(random(16, 8))), jnp.asarray(random(*shape, 16))
    assert_close(matmul(x, w), product_in_float64(x, w))


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_einsum_is_its_definition(num_blocks: int) -> None:
    plain, x = jnp.asarray(random(3, 16, 8)), jnp.asarray(random(5, 16))
    w = quantize(plain, num_blocks=num_blocks) if num_blocks else plain
    expected = np.stack([product_in_float64(x, one) for one in dequantize(w)], axis=1)
    assert_close(einsum("mc,eco->meo", x, w), expected)


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
    in_specs = (partitioner.spec((None, axes[0]), x.shape), specs(w, axes, partitioner))
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


@pytest.mark.parametrize(("blocks", "devices", "refined"), [(1, 8, 1), (4, 8, 8), (8, 4, 8), (6, 4, 12), (8, 8, 8)])
def test_shards_hold_whole_scale_blocks(blocks: int, devices: int, refined: int) -> None:
    partitioner = Partitioner(make_mesh((1, devices)), ShardingRules())
    axes = ("layers", "heads", "embed")
    assert shardable_blocks(blocks, axes, partitioner) == refined
    w = quantize(jnp.asarray(random(2, 48, 8)), num_blocks=blocks).refine(refined)
    placed = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(partitioner.mesh, spec)), w, specs(w, axes, partitioner)
    )
    for weight, scales in zip(placed.weight.addressable_shards, placed.scales.addressable_shards, strict=True):
        assert weight.data.shape == (2, 48 // devices, 8)
        own = dequantize(QuantizedArray(weight.data, scales.data))
        np.testing.assert_array_equal(own, np.asarray(dequantize(w))[weight.index])


def test_orbax_gives_back_what_it_saved(tmp_path: Path) -> None:
    mesh = make_mesh((1, 8))
    w = quantize(jnp.asarray(random(16, 8)), num_blocks=8, scale_dtype="bfloat16")
    ocp.save(tmp_path / "weights", {"query": w})
    sharding = NamedSharding(mesh, jax.P(MESH_AXES[1], None))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), {"query": w})
    restored = ocp.load(tmp_path / "weights", target)["query"]
    assert isinstance(restored, QuantizedArray)
    assert restored.weight.sharding == sharding
    np.testing.assert_array_equal(restored.weight, w.weight)
    np.testing.assert_array_equal(np.asarray(restored.scales, np.float32), np.asarray(w.scales, np.float32))


@pytest.mark.parametrize(("x_shape", "num_indices"), [((3, 8), 1), ((3, 16), 0), ((3, 16), 2)])
def test_shapes_that_do_not_fit_are_refused(x_shape: tuple[int, int], num_indices: int) -> None:
    w = quantize(jnp.ones((2, 16, 4)))
    with pytest.raises(ValueError, match=r"indices do not fit a weight of shape \(2, 16, 4\)"):
        matmul(jnp.ones(x_shape), w, at=(jnp.int32(0),) * num_indices)


def test_no_blocks_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=0 does not divide"):
        quantize(jnp.ones((16, 4)), num_blocks=0)
    with pytest.raises(ValueError, match="cannot be cut into 0"):
        quantize(jnp.ones((16, 4))).refine(0)
