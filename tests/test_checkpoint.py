"""Loading: the model equals a float64 model of the same files, layer order and all, shard by shard."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from grokjax import CheckpointError, GrokConfig, ShardingRules, dequantize, forward, load, make_mesh
from grokjax.testing import WrittenTensor, write_release_checkpoint

SMALL = GrokConfig.tiny().replace(
    model_dim=32, num_heads=8, num_kv_heads=4, head_dim=8, ffn_dim=48, vocab_size=64, max_seq_len=32, num_layers=1
)
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 9))


@dataclasses.dataclass(frozen=True)
class Written:
    """A checkpoint on disk and what was written."""

    path: Path
    config: GrokConfig
    tensors: dict[str, WrittenTensor]

    def expected_logits(self) -> np.ndarray:
        weights = {name: tensor.dequantised().astype(np.float64) for name, tensor in self.tensors.items()}
        return np.stack([reference.forward(weights, self.config, row).logits for row in TOKENS])


def written(path: Path, config: GrokConfig = SMALL, **options) -> Written:
    return Written(path, config, write_release_checkpoint(path / "ckpt-0", config, **options))


def check_logits(checkpoint: Written, mesh: tuple[int, int], rules: ShardingRules | None = None) -> None:
    model = load(checkpoint.path, checkpoint.config, make_mesh(mesh), jnp.float32, rules=rules)
    expected = checkpoint.expected_logits()
    np.testing.assert_allclose(forward(model, TOKENS), expected, atol=5e-5 * expected.std(), rtol=0)


def test_layers_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Twelve layers: file block 2 holds layer 10. Numeric order would load without an error, and give noise."""
    check_logits(written(tmp_path, SMALL.replace(num_layers=12)), (1, 1))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("scale_blocks", [1, 4, 8])
def test_scale_blocks_on_any_mesh(tmp_path: Path, scale_blocks: int, mesh: tuple[int, int]) -> None:
    check_logits(written(tmp_path, scale_blocks=scale_blocks, seed=scale_blocks), mesh)


@pytest.mark.parametrize("num_experts", [1, 8])
def test_plain_weights(tmp_path: Path, num_experts: int) -> None:
    config = SMALL.replace(num_experts=num_experts, experts_per_token=min(2, num_experts), num_layers=2)
    check_logits(written(tmp_path, config, quantized=False), (2, 4))


def test_blocked_scales_under_expert_parallelism(tmp_path: Path) -> None:
    check_logits(written(tmp_path, scale_blocks=8), (2, 4), ShardingRules.expert_parallel())


def test_every_shard_is_its_slice_of_the_files(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, SMALL.replace(num_layers=3), scale_blocks=4)
    model = load(checkpoint.path, checkpoint.config, make_mesh((2, 4)))
    for name in ("attention.output", "feed_forward.gate", "feed_forward.down"):
        part, leaf = name.split(".")
        value = getattr(getattr(model.layers, part), leaf).get_value()
        stored = np.stack([checkpoint.tensors[f"layers.{i}.{name}"].weight for i in range(3)])
        assert value.weight.dtype == jnp.int8
        for shard in value.weight.addressable_shards:
            np.testing.assert_array_equal(shard.data, stored[shard.index])
            assert shard.data.size == stored.size // 4
        whole = np.stack([checkpoint.tensors[f"layers.{i}.{name}"].dequantised() for i in range(3)])
        np.testing.assert_allclose(dequantize(value), whole, rtol=1e-6)


def test_views_of_one_layer(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, SMALL.replace(num_layers=3))
    layers = load(checkpoint.path, checkpoint.config).layers
    query = layers[2].attention.query.get_value()
    np.testing.assert_array_equal(query.weight[0], checkpoint.tensors["layers.2.attention.query"].weight)
    np.testing.assert_array_equal(layers[-1].attention.query.get_value().weight, query.weight)
    with pytest.raises(IndexError, match="layer 3 does not exist: the model has 3 layers"):
        layers[3]


def test_dtypes(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, quantized=False)
    model = load(checkpoint.path, checkpoint.config)
    assert model.dtype == jnp.bfloat16
    assert model.embedding.table[...].dtype == jnp.bfloat16
    assert model.layers.attention.query[...].dtype == jnp.bfloat16
    assert model.layers.feed_forward.router[...].dtype == jnp.float32
    assert model.final_norm.scale[...].dtype == jnp.float32
    with pytest.raises(ValueError, match="dtype=float16 is not a compute dtype: choose float32 or bfloat16"):
        load(checkpoint.path, checkpoint.config, dtype=jnp.float16)


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    checkpoint, calls = written(tmp_path), []
    load(checkpoint.path, checkpoint.config, progress=lambda *call: calls.append(call))
    names, done, totals = zip(*calls, strict=True)
    assert set(names) == set(checkpoint.tensors)
    assert list(done) == sorted(done)
    assert (
        done[-1]
        == totals[0]
        == sum(t.weight.nbytes + (t.scales is not None and t.scales.nbytes) for t in checkpoint.tensors.values())
    )


def test_mixed_layers_are_refused(tmp_path: Path) -> None:
    config = SMALL.replace(num_layers=2)
    plain = write_release_checkpoint(tmp_path / "plain", config, quantized=False)
    mixed = write_release_checkpoint(tmp_path / "mixed", config)
    name = "layers.1.attention.query"
    written(tmp_path / "both", config, weights={**mixed, name: plain[name]})
    with pytest.raises(CheckpointError, match="some are quantised and some are plain: all layers must be alike"):
        load(tmp_path / "both", config)


def test_wrong_configuration_is_refused(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    with pytest.raises(CheckpointError, match="tensor0"):
        load(checkpoint.path, SMALL.replace(ffn_dim=40))


def test_devices_are_given_no_more_than_their_part(tmp_path: Path) -> None:
    """No array of the loaded model, and none left behind by loading, lies whole on one device of eight."""
    checkpoint = written(tmp_path, SMALL.replace(num_layers=2))
    before = {id(array) for array in jax.live_arrays()}
    model = load(checkpoint.path, checkpoint.config, make_mesh((1, 8)))
    own = {id(leaf) for leaf in jax.tree.leaves(model)}
    assert not [a.shape for a in jax.live_arrays() if id(a) not in before | own and a.size > 64]
    experts = model.layers.feed_forward.gate.get_value().weight
    assert experts.addressable_shards[0].data.size == experts.size // 8
