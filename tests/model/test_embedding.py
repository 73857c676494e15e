"""The embedding table, plain and in int8: what it takes, lookup and logits on a mesh, its error, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import FULLY, TENSOR, TINY_DENSE, random_model
from goldens import load_case

from grokjax import load, make_mesh, save
from grokjax.model import forward, with_values
from grokjax.quantization import QuantizedTable
from grokjax.sharding import ShardingRules


@pytest.mark.parametrize("rules", [pytest.param(TENSOR, marks=pytest.mark.thorough), FULLY], ids=["tp", "fsdp"])
def test_a_quantised_table_gives_its_logits_on_a_mesh(rules: ShardingRules) -> None:
    """The same tokens and logits as with the table that the int8 one stands for."""
    config = TINY_DENSE
    place = {"mesh": make_mesh((2, 4)), "rules": rules}
    plain = random_model(config, dtype=jnp.float32, **place)
    model = random_model(config, dtype=jnp.float32, quantized_table=True, **place)
    table = model.embedding.table.get_value()
    assert isinstance(table, QuantizedTable)
    assert len(table.weight.sharding.device_set) == 8
    restored = table.weight.astype(jnp.float32) * table.scales[:, None]
    plain.embedding.table.set_value(jax.device_put(restored, plain.embedding.table.get_value().sharding))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 5))
    np.testing.assert_allclose(forward(model, tokens), forward(plain, tokens), atol=2e-5)
    np.testing.assert_allclose(forward(model, tokens[:, :1]), forward(plain, tokens[:, :1]), atol=2e-5)  # by columns


def test_error_of_a_quantised_table_is_as_documented() -> None:
    """Against the release in float32: the bounds that docs/model.md names, of logits with a deviation of 2."""
    golden = load_case("tiny-moe-s8")
    model = load(golden.checkpoint, golden.config, dtype=jnp.float32, quantized_table=True)
    real = np.arange(golden.tokens.shape[1])[None] < golden.lengths[:, None]
    error = (np.asarray(forward(model, golden.tokens)) - golden.arrays["float32"]["full_logits"])[real]
    assert np.sqrt(np.mean(error**2)) < 0.07
    assert np.abs(error).max() < 0.6


def test_scales_of_a_quantised_table_have_a_derivative_of_looking_tokens_up() -> None:
    """A token that occurs twice counts twice, one that does not occur has none."""
    model = random_model(TINY_DENSE, dtype=jnp.float32, quantized_table=True)
    table, tokens = model.embedding.table.get_value(), np.array([[5, 7, 5]])
    cotangents = np.random.default_rng(0).standard_normal((1, 3, TINY_DENSE.model_dim)).astype(np.float32)

    def total(scales: jax.Array) -> jax.Array:
        moved = with_values(model, {"embedding.table": dataclasses.replace(table, scales=scales)})
        return jnp.sum(moved.embedding.embed(tokens) * cotangents)

    expected = np.zeros(table.shape[0])
    for token, cotangent in zip(tokens[0], cotangents[0], strict=True):
        expected[token] += TINY_DENSE.embedding_multiplier * np.vdot(table.weight[token], cotangent)
    np.testing.assert_allclose(jax.grad(total)(table.scales), expected, rtol=1e-5)


def test_tokens_are_lists_of_integers_too() -> None:
    model = random_model(TINY_DENSE, mesh=make_mesh((1, 1)))
    np.testing.assert_array_equal(model.hidden_states([[1, 2, 3]]), model.hidden_states(jnp.array([[1, 2, 3]])))
    for tokens, message in (
        ([1, 2, 3], r"tokens must have shape \[batch, length\]; these have shape \(3,\)"),
        ("hello", r'tokens must be integers, not text: encode it first, as in \[tokenizer.encode\("hello"\)\]'),
        ([[1.5]], "tokens must be integers, not float64"),
    ):
        with pytest.raises(ValueError, match=message):
            model.hidden_states(tokens)


def test_saving_a_quantised_table_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="the embedding table is int8, and checkpoints hold it plain: save the model"):
        save(random_model(TINY_DENSE, quantized_table=True), tmp_path / "model")
