"""Meshes, rules, and where every parameter and cache entry lies."""

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from grokjax.cache import KVCache
from grokjax.config import GrokConfig
from grokjax.model import Grok, abstract_model, forward, init, prefill
from grokjax.quantization import QuantizedArray, partition_specs
from grokjax.sharding import (
    Partitioner,
    ShardingRules,
    default_extents,
    default_mesh,
    device_bytes,
    make_mesh,
    spread_over_hosts,
)

TINY = GrokConfig.tiny()
SMALL = TINY.replace(num_layers=1)


def partitioner(mesh: tuple[int, int], config: GrokConfig = TINY, **changes: str | None) -> Partitioner:
    return Partitioner.create(config, make_mesh(mesh), ShardingRules().replace(**changes))


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 4), (8, 1), (1, 2)])
def test_mesh_has_the_named_axes(shape: tuple[int, int]) -> None:
    mesh = make_mesh(shape)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("local", "between_hosts", "message"),
    [
        ((3, 4), (1, 1), "needs 12 devices and there are 8"),
        ((1, 4), (1, 4), "needs 16 devices and there are 8"),
        ((1, 2), (1, 2), "needs 4 devices and there are 8"),
        ((0, 8), (1, 1), "mesh extents must be 1 or more"),
        ((1, 4), (1, 2), r"between_hosts=\(1, 2\) needs 2 hosts and the devices belong to 1"),
    ],
)
def test_impossible_meshes_are_refused(local: tuple[int, int], between_hosts: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(local, between_hosts)


def test_a_mesh_that_leaves_out_a_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for the others without end; devices that are named may be those of one process."""
    devices = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ValueError, match=r"leaves out all devices of process 1: .* between_hosts=\(2, 1\)"):
        make_mesh((1, 4))
    with pytest.raises(ValueError, match=r"needs 2 devices and there are 8: over several hosts .* all of them"):
        make_mesh((1, 1), (1, 2))
    monkeypatch.undo()
    assert make_mesh((1, 4), devices=jax.devices()[4:]).devices.tolist() == [jax.devices()[4:]]


def test_without_a_mesh_a_model_and_its_cache_lie_on_all_devices() -> None:
    with jax.default_device(None):
        model, cache = init(SMALL, dtype=jnp.float32), KVCache.create(SMALL, 1, 8)
        assert model.partitioner.mesh == default_mesh(SMALL) == cache.keys.sharding.mesh == make_mesh((1, 8))
        logits, _ = prefill(model, [[7, 8, 9]], [3], cache)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("device", [jax.devices()[3], "cpu"], ids=str)
def test_a_default_device_that_the_user_has_set_is_the_whole_mesh(device: jax.Device | str) -> None:
    with jax.default_device(device):
        (found,) = KVCache.create(TINY, 1, 8).keys.devices()
        assert found == (jax.devices()[0] if device == "cpu" else device)
        assert default_mesh(TINY).devices.tolist() == [[found]]


@pytest.mark.parametrize(
    ("changes", "rules", "extents"),
    [
        ({}, {}, (1, 8)),
        ({"num_heads": 12}, {}, (1, 4)),
        ({"num_heads": 12}, {"heads": None, "kv_heads": None}, (1, 8)),
        ({"num_experts": 4}, {"experts": "model", "ffn": None}, (1, 4)),
        ({"vocab_size": 510, "num_heads": 12, "num_kv_heads": 6, "ffn_dim": 96}, {}, (1, 6)),
    ],
    ids=str,
)
def test_the_default_mesh_has_as_many_devices_as_divide_the_sizes(
    changes: dict[str, int], rules: dict[str, str | None], extents: tuple[int, int]
) -> None:
    with jax.default_device(None):
        assert default_mesh(TINY.replace(**changes), ShardingRules().replace(**rules)).devices.shape == extents


def test_over_several_hosts_the_default_mesh_leaves_no_device_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_extents(TINY, None, 16, uses_all=True) == (2, 8)
    assert default_extents(TINY.replace(num_heads=12), None, 6, uses_all=True) == (3, 2)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="3 hosts cannot share a mesh of 2 x 4: make one of the numbers a multiple"):
        spread_over_hosts(2, 4)


def test_specs_follow_the_rules() -> None:
    place = partitioner((2, 4))
    assert place.spec(("layers", "embed", "heads"), (2, 64, 128)) == P(None, None, "model")
    assert place.spec(("batch", None), (4, 9)) == P("data", None)
    # Rows that the axis does not divide are computed on all of its devices.
    assert place.spec(("batch", None), (3, 9)) == P(None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("features",), (8,), "'features' is not a logical axis"),
        (("heads", "ffn"), (8, 8), "put two dimensions on one mesh axis"),
        (("heads",), (6,), "the mesh axis 'model' of 4 devices does not divide heads of size 6: choose a mesh"),
        (("heads",), (8, 8), "has 2 dimensions and its logical axes"),
    ],
)
def test_axes_that_cannot_be_are_refused(axes: tuple[str, ...], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partitioner((2, 4)).spec(axes, shape)


def test_scale_blocks_that_the_axis_cuts_are_refused() -> None:
    abstract = QuantizedArray(jnp.zeros((64, 8), jnp.int8), jnp.ones((4, 8)))
    with pytest.raises(ValueError, match="the mesh axis 'model' of 8 devices does not divide heads of size 4"):
        partition_specs(abstract, ("heads", "embed"), partitioner((1, 8)))


COLLISION = "put two dimensions on one mesh axis .*: change a rule of ShardingRules"


@pytest.mark.parametrize("changes", [{"experts": "model"}, {"embed": "model"}], ids=str)
def test_colliding_rules_of_weights_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=COLLISION):
        abstract_parameters((2, 4), ShardingRules().replace(**changes))


def test_colliding_rules_of_the_cache_are_refused() -> None:
    with pytest.raises(ValueError, match=COLLISION):
        KVCache.abstract(TINY, 4, 8, mesh=make_mesh((2, 4)), rules=ShardingRules(batch="model"))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TINY.replace(num_heads=4), {}, "does not divide num_heads=4: choose a mesh whose 'model' extent divides it"),
        (TINY.replace(ffn_dim=100), {}, "does not divide ffn_dim=100"),
        (TINY.replace(vocab_size=509), {}, "does not divide vocab_size=509"),
        (TINY.replace(num_experts=4), {"experts": "model", "ffn": None}, "does not divide num_experts=4"),
        (TINY.replace(num_heads=24, num_kv_heads=6), {}, "num_kv_heads=6.* A longer axis works too"),
        (TINY, {"heads": None}, "must name the same mesh axis: a device needs the kv heads of its query heads"),
        (TINY, {"ffn": "experts"}, "the rule ffn='experts' names no axis of the mesh"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    config: GrokConfig, changes: dict[str, str | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        partitioner((1, 8), config, **changes)


def test_the_data_axis_must_divide_what_it_shards() -> None:
    with pytest.raises(ValueError, match="the mesh axis 'data' of 8 devices does not divide model_dim=60"):
        partitioner((8, 1), TINY.replace(model_dim=60), embed="data")


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "copies"), [((1, 8), 8, 1), ((1, 8), 4, 2), ((2, 4), 2, 2), ((2, 4), 1, 4), ((8, 1), 4, 1)]
)
def test_groups_of_devices_share_each_kv_head(mesh: tuple[int, int], kv_heads: int, copies: int) -> None:
    config = TINY.replace(num_kv_heads=kv_heads)
    assert partitioner(mesh, config).kv_copies(config) == copies
    cache = KVCache.create(config, 1, 8, mesh=make_mesh(mesh))
    assert cache.keys.shape[2] == kv_heads * copies
    assert cache.keys.addressable_shards[0].data.shape[2] == max(1, kv_heads // mesh[1])
    # The weights are split evenly all the same, each head between the devices of its group.
    key = abstract_parameters(mesh, ShardingRules(), config)["key"].weight
    assert key.sharding.shard_shape(key.shape) == (2, 64, kv_heads * 16 // mesh[1])


RULES = {
    "tensor": ShardingRules.tensor_parallel(),
    "expert": ShardingRules.expert_parallel(),
    "fully": ShardingRules().replace(embed="data"),
}
# Where a weight lies under the three sets of rules, in their order; all others are whole on every device.
INTO_HEADS = (P(None, None, "model"), P(None, None, "model"), P(None, "data", "model"))
INTO_EXPERTS = (P(None, None, None, "model"), P(None, "model", None, None), P(None, None, "data", "model"))
EXPECTED = {
    "table": (P("model", None), P("model", None), P("model", "data")),
    "query": INTO_HEADS,
    "key": INTO_HEADS,
    "value": INTO_HEADS,
    "output": (P(None, "model", None), P(None, "model", None), P(None, "model", "data")),
    "gate": INTO_EXPERTS,
    "up": INTO_EXPERTS,
    "down": (P(None, None, "model", None), P(None, "model", None, None), P(None, None, "model", "data")),
}


def abstract_parameters(
    mesh: tuple[int, int], rules: ShardingRules, config: GrokConfig = TINY, *, quantized: bool = True
) -> dict[str, Any]:
    """Shapes and shardings of all parameters by the last word of their path; those of the norms run together."""
    place = Partitioner.create(config, make_mesh(mesh), rules)
    model = abstract_model(config, place, dtype=jnp.float32, quantized=quantized)
    return {path[-1]: param.get_value() for path, param in nnx.to_flat_state(nnx.split(model)[1])}


@pytest.mark.parametrize("quantized", [True, False], ids=["int8", "plain"])
@pytest.mark.parametrize(("column", "rules"), list(enumerate(RULES.values())), ids=RULES)
def test_every_parameter_lies_where_the_rules_say(column: int, rules: ShardingRules, quantized: bool) -> None:
    found = abstract_parameters((2, 4), rules, quantized=quantized)
    assert set(found) == {*EXPECTED, "router", "scale"}
    for name, value in found.items():
        if name not in EXPECTED:
            assert value.sharding.is_fully_replicated, name
            continue
        spec = EXPECTED[name][column]
        assert getattr(value, "weight", value).sharding.spec == spec, name
        if isinstance(value, QuantizedArray):
            # One block of scales belongs to all rows of the weight; it follows the other axes.
            assert value.scales.sharding.spec == P(*spec[:-2], None, spec[-1]), name


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_nothing_large_of_the_real_model_is_whole_on_a_device(rules: ShardingRules) -> None:
    config = GrokConfig.grok_1()
    model = abstract_model(
        config, Partitioner.create(config, make_mesh((1, 8)), rules), dtype=jnp.bfloat16, quantized=True
    )
    leaves = jax.tree_util.tree_leaves_with_path(nnx.split(model)[1])
    total = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    per_device = 0
    for path, leaf in leaves:
        shard = leaf.sharding.shard_shape(leaf.shape)
        per_device += leaf.dtype.itemsize * math.prod(shard)
        # Norms, the router and the scales of outputs stay whole: 12 MiB at most of a stack of 64 layers.
        if shard == leaf.shape:
            assert leaf.size * leaf.dtype.itemsize <= 12 << 20, jax.tree_util.keystr(path)
    assert per_device < 1.01 * total / 8


@pytest.mark.parametrize("rules", ["expert", "fully"])
def test_random_weights_are_the_same_on_every_mesh(rules: str) -> None:
    mesh = make_mesh((2, 4))
    place = Partitioner.create(SMALL, mesh, RULES[rules])
    planned = jax.tree.leaves(abstract_model(SMALL, place, dtype=jnp.bfloat16, quantized=True))
    many = jax.tree.leaves(init(SMALL, mesh=mesh, rules=RULES[rules]))
    for a, b, plan in zip(jax.tree.leaves(on_one_device()), many, planned, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert b.sharding.is_equivalent_to(plan.sharding, b.ndim)
        assert {shard.data.shape for shard in b.addressable_shards} == {plan.sharding.shard_shape(b.shape)}


@functools.cache
def on_one_device() -> Grok:
    return init(SMALL)


def test_bytes_of_arrays_without_shardings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) has no sharding"):
        device_bytes([jax.ShapeDtypeStruct((2,), jnp.int8)])


@pytest.mark.parametrize(
    "mesh",
    [
        jax.make_mesh((2, 4), ("data", "model")),
        jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit)),
        Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Manual,) * 2),
        Mesh(np.array(jax.devices()).reshape(2, 4).T, ("model", "data")),
        jax.make_mesh((2, 1, 4), ("data", "unused", "model")),
    ],
    ids=["explicit", "mixed", "manual", "transposed", "three axes"],
)
def test_a_mesh_of_any_kind_makes_the_same_model(mesh: Mesh) -> None:
    tokens = np.arange(1, 13).reshape(2, 6)
    expected = forward(init(SMALL, dtype=jnp.float32, mesh=make_mesh((2, 4))), tokens)
    np.testing.assert_array_equal(forward(init(SMALL, dtype=jnp.float32, mesh=mesh), tokens), expected)


def test_shapes_need_no_devices() -> None:
    mesh = AbstractMesh((2, 4), ("data", "model"))
    cpu = AbstractMesh((2, 4), ("data", "model"), abstract_device=AbstractDevice("cpu", num_cores=None, platform="cpu"))
    on_devices = KVCache.abstract(TINY, 2, 8, mesh=make_mesh((2, 4)))
    for cache in (KVCache.abstract(TINY, 2, 8, mesh=mesh, dtype=jnp.float32), KVCache.abstract(TINY, 2, 8, mesh=cpu)):
        assert cache.keys.dtype == on_devices.keys.dtype
        assert cache.keys.sharding.spec == on_devices.keys.sharding.spec
    assert jax.tree.leaves(jax.eval_shape(lambda: init(SMALL, mesh=mesh)))[0].shape == (512, 64)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda mesh: init(SMALL, mesh=mesh), "which has no devices: give a Mesh of devices, such as make_mesh makes"),
        (lambda mesh: KVCache.create(TINY, 2, 8, mesh=mesh, dtype=jnp.float32), "which has no devices: give a Mesh"),
        (lambda mesh: KVCache.abstract(TINY, 2, 8, mesh=mesh), "does not say for which devices.*name that dtype"),
        (lambda _: init(SMALL, mesh=(2, 4)), r"mesh=\(2, 4\) is a tuple and must be a jax.sharding.Mesh: make one"),
        (lambda _: init(SMALL, mesh=jax.make_mesh((8,), ("x",))), r"has \('x',\): name one of these in the rule, or"),
    ],
)
def test_meshes_that_cannot_be_are_refused(ask: Callable[[AbstractMesh], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(AbstractMesh((2, 4), ("data", "model")))
