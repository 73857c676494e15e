"""How a model and its parameters print, that its layers are views for reading, and that a copy is one."""

import copy
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope
from builders import SMALL, random_model
from flax import nnx

from grokjax import Grok, forward, make_mesh
from grokjax.model import abstract_model, named_parameters, with_quantized_table
from grokjax.sharding import Partitioner

CONFIG = SMALL.replace(num_layers=2)


@functools.cache
def model() -> Grok:
    """Of int8 weights, on 8 devices; tests change copies of it."""
    return random_model(CONFIG, mesh=make_mesh((2, 4)))


def test_a_model_prints_each_parameter_once() -> None:
    text = repr(model())
    lines = text.splitlines()
    assert re.fullmatch(r"Grok\( # 88,864 parameters, [\d.]+ KiB, [\d.]+ KiB on each of 8 devices", lines[0]), lines[0]
    for name in ("config", "dtype", "mesh", "rules", *named_parameters(model())):
        assert sum(line.startswith(f"  {name}=") for line in lines) == 1, name
    assert text.count("GrokConfig(") == text.count("ShardingRules(") == 1
    assert "  mesh={'data': 2, 'model': 4}," in lines
    assert "  final_norm.scale=float32[32], 128 Bytes," in lines
    [query] = [line for line in lines if "attention.query" in line]
    assert "QuantizedArray(weight=int8[2,32,64@model], scales=bfloat16[2,1,64@model]" in query
    assert not re.search(r"\d+(\.\d+)?, -?\d+\.\d+, ", text), "numbers of an array"
    assert len(lines) < 30


def test_a_model_displays_as_it_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert treescope.render_to_text(model()).split() == repr(model()).split()
    nnx.display(model())
    assert capsys.readouterr().out.split() == repr(model()).split()


@pytest.mark.parametrize(
    "of",
    [
        lambda: model().layers,
        lambda: model().layers.attention,
        lambda: model().layers.feed_forward.gate,
        lambda: model().layers.feed_forward.router,
        lambda: nnx.state(model()),
        lambda: abstract_model(CONFIG, Partitioner.create(CONFIG), dtype=jnp.float32, quantized=False),
    ],
    ids=["layers", "attention", "int8 parameter", "plain parameter", "state", "abstract"],
)
def test_what_a_model_consists_of_prints_no_numbers(of) -> None:
    text = repr(of())
    assert re.search(r"int8\[2,|float32\[2,", text)
    assert "Array([" not in text
    assert "partitioner" not in text
    assert len(text) < 6000


def test_a_view_says_that_it_is_one() -> None:
    assert "a view for reading" in repr(model().layers[1]).splitlines()[0]
    assert "a view for reading" in repr(model().layers[1].attention).splitlines()[0]
    assert "a view" not in repr(model().layers)


def set_items(view) -> None:
    view.feed_forward.router[...] = 0.0


def set_one_item(view) -> None:
    view.feed_forward.router[0, 3] = 0.0


def set_value(view) -> None:
    view.attention.query.set_value(view.attention.query.get_value())


def copy_from(view) -> None:
    view.attention.query.copy_from(model().layers[0].attention.query)


def set_parameter(view) -> None:
    view.attention.query = nnx.Param(jnp.zeros((1, 32, 64)))


def set_module(view) -> None:
    view.attention = model().layers.attention


def update(view) -> None:
    nnx.update(view, nnx.state(model().layers[0]))


def update_of_a_clone(view) -> None:
    nnx.clone(view).feed_forward.router[...] = 0.0


@pytest.mark.parametrize(
    "write",
    [
        set_items,
        set_one_item,
        set_value,
        copy_from,
        set_parameter,
        set_module,
        update,
        update_of_a_clone,
    ],
)
def test_a_view_of_a_layer_refuses_every_write_and_says_where_to_write(write) -> None:
    with pytest.raises(
        ValueError, match=r"view of one layer.*would change a copy.*model\.layers\.feed_forward\.router"
    ):
        write(model().layers[1])


@pytest.mark.parametrize("transform", [jax.jit, nnx.jit, nnx.remat])
def test_a_view_can_be_read_under_transformations(transform) -> None:
    x = jnp.ones((1, 2, 32))
    layer = random_model(CONFIG, dtype=jnp.float32).layers[1]
    expected = layer.feed_forward.router_logits(x, layer=jnp.int32(0))
    logits = transform(lambda layer, x: layer.feed_forward.router_logits(x, layer=jnp.int32(0)))(layer, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


@pytest.mark.parametrize("index", ["1", slice(0, 1), 0.0])
def test_what_is_no_layer_s_number_is_refused(index) -> None:
    with pytest.raises(TypeError, match="is not one layer: give its number, from 0 to 1"):
        model().layers[index]


@pytest.mark.parametrize("copied", [nnx.clone, copy.deepcopy, with_quantized_table])
def test_a_change_of_a_copy_changes_no_other_model(copied) -> None:
    original = random_model(CONFIG)
    other = copied(original)
    for param in named_parameters(other).values():
        param.set_value(jax.tree.map(jnp.zeros_like, param.get_value()))
    assert all(
        np.any(np.asarray(leaf))
        for leaf in jax.tree.leaves([p.get_value() for p in named_parameters(original).values()])
    )


@pytest.mark.parametrize(
    ("name", "wrong", "given"),
    [
        ("final_norm.scale", lambda old: old[:-1], "float32[31]"),
        ("final_norm.scale", lambda old: old.astype(jnp.bfloat16), "bfloat16[32]"),
        ("final_norm.scale", lambda old: 1.0, "float"),
        ("layers.feed_forward.down", lambda old: old.weight, "int8[2,8,48@model,32]"),
        (
            "layers.feed_forward.down",
            lambda old: jax.tree.map(lambda leaf: leaf[:1], old),
            "QuantizedArray(weight=int8[1,8,48@model,32], scales=bfloat16[1,8,1,32], 12.5 KiB)",
        ),
        (
            "layers.feed_forward.down",
            lambda old: dataclasses.replace(old, scales=old.scales[:, 0]),
            "QuantizedArray(weight=int8[2,8,48@model,32], scales=bfloat16[2,1,32], 24.1 KiB)",
        ),
    ],
    ids=["shape", "dtype", "number", "kind", "shape of int8", "shape of scales"],
)
def test_a_value_of_another_form_is_refused_where_it_is_given(name: str, wrong, given: str) -> None:
    param = named_parameters(nnx.clone(model()))[name]
    old = param.get_value()
    with pytest.raises(ValueError, match=rf"the parameter holds .*, and {re.escape(given)} is given: .* same shape"):
        param.set_value(wrong(old))
    assert jax.tree.leaves(param.get_value())[0] is jax.tree.leaves(old)[0]


def test_a_written_stack_is_used_and_stays_where_it_was() -> None:
    """docs/model.md, "Changing weights", on a mesh."""
    changed, tokens = nnx.clone(model()), [[3, 4, 5]]
    before = forward(changed, tokens)
    router = changed.layers.feed_forward.router
    sharding = router.get_value().sharding
    router[1] = 0.0
    assert router.get_value().sharding == sharding
    down = changed.layers.feed_forward.down
    old = down.get_value()
    down.set_value(jax.tree.map(lambda stack: stack.at[1, 3].set(0), old))
    for leaf, was in zip(jax.tree.leaves(down.get_value()), jax.tree.leaves(old), strict=True):
        assert leaf.sharding.is_equivalent_to(was.sharding, leaf.ndim)
    assert (np.asarray(forward(changed, tokens)) != np.asarray(before)).any()
    np.testing.assert_array_equal(forward(model(), tokens), before)
