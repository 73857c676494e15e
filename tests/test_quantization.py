"""int8 weights and tables: rounding, scale blocks, any contraction, and life in shards and checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from grokjax.quantization import (
    QuantizedArray,
    dequantize,
    einsum,
    partition_specs,
    quantize,
    quantize_table,
    shardable_blocks,
)
from grokjax.sharding import MESH_AXES, Partitioner, ShardingRules, make_mesh


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_blocks", [1, 4, 8])
def test_rounding_error_is_half_a_step(num_blocks: int, scale_dtype: str) -> None:
    w = random(3, 40, 24)
    quantized = quantize(jnp.asarray(w), num_blocks=num_blocks, scale_dtype=scale_dtype)
    assert quantized.weight.dtype == jnp.int8
    assert quantized.scales.dtype == scale_dtype
    assert quantized.scales.shape == (3, num_blocks, 24)
    step = np.asarray(quantized.scales, np.float32).repeat(40 // num_blocks, axis=1)
    # A bfloat16 scale may round down by 2 ** -9, which cuts the largest weight by that of 127.
    slack = 0.5 if scale_dtype == "float32" else 0.5 + 127 * 2**-8
    assert (np.abs(np.asarray(dequantize(quantized)) - w) <= slack * step + 1e-6).all()
    np.testing.assert_array_equal(quantized.weight, np.clip(np.round(w / step), -127, 127))


def test_blocks_are_consecutive_rows() -> None:
    weight = jnp.ones((4, 1), jnp.int8)
    quantized = QuantizedArray(weight, jnp.array([[1.0], [10.0]]))
    np.testing.assert_array_equal(dequantize(quantized)[:, 0], [1, 1, 10, 10])


def test_zeros_stay_zeros() -> None:
    np.testing.assert_array_equal(dequantize(quantize(jnp.zeros((8, 4)))), np.zeros((8, 4)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_no_number_is_not_rounded_to_one(dtype: str) -> None:
    """Of some numbers and NaN, XLA's CPU backend may take one of the numbers for the largest."""
    w = random(64, 64)
    w[5, 7] = np.nan
    found = np.isfinite(dequantize(jax.jit(quantize)(jnp.asarray(w, dtype))))
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(64) != 7, (64, 64)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_of_a_table_with_what_is_no_number_is_not_finite(value: float, dtype: str) -> None:
    table = random(64, 64)
    table[5, 7] = value
    quantized = jax.jit(quantize_table)(jnp.asarray(table, dtype))
    with np.errstate(invalid="ignore"):  # 0 times infinity
        found = np.isfinite(np.asarray(quantized.weight, np.float32) * np.asarray(quantized.scales)[:, None])
    np.testing.assert_array_equal(found.any(axis=1), np.arange(64) != 5)
    np.testing.assert_array_equal(found.all(axis=1), np.arange(64) != 5)


def test_refined_blocks_mean_the_same() -> None:
    quantized = quantize(jnp.asarray(random(2, 16, 8)), num_blocks=2)
    np.testing.assert_array_equal(dequantize(quantized.refine(8)), dequantize(quantized))
    assert quantized.refine(8).num_blocks == 8
    with pytest.raises(ValueError, match="2 scale blocks over 16 rows cannot be cut into 3"):
        quantized.refine(3)


def test_indivisible_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=3 does not divide the 16 rows"):
        quantize(jnp.ones((16, 4)), num_blocks=3)


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w has shape \(16,\): give a matrix \[C, O\]"):
        quantize(jnp.ones(16))


def test_no_blocks_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=0 does not divide"):
        quantize(jnp.ones((16, 4)), num_blocks=0)
    with pytest.raises(ValueError, match="cannot be cut into 0"):
        quantize(jnp.ones((16, 4))).refine(0)


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_einsum_is_its_definition(num_blocks: int) -> None:
    plain, x = jnp.asarray(random(3, 16, 8)), jnp.asarray(random(5, 16))
    w = quantize(plain, num_blocks=num_blocks) if num_blocks else plain
    expected = np.einsum("mc,eco->meo", np.asarray(x, np.float64), np.asarray(dequantize(w), np.float64))
    np.testing.assert_allclose(einsum("mc,eco->meo", x, w), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("blocks", "devices", "refined"), [(1, 8, 1), (4, 8, 8), (8, 4, 8), (6, 4, 12), (8, 8, 8)])
def test_shards_hold_whole_scale_blocks(blocks: int, devices: int, refined: int) -> None:
    partitioner = Partitioner(make_mesh((1, devices)), ShardingRules())
    axes = ("layers", "heads", "embed")
    assert shardable_blocks(blocks, axes, partitioner) == refined
    w = quantize(jnp.asarray(random(2, 48, 8)), num_blocks=blocks).refine(refined)
    placed = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(partitioner.mesh, spec)),
        w,
        partition_specs(w, axes, partitioner),
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


def test_rounding_error_of_a_table_is_half_a_step_of_the_row() -> None:
    table = random(50, 16) * np.arange(50)[:, None]
    quantized = quantize_table(jnp.asarray(table))
    assert quantized.weight.dtype == jnp.int8
    assert quantized.scales.shape == (50,)
    restored = np.asarray(quantized.weight, np.float32) * np.asarray(quantized.scales)[:, None]
    assert (np.abs(restored - table) <= 0.501 * np.asarray(quantized.scales)[:, None]).all()


def test_rounding_a_table_holds_no_float32_copy_of_the_table() -> None:
    table = jax.ShapeDtypeStruct((4096, 256), jnp.bfloat16)
    compiled = jax.jit(quantize_table).lower(table).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < table.size


@pytest.mark.parametrize("quantise", [quantize, quantize_table])
def test_a_quantised_array_is_not_indexed_and_says_how_to_read_and_write_it(quantise) -> None:
    array = quantise(jnp.ones((4, 4)))
    message = r"is not indexed.*`weight` and `scales`.*dequantize.*`get_value\(\)` and written by `set_value\(\.\.\.\)`"
    with pytest.raises(ValueError, match=message):
        array[0]
    with pytest.raises(ValueError, match=message):
        array[0] = 1
    param = nnx.Param(array)
    np.testing.assert_array_equal(param[...].weight, array.weight)
    for index in (..., (1, 3)):
        with pytest.raises(ValueError, match=message):
            param[index] = 0.0
