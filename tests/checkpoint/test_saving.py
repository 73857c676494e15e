"""Checkpoints of ours: whatever mesh they were written from, every mesh restores them; what is damaged is refused."""

import copy
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import DENSE, EXPERT, FULLY, SMALL, TENSOR, label, or_thorough, random_model, write_checkpoint
from flax import nnx
from orbax.checkpoint import v1 as ocp

from grokjax import (
    CheckpointError,
    CheckpointInfo,
    Grok,
    GrokConfig,
    QuantizedArray,
    ShardingRules,
    dequantize,
    describe,
    load,
    load_parameters,
    make_mesh,
    save,
)
from grokjax.checkpoint import open_checkpoint, parameter_shapes
from grokjax.checkpoint.stored import ArraySpec, TensorSpec
from grokjax.model import named_parameters

CONFIG = SMALL.replace(num_experts=4)
PLACES = [((1, 1), TENSOR), ((1, 8), TENSOR), ((2, 4), TENSOR), ((2, 4), EXPERT), ((2, 4), FULLY), ((8, 1), TENSOR)]
RESTORED = or_thorough(PLACES, [((2, 4), FULLY)])
WRITTEN = or_thorough(PLACES[1:], [((2, 4), EXPERT)])


def parameters(model: Grok) -> dict[str, jax.Array | QuantizedArray]:
    return {name: param.get_value() for name, param in named_parameters(model).items()}


def assert_same_model(found: Grok, expected: Grok) -> None:
    """Bit for bit; scale blocks may be cut finer for another mesh."""
    ours, theirs = parameters(found), parameters(expected)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        if isinstance(value, QuantizedArray):
            np.testing.assert_array_equal(value.weight, theirs[name].weight)
            np.testing.assert_array_equal(dequantize(value), dequantize(theirs[name]))
        else:
            assert value.dtype == theirs[name].dtype
            np.testing.assert_array_equal(value, theirs[name])


@pytest.fixture(scope="module", params=[True, False], ids=["int8", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Grok:
    return random_model(CONFIG, mesh=make_mesh((1, 4)), rules=TENSOR, quantized=request.param)


@pytest.fixture(scope="module")
def saved(model: Grok, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save(model, path)
    return path


@pytest.fixture
def copied(tmp_path: Path, saved: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("mesh", "rules"), RESTORED, ids=label)
def test_restored_onto_every_mesh(saved: Path, model: Grok, mesh: tuple[int, int], rules: ShardingRules) -> None:
    restored = load(saved, mesh=make_mesh(mesh), rules=rules)
    assert_same_model(restored, model)
    expected = nnx.split(
        random_model(CONFIG, mesh=make_mesh(mesh), rules=rules, quantized=isinstance(query(model), QuantizedArray))
    )
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(expected[1]), strict=True):
        if ours.shape == theirs.shape:  # scale blocks aside
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(restored))
    assert describe(saved).bytes_per_device(mesh, rules=rules) == held


def test_bytes_per_device_count_plain_weights_as_such(tmp_path: Path) -> None:
    """And others have their own number of scale blocks."""
    written = write_checkpoint(tmp_path, SMALL.replace(num_layers=2), scale_blocks=4)
    checkpoint = open_checkpoint(written.path, written.config)
    plain = {name: tensor for name, tensor in checkpoint.tensors.items() if "gate" in name}
    specs = {name: TensorSpec.of(tensor) for name, tensor in checkpoint.tensors.items()}
    specs |= {name: TensorSpec(ArraySpec(specs[name].weight.shape, np.dtype("float32")), None) for name in plain}
    info = CheckpointInfo(checkpoint.path, "release", checkpoint.config, specs)
    whole = describe(written.path, written.config)
    weight = sum(math.prod(specs[name].weight.shape) for name in plain)
    scales = sum(2 * math.prod(tensor.scales.shape) for tensor in plain.values())
    for mesh in ((1, 1), (8, 1)):
        assert info.bytes_per_device(mesh) - whole.bytes_per_device(mesh) == weight - scales


def query(model: Grok) -> jax.Array | QuantizedArray:
    return model.layers.attention.query.get_value()


@pytest.mark.parametrize(("mesh", "rules"), WRITTEN, ids=label)
def test_written_from_every_mesh(tmp_path: Path, mesh: tuple[int, int], rules: ShardingRules) -> None:
    model = random_model(CONFIG, mesh=make_mesh(mesh), rules=rules)
    save(model, tmp_path / "model")
    assert_same_model(load(tmp_path / "model"), model)


def test_dense_models_come_back(tmp_path: Path) -> None:
    model = random_model(DENSE, quantized=False, dtype=jnp.float32)
    save(model, tmp_path / "model")
    assert_same_model(load(tmp_path / "model", dtype=jnp.float32), model)


@pytest.mark.usefixtures("either_way")
def test_devices_are_given_no_more_than_their_part(saved: Path) -> None:
    before = {id(array) for array in jax.live_arrays()}
    model = load(saved, mesh=make_mesh((1, 8)))
    own = {id(leaf) for leaf in jax.tree.leaves(model)}
    assert not [a.shape for a in jax.live_arrays() if id(a) not in before | own and a.size > 64]


@pytest.mark.usefixtures("part_by_part")
@pytest.mark.parametrize(("limit", "expected"), [(1, 64 * 32 * 2 + 1), (1 << 20, 1 << 20)])
def test_reading_is_bounded(saved: Path, monkeypatch: pytest.MonkeyPatch, limit: int, expected: int) -> None:
    """By the caller's limit, or the largest array of a unit if that is more: here the table."""
    contexts, make_context = [], ocp.Context

    def record(*options: Any, **named: Any) -> ocp.Context:
        contexts.append(make_context(*options, **named))
        return contexts[-1]

    monkeypatch.setattr(ocp, "Context", record)
    load(saved, max_host_bytes=limit)
    assert max(context.memory.read_concurrent_bytes for context in contexts) == expected


def test_units_are_checkpoints_of_orbax(saved: Path, model: Grok) -> None:
    """A reader without grokjax finds each matrix under its name."""
    expected = query(model)
    expected = expected.weight if isinstance(expected, QuantizedArray) else expected
    tree = {"layers.0.attention.query": {"weight": np.zeros(expected.shape[1:], expected.dtype)}}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        found = ocp.load(saved / "weights" / "layers.0", tree)
    np.testing.assert_array_equal(found["layers.0.attention.query"]["weight"], np.asarray(expected[0]))


def test_progress_counts_every_byte(tmp_path: Path, model: Grok) -> None:
    calls = []
    save(model, tmp_path / "model", progress=calls.append)
    done = [call.done_bytes for call in calls]
    assert done == sorted(done)
    assert done[-1] == calls[0].total_bytes == describe(tmp_path / "model").num_bytes


class TestWhatDoesNotComeBack:
    """Nothing of a model is dropped, or written so that it cannot be loaded: it is refused, and named."""

    def refuse(self, model: Grok, path: Path) -> str:
        with pytest.raises(ValueError, match="the model does not fit into a checkpoint") as caught:
            save(model, path)
        assert not path.exists()
        return str(caught.value)

    def test_what_was_added_is_named(self, model: Grok, tmp_path: Path) -> None:
        changed = copy.deepcopy(model)
        changed.layers.steering = nnx.Param(jnp.zeros((1, 32)))
        changed.layers.attention.probe = jnp.zeros(3)
        said = self.refuse(changed, tmp_path / "model")
        assert "layers.steering: checkpoints have no place for it" in said
        assert "layers.attention.probe: checkpoints have no place for it" in said
        assert "take it out of the model, and save again" in said
        del changed.layers.steering, changed.layers.attention.probe
        save(changed, tmp_path / "model")
        assert_same_model(load(tmp_path / "model"), model)

    def test_a_module_around_another_is_named(self, model: Grok, tmp_path: Path) -> None:
        class Around(nnx.Module):
            def __init__(self, inner: nnx.Module):
                self.inner = inner

        changed = copy.deepcopy(model)
        changed.final_norm = Around(changed.final_norm)
        said = self.refuse(changed, tmp_path / "model")
        assert "final_norm.inner.scale: checkpoints have no place for it" in said
        assert "final_norm.scale: missing" in said

    def test_other_shapes_and_dtypes_are_named(self, model: Grok, tmp_path: Path) -> None:
        changed = copy.deepcopy(model)
        for param, change in (
            (changed.layers.pre_attention_norm.scale, lambda value: value.repeat(2, axis=0)),
            (changed.embedding.table, lambda value: value.astype(jnp.float16)),
            (changed.final_norm.scale, lambda value: value[:3]),
        ):
            param.set_raw_value(change(param.get_value()))
        said = self.refuse(changed, tmp_path / "model")
        assert (
            "layers.pre_attention_norm.scale: the weight has the shape [2, 32], the configuration asks for [1" in said
        )
        assert "embedding.table: the weight is float16 without scales; only float32 and bfloat16 go without" in said
        assert "final_norm.scale: the weight has the shape [3], the configuration asks for [32]" in said


class TestPartialLoads:
    def test_some_layers_are_a_model_of_their_own(self, tmp_path: Path) -> None:
        model = random_model(CONFIG.replace(num_layers=3))
        save(model, tmp_path / "model")
        part = load(tmp_path / "model", layers=[2, 0])
        assert part.config.num_layers == 2
        for ours, theirs in ((0, 2), (1, 0)):
            np.testing.assert_array_equal(query(part).weight[ours], query(model).weight[theirs])
        with pytest.raises(ValueError, match=r"layers=\[3\]: name one or more of the checkpoint's 0 to 2"):
            load(tmp_path / "model", layers=[3])

    def test_some_parameters_can_be_read_alone(self, saved: Path, model: Grok) -> None:
        found = load_parameters(
            saved, [r"layers\.0\.feed_forward\.(gate|router)", "final_norm.*"], mesh=make_mesh((2, 4))
        )
        assert set(found) == {"layers.0.feed_forward.gate", "layers.0.feed_forward.router", "final_norm.scale"}
        gate = model.layers.feed_forward.gate.get_value()
        np.testing.assert_array_equal(
            dequantize(found["layers.0.feed_forward.gate"]), dequantize(jax.tree.map(lambda leaf: leaf[0], gate))
        )
        assert found["layers.0.feed_forward.router"].dtype == jnp.float32

    def test_no_such_parameter_is_an_error(self, saved: Path) -> None:
        with pytest.raises(ValueError, match=r"'layers.9.*' matches no parameter"):
            load_parameters(saved, ["layers.9.*"])


class TestDescribe:
    def test_sizes_are_those_of_the_saved_model(self, saved: Path, model: Grok) -> None:
        info = describe(saved)
        assert (info.layout, info.config) == ("orbax", CONFIG)
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        assert info.bytes_per_device((1, 1)) == pytest.approx(stored, rel=0.01)  # scale blocks are those of the mesh
        assert info.specs["layers.0.feed_forward.gate"].weight.shape == (4, 32, 48)

    @pytest.mark.parametrize(("mesh", "rules"), PLACES, ids=label)
    def test_bytes_per_device_are_what_a_device_then_holds(
        self, saved: Path, mesh: tuple[int, int], rules: ShardingRules
    ) -> None:
        restored = load(saved, mesh=make_mesh(mesh), rules=rules)
        device = restored.partitioner.mesh.devices.flat[-1]
        shards = [s for leaf in jax.tree.leaves(restored) for s in leaf.addressable_shards if s.device == device]
        assert describe(saved).bytes_per_device(mesh, rules=rules) == sum(shard.data.nbytes for shard in shards)

    def test_grok_1_takes_40_gb_on_each_of_eight_devices(self, full_release: Path) -> None:
        info = describe(full_release)
        assert info.num_parameters == sum(math.prod(shape) for shape in parameter_shapes(GrokConfig.grok_1()).values())
        assert 37e9 < info.bytes_per_device((1, 8)) < 41e9


class TestDamage:
    def test_unfinished_checkpoint_is_refused(self, copied: Path) -> None:
        (copied / "grokjax.json").rename(copied / "unfinished.json")
        with pytest.raises(CheckpointError, match="was interrupted: remove the folder and save the model again"):
            load(copied)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text[:-40], "not JSON"),
            (lambda text: "[" * 100_000, "not JSON"),
            (
                lambda text: text.replace('"num_layers": 1', '"num_layers": 1000000000'),
                r"grokjax\.json: num_layers=1000000000 is too large for the \d+ tensors in it: use the configuration",
            ),
            (lambda text: text.replace('"made_by": "save"', '"made_by"'), "not JSON"),
            (lambda text: re.sub(r'"origin": {[^}]*}', '"origin": [1]', text), "damaged"),
            (lambda text: "[]", "not the manifest of a grokjax checkpoint"),
            (
                lambda text: text.replace('"format_version": 1', '"format_version": 2'),
                "written in format version 2, this",
            ),
            (lambda text: text.replace('"num_heads": 8', '"num_heads": 7'), "damaged .*num_heads=7"),
            (lambda text: text.replace('"config"', '"konfig"'), "damaged"),
            (lambda text: text.replace('"ffn_dim": 48', '"ffn_dim": 40'), r"the configuration asks for \[4, 32, 40\]"),
        ],
        ids=[
            "truncated",
            "nested",
            "layers",
            "comma",
            "origin",
            "foreign",
            "newer",
            "contradiction",
            "incomplete",
            "other-sizes",
        ],
    )
    def test_damaged_manifest_is_refused(self, copied: Path, change: Callable[[str], str], message: str) -> None:
        manifest = copied / "grokjax.json"
        manifest.write_text(change(manifest.read_text()))
        with pytest.raises(CheckpointError, match=message):
            load(copied)

    def test_missing_and_surplus_units_stand_in_one_list(self, copied: Path) -> None:
        weights = copied / "weights"
        (weights / "layers.0.feed_forward.up.2").rename(weights / "layers.7.feed_forward.up.2")
        with pytest.raises(CheckpointError) as caught:
            load(copied)
        assert "weights/layers.0.feed_forward.up.2: missing" in str(caught.value)
        assert "weights/layers.7.feed_forward.up.2: surplus" in str(caught.value)
        assert f"{copied}: folders are damaged, missing or surplus, 2 problems:\n" in str(caught.value)

    def test_empty_file_is_noticed(self, copied: Path) -> None:
        largest(copied / "weights" / "embedding.table").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"weights/embedding.table: \d+ bytes of its arrays are missing"):
            load(copied)

    def test_file_shorter_by_a_little_is_noticed(self, copied: Path) -> None:
        file = largest(copied / "weights" / "embedding.table")
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(CheckpointError, match=r"embedding.table: 3 bytes of its arrays are missing"):
            load(copied)

    @pytest.mark.parametrize("name", ["_METADATA", "embedding.table.weight/zarr.json"])
    def test_loss_of_files_that_describe_arrays_is_noticed(self, copied: Path, name: str) -> None:
        (copied / "weights" / "embedding.table" / "state" / name).write_text("")
        with pytest.raises(CheckpointError, match=r"embedding.table: \d+ bytes of its arrays are missing"):
            load(copied)

    def test_array_that_cannot_be_read_is_named(self, copied: Path) -> None:
        """The library's specification of the array stays out of the sentence."""
        file = largest(copied / "weights" / "embedding.table")
        file.write_bytes(file.read_bytes()[:-20] + bytes(20))  # where it says what lies where in it
        with pytest.raises(CheckpointError, match=r"table.weight: cannot be read .*restore this folder") as caught:
            load(copied)
        assert "tensorstore_spec" not in str(caught.value)
        assert len(str(caught.value)) < 1200

    def test_heads_cut_otherwise_are_refused(self, saved: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"the configuration says num_heads=16, not 8; head_dim=4, not 8: pass"
        ):
            load(saved, CONFIG.replace(num_heads=2 * CONFIG.num_heads, head_dim=CONFIG.head_dim // 2))

    def test_swapped_units_are_noticed(self, copied: Path) -> None:
        one, other = (copied / "weights" / f"layers.0.feed_forward.gate.{i}" for i in (0, 1))
        one.rename(copied / "x")
        other.rename(one)
        (copied / "x").rename(other)
        with pytest.raises(CheckpointError, match=r"layers.0.feed_forward.gate.0: \d+ bytes of its arrays are missing"):
            load(copied)

    def test_configuration_that_does_not_fit_is_refused(self, saved: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            load(saved, CONFIG.replace(num_layers=2, vocab_size=128))
        assert "embedding.table: the weight has the shape [64, 32], the configuration asks for [128, 32]" in str(
            caught.value
        )
        assert "layers.1.attention.query: the checkpoint has no layers.1.attention.query" in str(caught.value)

    def test_layers_left_over_are_refused(self, tmp_path: Path) -> None:
        save(random_model(CONFIG.replace(num_layers=2)), tmp_path / "model")
        with pytest.raises(CheckpointError, match=r"layers.1.attention.query: not used by the model"):
            load(tmp_path / "model", CONFIG)

    def test_what_is_no_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="the model must be one that init or load makes, not a PosixPath"):
            save(tmp_path, tmp_path / "new")

    def test_existing_target_is_refused(self, saved: Path, model: Grok) -> None:
        with pytest.raises(CheckpointError, match="exists already: choose another path, or remove it first"):
            save(model, saved)

    def test_target_that_cannot_be_made_is_refused(self, tmp_path: Path, model: Grok) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(
            CheckpointError, match=r"cannot be made \(Not a directory\): choose a path that you may write"
        ):
            save(model, tmp_path / "file" / "model")

    def test_folder_without_a_checkpoint_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="a folder without a checkpoint: a folder with tensorNNNNN_000 files"):
            load(tmp_path)
        with pytest.raises(CheckpointError, match="no such folder"):
            load(tmp_path / "absent")


def largest(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
