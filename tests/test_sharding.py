"""Meshes, rules, and where every parameter and cache entry lies."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from grokjax.cache import KVCache
from grokjax.config import GrokConfig
from grokjax.model import abstract_model, init
from grokjax.sharding import Partitioner, ShardingRules, make_mesh

TINY = GrokConfig.tiny()


def partitioner(mesh: tuple[int, int], config: GrokConfig = TINY, **changes: str | None) -> Partitioner:
    return Partitioner.create(config, make_mesh(mesh), ShardingRules().replace(**changes))


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 4), (8, 1), (1, 2)])
def test_mesh(shape: tuple[int, int]) -> None:
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
    ],
)
def test_impossible_meshes(local: tuple[int, int], between_hosts: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(local, between_hosts)


def test_specs_of_logical_axes() -> None:
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
def test_refused_specs(axes: tuple[str, ...], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partitioner((2, 4)).spec(axes, shape)


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
def test_configurations_that_do_not_fit(config: GrokConfig, changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partitioner((1, 8), config, **changes)


def test_the_data_axis_must_divide_what_it_shards() -> None:
    with pytest.raises(ValueError, match="the mesh axis 'data' of 8 devices does not divide model_dim=60"):
        partitioner((8, 1), TINY.replace(model_dim=60), embed="data")


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "copies"), [((1, 8), 8, 1), ((1, 8), 4, 2), ((2, 4), 1, 4), ((8, 1), 4, 1)]
)
def test_groups_of_devices_for_each_kv_head(mesh: tuple[int, int], kv_heads: int, copies: int) -> None:
    config = TINY.replace(num_kv_heads=kv_heads)
    assert partitioner(mesh, config).kv_copies(config) == copies
    cache = KVCache.create(config, 1, 8, mesh=make_mesh(mesh))
    assert cache.keys.shape[2] == kv_heads * copies
    assert cache.keys.addressable_shards[0].data.shape[2] == max(1, kv_heads // mesh[1])


EXPECTED = {
    "tensor": {"query": P(None, None, "model"), "output": P(None, "model", None), "table": P("model", None)}
    | {"gate": P(None, None, None, "model"), "down": P(None, None, "model", None), "router": P(None, None, None)},
    "expert": {"query": P(None, None, "model"), "gate": P(None, "model", None, None)}
    | {"down": P(None, "model", None, None)},
    "fully": {"query": P(None, "data", "model"), "output": P(None, "model", "data"), "table": P("model", "data")}
    | {"gate": P(None, None, "data", "model"), "down": P(None, None, "model", "data")},
}
RULES = {
    "tensor": ShardingRules.tensor_parallel(),
    "expert": ShardingRules.expert_parallel(),
    "fully": ShardingRules().replace(embed="data"),
}


@pytest.mark.parametrize("name", RULES)
def test_every_parameter_lies_where_the_rules_say(name: str) -> None:
    model = init(TINY, mesh=make_mesh((2, 4)), rules=RULES[name])
    found = {path[-1]: param.get_value() for path, param in nnx.to_flat_state(nnx.split(model)[1])}
    for leaf, spec in EXPECTED[name].items():
        value = found[leaf]
        assert getattr(value, "weight", value).sharding.spec == spec, leaf


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


def test_random_weights_are_the_same_on_every_mesh() -> None:
    one, many = init(TINY), init(TINY, mesh=make_mesh((2, 4)), rules=RULES["fully"])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert (jax.device_get(a) == jax.device_get(b)).all()
