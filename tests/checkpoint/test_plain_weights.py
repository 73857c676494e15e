"""int8 files loaded as plain weights: all, or those that no expression keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import EXPERT, FULLY, SMALL, TENSOR, WrittenCheckpoint, label, or_thorough, write_checkpoint

from grokjax import QuantizedArray, ShardingRules, describe, load, make_mesh
from grokjax.model import named_parameters

CONFIG = SMALL.replace(num_experts=4, num_layers=2)
PLACES = [((1, 1), TENSOR), ((1, 8), TENSOR), ((2, 4), EXPERT), ((2, 4), FULLY)]
MATRICES = (
    *(f"layers.attention.{name}" for name in ("query", "key", "value", "output")),
    *(f"layers.feed_forward.{name}" for name in ("gate", "up", "down")),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenCheckpoint:
    return write_checkpoint(tmp_path_factory.mktemp("release"), CONFIG, scale_blocks=4)


@pytest.mark.parametrize(("mesh", "rules"), or_thorough(PLACES, PLACES[1:3]), ids=label)
def test_plain_weights_are_what_the_int8_ones_stand_for(
    written: WrittenCheckpoint, mesh: tuple[int, int], rules: ShardingRules
) -> None:
    model = load(written.path, CONFIG, make_mesh(mesh), jnp.float32, quantized=False, rules=rules)
    values = {name: param.get_value() for name, param in named_parameters(model).items()}
    for name in MATRICES:
        expected = written.dequantised_stack(name.removeprefix("layers."))
        assert values[name].dtype == jnp.float32
        for shard in values[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model))
    info = describe(written.path, CONFIG)
    assert info.bytes_per_device(mesh, rules=rules, dtype=jnp.float32, quantized=False) == held


def test_expressions_say_what_stays_int8(written: WrittenCheckpoint) -> None:
    model = load(written.path, CONFIG, quantized=["feed_forward", r"attention\.key"], exclude=[r"layers\.1\..*query"])
    values = {name: named_parameters(model)[name].get_value() for name in MATRICES}
    is_int8 = {name: isinstance(value, QuantizedArray) for name, value in values.items()}
    assert is_int8 == {name: "feed_forward" in name or name.endswith("key") for name in MATRICES}
    query = written.dequantised_stack("attention.query").astype("bfloat16")
    np.testing.assert_array_equal(values["layers.attention.query"][0], query[0])
    assert values["layers.attention.query"][1].any()  # a fresh value, plain as its neighbour is


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        ("attention", r"quantized='attention': give true, false, or a list of regular expressions"),
        (["atention"], r"quantized='atention' is found in no weight that may be int8: those are layers\.attention\.q"),
        (["router"], r"quantized='router' is found in no weight that may be int8"),
        (["("], r"'\(' is not a regular expression"),
    ],
)
def test_what_says_nothing_about_int8_is_refused(
    written: WrittenCheckpoint, quantized: str | list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(written.path, CONFIG, quantized=quantized)
