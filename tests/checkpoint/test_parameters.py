"""The table of parameters: it lists the model's, with the shapes that the model itself and docs/model.md give them."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from builders import ROOT

from grokjax import GrokConfig, init
from grokjax.checkpoint import parameter_shapes
from grokjax.checkpoint.parameters import PARAMETERS, Part, find_parameter, parts_of, stack_name, units_of
from grokjax.model import named_parameters
from grokjax.quantization import QuantizedArray

MOE = GrokConfig.tiny()
DENSE = MOE.replace(num_experts=1, experts_per_token=1)
LETTERS = {
    "V": MOE.vocab_size,
    "D": MOE.model_dim,
    "N * H": MOE.num_heads * MOE.head_dim,
    "K * H": MOE.num_kv_heads * MOE.head_dim,
    "E": MOE.num_experts,
    "F": MOE.ffn_dim,
}


def values_of(config: GrokConfig) -> dict[str, object]:
    return {name: param.get_value() for name, param in named_parameters(init(config, dtype=jnp.float32)).items()}


def test_the_table_lists_the_parameters_of_a_model_and_which_may_be_int8() -> None:
    found = {name: isinstance(value, QuantizedArray) for name, value in values_of(MOE).items()}
    assert found == {path: row.is_quantizable for path, row in PARAMETERS.items()}
    assert set(PARAMETERS) - set(values_of(DENSE)) == {"layers.feed_forward.router"}


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["experts", "dense"])
def test_each_layer_has_the_shapes_of_the_stacks(config: GrokConfig) -> None:
    shapes, values = parameter_shapes(config), values_of(config)
    assert {stack_name(name) for name in shapes} == values.keys()
    for name, shape in shapes.items():
        value = values[stack_name(name)]
        weight = value.weight if isinstance(value, QuantizedArray) else np.asarray(value)
        layers = (config.num_layers,) if name.startswith("layers.") else ()
        dense = (1,) if config is DENSE and find_parameter(name).kind == "expert" else ()
        assert weight.shape == (*layers, *dense, *shape)


def test_the_shapes_are_those_of_the_documented_table() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| \[(.+?)\] \|", (ROOT / "docs" / "model.md").read_text(), re.MULTILINE)
    documented = {path: tuple(LETTERS[letter] for letter in shape.split(", ") if letter != "L") for path, shape in rows}
    assert documented == {stack_name(name): shape for name, shape in parameter_shapes(MOE).items()}


def test_layers_come_in_numeric_order_after_what_is_outside_them() -> None:
    shapes = parameter_shapes(MOE.replace(num_layers=12))
    assert list(shapes)[:3] == ["embedding.table", "final_norm.scale", "layers.0.attention.query"]
    layers = [Part(name).layer for name in shapes][2:]
    assert layers == [layer for layer in range(12) for _ in range(12)]


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["experts", "dense"])
def test_units_hold_each_part_once_and_a_matrix_of_an_expert_alone(config: GrokConfig) -> None:
    units = units_of(config)
    parts = [part for unit in units for part in unit.parts]
    assert sorted(part.name for part in parts) == sorted(
        part.name for name in parameter_shapes(config) for part in parts_of(name, config)
    )
    assert len(set(parts)) == len(parts)
    alone = [unit for unit in units if find_parameter(unit.parts[0].parameter).kind == "expert"]
    assert len(alone) == 3 * config.num_experts * config.num_layers
    assert all(len(unit.parts) == 1 and unit.name == unit.parts[0].name for unit in alone)


@pytest.mark.parametrize("path", ["layers.1.feed_forward.gates", "layers.one.attention.key", "lm_head"])
def test_what_is_not_in_the_table_is_not_found(path: str) -> None:
    with pytest.raises(KeyError):
        find_parameter(path)
