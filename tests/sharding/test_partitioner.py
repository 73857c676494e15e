"""What rules allow, and where every parameter and cache entry lies by them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from grokjax.cache import KVCache
from grokjax.config import GrokConfig
from grokjax.model import Grok, abstract_model, init
from grokjax.quantization import QuantizedArray, partition_specs
from grokjax.sharding import (
    Partitioner,
    ShardingRules,
    device_bytes,
    make_mesh,
)

TINY = GrokConfig.tiny()
SMALL = TINY.replace(num_layers=1)


def partitioner(mesh: tuple[int, int], config: GrokConfig = TINY, **changes: str | None) -> Partitioner:
    return Partitioner.create(config, make_mesh(mesh), ShardingRules().replace(**changes))


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


@pytest.mark.parametrize("make", [init, lambda config: KVCache.create(config, 1)], ids=["model", "cache"])
def test_the_name_of_a_configuration_is_none(make: Callable[[Any], object]) -> None:
    message = r"the configuration must be a GrokConfig, such as GrokConfig\.grok_1\(\) .* makes, not 'tiny'"
    with pytest.raises(ValueError, match=message):
        make("tiny")


def test_bytes_of_arrays_without_shardings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) has no sharding"):
        device_bytes([jax.ShapeDtypeStruct((2,), jnp.int8)])
