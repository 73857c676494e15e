"""Loading: each device is given its own slice of each file, and what does not fit is refused."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import DENSE, EXPERT, FULLY, SMALL, TENSOR, write_checkpoint

from grokjax import CheckpointError, QuantizedArray, ShardingRules, dequantize, load, make_mesh
from grokjax.testing import write_release_checkpoint

PROJECTIONS = (
    *(f"attention.{name}" for name in ("query", "key", "value", "output")),
    *(f"feed_forward.{name}" for name in ("gate", "up", "down")),
)


def stack_of(model, name: str) -> jax.Array | QuantizedArray:
    part, leaf = name.split(".")
    return getattr(getattr(model.layers, part), leaf).get_value()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    "rules",
    [TENSOR, EXPERT, FULLY],
    ids=["tensor", "expert", "fully"],
)
def test_every_shard_is_its_slice_of_the_files(tmp_path: Path, rules: ShardingRules) -> None:
    checkpoint = write_checkpoint(tmp_path, SMALL.replace(num_layers=2), scale_blocks=4)
    model = load(checkpoint.path, checkpoint.config, make_mesh((2, 4)), rules=rules)
    num_shards = 8 if rules.embed else 4
    for name in PROJECTIONS:
        value, stored = stack_of(model, name), checkpoint.stack(name)
        assert value.weight.dtype == jnp.int8
        assert value.scales.dtype == jnp.bfloat16
        for shard in value.weight.addressable_shards:
            np.testing.assert_array_equal(shard.data, stored[shard.index])
            assert shard.data.size == stored.size // num_shards
        np.testing.assert_array_equal(dequantize(value), checkpoint.dequantised_stack(name))
    for shard in model.embedding.table[...].addressable_shards:
        table = checkpoint.tensors["embedding.table"].weight.astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(shard.data), table[shard.index])
        assert shard.data.size == table.size // num_shards


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("scale_blocks", "mesh", "blocks", "rows_of_a_device"),
    [(1, (1, 8), 1, 1), (4, (1, 8), 8, 1), (8, (1, 4), 8, 2), (4, (2, 4), 4, 1)],
)
def test_scale_blocks_are_refined_to_the_mesh(
    tmp_path: Path, scale_blocks: int, mesh: tuple[int, int], blocks: int, rows_of_a_device: int
) -> None:
    """No more than the mesh needs, so that each device has whole blocks for its own rows of the weight."""
    checkpoint = write_checkpoint(tmp_path, scale_blocks=scale_blocks)
    model = load(checkpoint.path, checkpoint.config, make_mesh(mesh))
    for name in ("attention.output", "feed_forward.down"):
        value, expected = stack_of(model, name), checkpoint.dequantised_stack(name)
        assert value.num_blocks == blocks
        for weight, scales in zip(value.weight.addressable_shards, value.scales.addressable_shards, strict=True):
            assert weight.device == scales.device
            assert scales.data.shape[-2] == rows_of_a_device
            own = dequantize(QuantizedArray(weight.data, scales.data))
            np.testing.assert_array_equal(own, expected[weight.index])


@pytest.mark.usefixtures("either_way")
def test_layers_of_different_scale_blocks_are_made_alike(tmp_path: Path) -> None:
    """Brought to their least common multiple, and worth the same."""
    config = SMALL.replace(num_layers=2)
    coarse = write_release_checkpoint(tmp_path / "coarse", config, scale_blocks=4)
    own = {name: tensor for name, tensor in coarse.items() if name.startswith("layers.1.")}
    checkpoint = write_checkpoint(tmp_path / "both", config, scale_blocks=2, weights=own)
    value = stack_of(load(checkpoint.path, config), "attention.output")
    assert value.num_blocks == 4
    np.testing.assert_array_equal(dequantize(value), checkpoint.dequantised_stack("attention.output"))


def test_dense_files_gain_an_expert_axis(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, DENSE, scale_blocks=8)
    value = stack_of(load(checkpoint.path, DENSE, make_mesh((2, 4))), "feed_forward.down")
    assert value.shape == (1, 1, 48, 32)
    np.testing.assert_array_equal(dequantize(value)[:, 0], checkpoint.dequantised_stack("feed_forward.down"))


def test_the_directory_or_its_parent_may_be_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    for path in (tmp_path, str(tmp_path / "ckpt-0")):
        query = stack_of(load(path, checkpoint.config), "attention.query")
        np.testing.assert_array_equal(query.weight, checkpoint.stack("attention.query"))


def test_one_layer_can_be_looked_at_alone(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, SMALL.replace(num_layers=3))
    layers = load(checkpoint.path, checkpoint.config).layers
    query = layers[2].attention.query.get_value()
    np.testing.assert_array_equal(query.weight[0], checkpoint.tensors["layers.2.attention.query"].weight)
    np.testing.assert_array_equal(layers[-1].attention.query.get_value().weight, query.weight)
    with pytest.raises(IndexError, match="layer 3 does not exist: the model has 3 layers"):
        layers[3]


def test_norms_and_routers_stay_float32(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, quantized=False)
    model = load(checkpoint.path, checkpoint.config)
    assert model.dtype == jnp.bfloat16
    assert model.embedding.table[...].dtype == jnp.bfloat16
    assert model.layers.attention.query[...].dtype == jnp.bfloat16
    assert model.layers.feed_forward.router[...].dtype == jnp.float32
    assert model.final_norm.scale[...].dtype == jnp.float32
    with pytest.raises(ValueError, match="dtype=float16 is not a compute dtype: choose float32 or bfloat16"):
        load(checkpoint.path, checkpoint.config, dtype=jnp.float16)
    with pytest.raises(ValueError, match="dtype='float12' is not a compute dtype: choose float32 or bfloat16"):
        load(checkpoint.path, checkpoint.config, dtype="float12")


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    checkpoint, calls = write_checkpoint(tmp_path), []
    load(checkpoint.path, checkpoint.config, progress=calls.append)
    assert {re.sub(r"\.\d+$", "", call.parameter) for call in calls} == set(checkpoint.tensors)
    assert all(call.parameter == call.source for call in calls)
    done = [call.done_bytes for call in calls]
    assert done == sorted(done)
    assert (
        done[-1]
        == calls[0].total_bytes
        == sum(t.weight.nbytes + (t.scales is not None and t.scales.nbytes) for t in checkpoint.tensors.values())
    )


def test_mixed_layers_are_refused(tmp_path: Path) -> None:
    config = SMALL.replace(num_layers=2)
    plain = write_release_checkpoint(tmp_path / "plain", config, quantized=False)
    mixed = write_release_checkpoint(tmp_path / "mixed", config)
    name = "layers.1.attention.query"
    write_checkpoint(tmp_path / "both", config, weights={**mixed, name: plain[name]})
    with pytest.raises(CheckpointError, match="some are quantised and some are plain: all layers must be alike"):
        load(tmp_path / "both", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_dim": 40}, r"tensor0\d+_000.*the weight has the shape .*, the configuration asks for "),
        ({"num_experts": 4}, r"tensor0\d+_000.*the configuration asks for \[4, "),
        ({"num_layers": 2}, "tensor0"),
    ],
    ids=str,
)
def test_wrong_configuration_is_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    checkpoint = write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint.path, SMALL.replace(**changes))


def test_cpu_devices_that_hold_the_same_shard_share_its_memory(tmp_path: Path) -> None:
    """Each byte is read to where it stays, once: a copy would lie elsewhere for each device."""
    checkpoint = write_checkpoint(tmp_path)
    model = load(checkpoint.path, checkpoint.config, make_mesh((2, 4)))
    for leaf in jax.tree.leaves(model):
        places = {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}
        assert len(places) == len({str(shard.index) for shard in leaf.addressable_shards})


@pytest.mark.usefixtures("either_way")
def test_devices_are_given_no_more_than_their_part(tmp_path: Path) -> None:
    """No array of the loaded model, and none left behind by loading, lies whole on one device of eight."""
    checkpoint = write_checkpoint(tmp_path, SMALL.replace(num_layers=2))
    before = {id(array) for array in jax.live_arrays()}
    model = load(checkpoint.path, checkpoint.config, make_mesh((1, 8)))
    own = {id(leaf) for leaf in jax.tree.leaves(model)}
    assert not [a.shape for a in jax.live_arrays() if id(a) not in before | own and a.size > 64]
    experts = model.layers.feed_forward.gate.get_value().weight
    assert experts.addressable_shards[0].data.size == experts.size // 8
