"""The embedding table, plain and int8: lookup and logits on every form, mesh and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import FULLY, TENSOR
from goldens import load_case

from grokjax import GrokConfig, init, load, make_mesh, save
from grokjax.model import forward
from grokjax.model.embedding import direct_unembed, integer_unembed, padded_unembed
from grokjax.quantization import QuantizedTable, quantize_table
from grokjax.sharding import ShardingRules


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def test_rounding_error_is_half_a_step_of_the_row() -> None:
    table = random(50, 16) * np.arange(50)[:, None]
    quantized = quantize_table(jnp.asarray(table))
    assert quantized.weight.dtype == jnp.int8
    assert quantized.scales.shape == (50,)
    restored = np.asarray(quantized.weight, np.float32) * np.asarray(quantized.scales)[:, None]
    assert (np.abs(restored - table) <= 0.501 * np.asarray(quantized.scales)[:, None]).all()


def test_rounding_holds_no_float32_copy_of_the_table() -> None:
    table = jax.ShapeDtypeStruct((4096, 256), jnp.bfloat16)
    compiled = jax.jit(quantize_table).lower(table).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < table.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17])
def test_every_form_of_the_product_is_its_definition(num_rows: int, dtype: str) -> None:
    """With 1030 tokens, which blocks of 1024 do not divide; a row of zeros among the others."""
    table = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (1030, 24)), jnp.int8)
    x = jnp.asarray(random(num_rows, 24)).astype(dtype).at[num_rows // 2 - 1].multiply(0)
    expected = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    for form in (integer_unembed, direct_unembed, padded_unembed):
        out = np.asarray(jax.jit(form)(x, table))
        tolerance = {"float32": 1e-6, "bfloat16": 5e-5}[dtype]
        np.testing.assert_allclose(out, expected, atol=tolerance * max(1, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("rules", [pytest.param(TENSOR, marks=pytest.mark.thorough), FULLY], ids=["tp", "fsdp"])
def test_a_quantised_table_gives_its_logits_on_a_mesh(rules: ShardingRules) -> None:
    """The same tokens and logits as with the table that the int8 one stands for."""
    config = GrokConfig.tiny()
    place = {"mesh": make_mesh((2, 4)), "rules": rules}
    plain = init(config, dtype=jnp.float32, **place)
    model = init(config, dtype=jnp.float32, quantized_table=True, **place)
    table = model.embedding.table.get_value()
    assert isinstance(table, QuantizedTable)
    assert len(table.weight.sharding.device_set) == 8
    restored = table.weight.astype(jnp.float32) * table.scales[:, None]
    plain.embedding.table.set_value(jax.device_put(restored, plain.embedding.table.get_value().sharding))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 5))
    np.testing.assert_allclose(forward(model, tokens), forward(plain, tokens), atol=2e-5)


def test_error_of_a_quantised_table_is_as_documented() -> None:
    """Against the release in float32: the bounds that docs/model.md names, of logits with a deviation of 2."""
    golden = load_case("tiny-moe-s8")
    model = load(golden.checkpoint, golden.config, dtype=jnp.float32, quantized_table=True)
    real = np.arange(golden.tokens.shape[1])[None] < golden.lengths[:, None]
    error = (np.asarray(forward(model, golden.tokens)) - golden.arrays["float32"]["full_logits"])[real]
    assert np.sqrt(np.mean(error**2)) < 0.07
    assert np.abs(error).max() < 0.6


def test_saving_a_quantised_table_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="the embedding table is int8, and checkpoints hold it plain: save the model"):
        save(init(GrokConfig.tiny(), quantized_table=True), tmp_path / "model")
