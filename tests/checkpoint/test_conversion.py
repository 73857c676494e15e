"""Conversion: every layout into ours, interrupted anywhere, and the model is the same."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    DENSE,
    EXPERT,
    FULLY,
    SMALL,
    TENSOR,
    TWO_LAYERS,
    WrittenCheckpoint,
    contents,
    label,
    or_thorough,
    write_checkpoint,
)
from goldens import GoldenCase, check_generation, check_logits, load_case

from grokjax import (
    CheckpointError,
    ShardingRules,
    convert,
    dequantize,
    describe,
    export,
    forward,
    keep_checksums,
    load,
    load_parameters,
    make_mesh,
    plan_conversion,
    quantize,
    save,
    verify,
)
from grokjax.checkpoint import conversion
from grokjax.checkpoint.formats.manifest import Manifest
from grokjax.checkpoint.formats.orbax import OrbaxCheckpoint
from grokjax.checkpoint.recipe import Recipe
from grokjax.testing import write_release_checkpoint

CASES = ("tiny-moe-s8", "tiny-dense-2x4")
# Each expert is a unit of ours, and Orbax takes its time for each unit.
TWO_EXPERTS = SMALL.replace(num_experts=2)


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    return load_case(request.param)


@pytest.fixture(scope="module")
def golden_path(golden: GoldenCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "model"
    convert(golden.checkpoint, path, golden.config)
    return path


class TestGoldens:
    """The release's files, converted, restored onto every mesh: the release's numbers."""

    @pytest.mark.parametrize(
        ("mesh", "rules"),
        or_thorough(
            [((1, 1), TENSOR), ((1, 8), TENSOR), ((2, 4), TENSOR), ((2, 4), FULLY), ((8, 1), TENSOR)],
            [((2, 4), FULLY)],
        ),
        ids=label,
    )
    def test_logits_are_the_release_s(
        self, golden: GoldenCase, golden_path: Path, mesh: tuple[int, int], rules: ShardingRules
    ) -> None:
        model = load(golden_path, mesh=make_mesh(mesh), dtype=jnp.float32, rules=rules)
        check_logits(golden, np.asarray(forward(model, golden.tokens)))

    @pytest.mark.parametrize("golden", or_thorough([(case,) for case in CASES], [("tiny-moe-s8",)]), indirect=True)
    def test_texts_are_the_release_s_with_experts_spread(self, golden: GoldenCase, golden_path: Path) -> None:
        mesh, rules = ((1, 8), EXPERT) if golden.config.num_experts > 1 else ((2, 4), TENSOR)
        model = load(golden_path, mesh=make_mesh(mesh), dtype=jnp.float32, rules=rules)
        check_generation(golden, model, rows=range(len(golden.lengths)))


def test_twelve_layers_keep_their_order(tmp_path: Path) -> None:
    """Files in the order of names, 0, 1, 10, 11, 2 ...: a wrong order would load, and compute something else."""
    source = write_checkpoint(tmp_path / "release", DENSE.replace(num_layers=12), scale_blocks=8)
    convert(source.path, tmp_path / "model", source.config)
    tokens = np.arange(3, 15)[None]
    logits = forward(load(tmp_path / "model", mesh=make_mesh((1, 8)), dtype=jnp.float32), tokens)
    np.testing.assert_allclose(logits, source.expected_logits(tokens), atol=2e-4, rtol=0)


def test_every_array_is_kept(source: WrittenCheckpoint, converted: Path) -> None:
    for name, spec in describe(converted).specs.items():
        written = source.tensors[name]
        assert (spec.weight.shape, spec.weight.dtype) == (written.weight.shape, written.weight.dtype)
    model = load(converted, dtype=jnp.float32)
    value = model.layers.feed_forward.down.get_value()
    np.testing.assert_array_equal(value.weight, source.stack("feed_forward.down"))
    np.testing.assert_array_equal(dequantize(value), source.dequantised_stack("feed_forward.down"))
    np.testing.assert_array_equal(model.embedding.table[...], source.tensors["embedding.table"].weight)


class TestWeights:
    @pytest.mark.parametrize("blocks", [1, 4])
    def test_int8_is_what_quantize_makes(self, tmp_path: Path, blocks: int) -> None:
        plain = write_checkpoint(tmp_path, TWO_EXPERTS, quantized=False)
        convert(plain.path, tmp_path / "model", plain.config, weights="int8", scale_blocks=blocks)
        found = load(tmp_path / "model").layers.attention.output.get_value()
        expected = quantize(jnp.asarray(plain.stack("attention.output")), num_blocks=blocks)
        np.testing.assert_array_equal(found.weight, expected.weight)
        np.testing.assert_array_equal(found.scales, expected.scales)

    def test_plain_is_what_int8_stands_for(self, source: WrittenCheckpoint, tmp_path: Path) -> None:
        convert(source.path, tmp_path / "model", source.config, weights="bfloat16")
        specs = describe(tmp_path / "model").specs
        assert specs["embedding.table"].weight.dtype == specs["layers.1.attention.key"].weight.dtype == jnp.bfloat16
        assert (
            specs["layers.1.feed_forward.router"].weight.dtype == specs["final_norm.scale"].weight.dtype == np.float32
        )
        found = load(tmp_path / "model").layers.feed_forward.up[...]
        np.testing.assert_array_equal(found, source.dequantised_stack("feed_forward.up").astype(jnp.bfloat16))

    def test_ours_can_be_converted_again(self, source: WrittenCheckpoint, converted: Path, tmp_path: Path) -> None:
        """Plain and then int8 again: within the rounding of a second quantisation."""
        convert(converted, tmp_path / "plain", weights="float32")
        convert(tmp_path / "plain", tmp_path / "int8", weights="int8")
        verify(tmp_path / "int8", tmp_path / "plain")
        expected = source.dequantised_stack("attention.query")
        found = np.asarray(dequantize(load(tmp_path / "int8").layers.attention.query.get_value()))
        assert np.abs(found - expected).max() <= np.abs(expected).max() / 127

    def test_int8_weights_stay_as_they_are(self, converted: Path, tmp_path: Path) -> None:
        """Also where other scale blocks are asked for: to quantise them again would cost exactness."""
        convert(converted, tmp_path / "again", weights="int8", scale_blocks=8)
        assert contents(tmp_path / "again") == contents(converted)
        assert describe(tmp_path / "again").specs == describe(converted).specs

    def test_columns_are_converted_in_slices(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = write_checkpoint(tmp_path, TWO_EXPERTS, quantized=False)
        convert(plain.path, tmp_path / "whole", plain.config, weights="int8")
        monkeypatch.setattr("grokjax.checkpoint.recipe.SLICE_BYTES", 7 * 4 * 32)  # 7 columns of 32 rows
        convert(plain.path, tmp_path / "sliced", plain.config, weights="int8")
        assert contents(tmp_path / "sliced") == contents(tmp_path / "whole")

    def test_casts_take_some_rows_at_a_time(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From the release's files and from ours, of which Orbax itself reads whole arrays only."""
        convert(source.path, tmp_path / "whole", source.config, weights="bfloat16")
        monkeypatch.setattr("grokjax.checkpoint.recipe.CAST_BYTES", 1000)
        convert(source.path, tmp_path / "rows", source.config, weights="bfloat16")
        convert(converted, tmp_path / "ours", weights="bfloat16")
        convert(tmp_path / "rows", tmp_path / "wide", weights="float32")
        assert contents(tmp_path / "rows") == contents(tmp_path / "whole") == contents(tmp_path / "ours")
        verify(tmp_path / "wide", tmp_path / "rows")

    def test_dense_models_are_converted_too(self, tmp_path: Path) -> None:
        dense = write_checkpoint(tmp_path, DENSE, scale_blocks=8)
        convert(dense.path, tmp_path / "model", DENSE, weights="float32")
        found = load(tmp_path / "model", dtype=jnp.float32).layers.feed_forward.down[...]
        np.testing.assert_array_equal(found[:, 0], dense.dequantised_stack("feed_forward.down"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": "int4"}, "weights='int4': choose one of keep, int8, bfloat16, float32"),
            (
                {"weights": "int8", "scale_blocks": 5},
                "scale_blocks=5 does not divide the 32 rows of layers.0.feed_for",
            ),
        ],
    )
    def test_bad_options_are_refused(self, tmp_path: Path, options: Mapping, message: str) -> None:
        plain = write_checkpoint(tmp_path, TWO_EXPERTS, quantized=False)
        with pytest.raises(ValueError, match=message):
            convert(plain.path, tmp_path / "model", plain.config, **options)
        assert not (tmp_path / "model").exists()


class TestSafetensors:
    @pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.thorough), "bfloat16"])
    def test_plain_weights_come_back_bit_for_bit(self, tmp_path: Path, dtype: str) -> None:
        source = write_checkpoint(tmp_path, DENSE.replace(num_layers=12), quantized=False)
        convert(source.path, tmp_path / "ours", source.config, weights=dtype)
        export(tmp_path / "ours", tmp_path / "exported", dtype=dtype)
        convert(tmp_path / "exported", tmp_path / "back")
        ours, back = describe(tmp_path / "ours"), describe(tmp_path / "back")
        assert ours.config == back.config
        names = [name for name in ours.specs if ours.specs[name].weight.dtype == dtype]
        assert len(names) > 12 * 7
        first, second = (load_parameters(tmp_path / folder, names, dtype=dtype) for folder in ("ours", "back"))
        for name in names:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)

    def test_int8_weights_are_exported_as_what_they_stand_for(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        export(converted, tmp_path / "exported", dtype="float32")
        model = load(tmp_path / "exported", dtype=jnp.float32)
        for name in ("feed_forward.down", "attention.output"):
            part, leaf = name.split(".")
            found = getattr(getattr(model.layers, part), leaf)[...]
            np.testing.assert_array_equal(found, source.dequantised_stack(name))
        tokens = np.arange(3, 15)[None]
        np.testing.assert_allclose(forward(model, tokens), source.expected_logits(tokens), atol=1e-4, rtol=0)

    def test_quantised_on_the_way_in_within_half_a_step(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        """Half a step of the scale is the most that rounding may change."""
        export(converted, tmp_path / "exported", dtype="float32")
        convert(tmp_path / "exported", tmp_path / "int8", weights="int8", scale_blocks=4)
        verify(tmp_path / "int8", tmp_path / "exported")
        value = load(tmp_path / "int8").layers.feed_forward.gate.get_value()
        difference = np.abs(dequantize(value) - source.dequantised_stack("feed_forward.gate"))
        steps = np.repeat(value.scales, value.shape[-2] // value.num_blocks, axis=-2)
        assert (difference <= 0.51 * steps).all()


class TestRefused:
    def test_too_little_space_is_found_before_anything_is_written(
        self, source: WrittenCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(CheckpointError, match=r"are to be written and 1.0 kB are free: make room"):
            convert(source.path, tmp_path / "model", source.config)
        assert not (tmp_path / "model").exists()

    def test_a_full_disk_is_gone_on_from(self, tmp_path: Path) -> None:
        """No file may exceed 40000 bytes, so the table fits and an expert does not; later it does."""
        source = write_checkpoint(tmp_path / "release", TWO_EXPERTS.replace(ffn_dim=2048))
        target, config = tmp_path / "model", tmp_path / "config.json"
        config.write_text(source.config.to_json())
        arguments = ["convert", str(source.path), str(target), "--config", str(config)]
        limited = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "import grokjax.cli; resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000));"
            f"sys.exit(grokjax.cli.main({arguments!r}))"
        )
        failed = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
        assert failed.returncode == 2
        assert "cannot be written" in failed.stderr
        assert "it goes on where it stopped" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert plan_conversion(source.path, target, source.config).num_done > 0
        convert(source.path, target, source.config)
        verify(target, source.path, source.config)

    def test_existing_targets_stay_as_they_are(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "mine").write_text("precious")
        with pytest.raises(CheckpointError, match="exists and is not empty: choose another target"):
            convert(source.path, tmp_path, source.config)
        with pytest.raises(CheckpointError, match="is a whole checkpoint already, of another source or with other"):
            convert(source.path, converted, source.config, weights="bfloat16")
        for target in (converted, converted / "weights" / "sub"):
            with pytest.raises(CheckpointError, match="the target is the source or lies in it"):
                convert(converted, target)
        assert (tmp_path / "mine").read_text() == "precious"

    def test_a_target_that_the_storage_library_would_write_elsewhere(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A path of Windows, on a system where a backslash is a letter as any other."""
        monkeypatch.chdir(tmp_path)
        for write in (
            lambda: plan_conversion(source.path, r"D:\grok\out", source.config),
            lambda: convert(source.path, r"D:\grok\out", source.config),
            lambda: save(load(converted), r"D:\grok\out"),
            lambda: export(converted, r"D:\grok\out"),
        ):
            with pytest.raises(CheckpointError, match="cannot use a path with a backslash: choose another path"):
                write()
        assert not list(tmp_path.iterdir())
        shutil.copytree(converted, r"D:\grok\out")
        with pytest.raises(CheckpointError, match="with a backslash: choose another path, or rename the folder"):
            load(r"D:\grok\out")

    def test_a_target_that_cannot_be_made(self, source: WrittenCheckpoint, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="cannot be made"):
            convert(source.path, tmp_path / "file" / "model", source.config)

    def test_a_damaged_source_is_found_before_anything_is_written(self, tmp_path: Path) -> None:
        write_release_checkpoint(tmp_path / "ckpt-0", TWO_EXPERTS)
        file = tmp_path / "ckpt-0" / "tensor00003_000"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"tensor00003_000.*truncated"):
            convert(tmp_path, tmp_path / "model", TWO_EXPERTS)
        assert not (tmp_path / "model").exists()

    def test_a_malicious_pickle_is_not_executed(self, tmp_path: Path) -> None:
        write_release_checkpoint(tmp_path / "ckpt-0", TWO_EXPERTS)
        canary = tmp_path / "canary"
        hostile = b"\x80\x04cos\nmkdir\n(V" + str(canary).encode() + b"\ntR."
        (tmp_path / "ckpt-0" / "tensor00002_000").write_bytes(hostile)
        with pytest.raises(CheckpointError, match=r"tensor00002_000.*global 'os.mkdir'"):
            convert(tmp_path, tmp_path / "model", TWO_EXPERTS)
        assert not canary.exists()


class TestVerify:
    def test_a_flipped_bit_is_found(self, source: WrittenCheckpoint, converted: Path, tmp_path: Path) -> None:
        keep_checksums(converted, verify(converted, source.path, source.config))
        verify(converted)
        chunk = next((converted / "weights" / "layers.1.feed_forward.up.1").rglob("c/0/0"))
        good = chunk.read_bytes()
        try:
            chunk.write_bytes(bytes([good[0] ^ 4]) + good[1:])
            for arguments in ((converted,), (converted, source.path, source.config)):
                with pytest.raises(CheckpointError, match=r"1 arrays differ.*\n  layers.1.feed_forward.up.1/weight"):
                    verify(*arguments)
        finally:
            chunk.write_bytes(good)
        verify(converted)

    def test_the_source_is_read_with_the_configuration_of_the_checkpoint(
        self, source: WrittenCheckpoint, converted: Path
    ) -> None:
        verify(converted, source.path)

    def test_a_swapped_source_is_found(self, source: WrittenCheckpoint, converted: Path, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path, source.config, scale_blocks=4, seed=1)
        with pytest.raises(CheckpointError, match="arrays differ from what they were made from"):
            verify(converted, other.path, other.config)

    def test_a_source_that_cannot_be_it_is_refused(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        other = write_checkpoint(tmp_path / "release", TWO_LAYERS.replace(num_layers=1, ffn_dim=24))
        with pytest.raises(CheckpointError, match=r"This is not what .* was made from") as caught:
            verify(converted, other.path, other.config)
        assert "layers.1.attention.query: only in the checkpoint" in str(caught.value)
        assert "layers.0.feed_forward.gate: another shape or dtype than the source's becomes" in str(caught.value)

    def test_checksums_that_cannot_be_kept_are_told_apart_from_damage(
        self, source: WrittenCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        target = tmp_path / "model"
        convert(source.path, target, source.config)
        checksums = verify(target, source.path, source.config)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(
                CheckpointError,
                match=r"every array is what .* checksums cannot be kept .*/grokjax.json: cannot be written",
            ):
                keep_checksums(target, checksums)
        keep_checksums(target, checksums)
        monkeypatch.setattr(Manifest, "write", refuse)
        keep_checksums(target, checksums)  # they stand there already

    def test_verifying_writes_nothing(self, source: WrittenCheckpoint, tmp_path: Path) -> None:
        convert(source.path, tmp_path / "model", source.config)
        before = contents(tmp_path / "model")
        checksums = verify(tmp_path / "model", source.path, source.config)
        assert contents(tmp_path / "model") == before
        keep_checksums(tmp_path / "model", checksums)
        assert verify(tmp_path / "model") == checksums

    def test_without_checksums_the_source_is_asked_for(self, tmp_path: Path) -> None:
        checkpoint = write_checkpoint(tmp_path)
        convert(checkpoint.path, tmp_path / "model", checkpoint.config)
        with pytest.raises(
            CheckpointError,
            match=r"holds no checksums: verify .* once beside what it was converted from \(--so",
        ):
            verify(tmp_path / "model")


class TestPlan:
    def test_a_plan_says_what_it_takes_and_writes_nothing(self, source: WrittenCheckpoint, tmp_path: Path) -> None:
        plan = plan_conversion(source.path, tmp_path / "model", source.config)
        assert (plan.num_units, plan.num_done) == (2 + 2 * (1 + 3 * source.config.num_experts), 0)
        assert plan.write_bytes == describe(source.path, source.config).num_bytes
        assert not (tmp_path / "model").exists()

    def test_memory_is_counted_for_one_matrix_being_written_and_the_next_being_read(self, tmp_path: Path) -> None:
        """Writing takes a copy as well: three times what a matrix of an expert has, int8 with bfloat16 scales."""
        peaks = []
        for ffn_dim in (4096, 8192):
            source = write_checkpoint(tmp_path / str(ffn_dim), TWO_EXPERTS.replace(ffn_dim=ffn_dim), scale_blocks=1)
            peaks.append(plan_conversion(source.path, tmp_path / "model", source.config).peak_host_bytes)
        assert peaks[1] - peaks[0] == 3 * 4096 * (TWO_EXPERTS.model_dim + 2)

    @pytest.mark.parametrize("weights", ["keep", "int8", "bfloat16", "float32"])
    def test_the_real_model_needs_one_table_and_a_gibibyte(
        self, weights: str, full_release: Path, tmp_path: Path
    ) -> None:
        """From the release, and from what any such conversion makes of it."""
        plan = plan_conversion(full_release, tmp_path / "model", weights=weights)
        table = 4 * 131072 * 6144
        assert plan.peak_host_bytes <= table + 2**30
        assert plan.write_bytes == sum(spec.num_bytes for spec in plan.specs.values())
        manifest = Manifest(plan.source.config, plan.specs, {})
        ours = OrbaxCheckpoint(tmp_path, manifest, plan.source.config, {})
        for onward in ("keep", "int8", "bfloat16", "float32"):
            specs = {name: Recipe(onward).result(name, spec) for name, spec in plan.specs.items()}
            assert conversion.peak_bytes(ours, plan.specs, specs) <= table + 2**30


def test_a_conversion_that_rounds_needs_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX finds the GPUs of a machine, and was told to use nothing else."""

    def refuse(**_: object) -> None:
        raise RuntimeError("Unknown backend cpu")

    source, before = write_checkpoint(tmp_path / "source", quantized=False), jax.config.values["jax_platforms"]
    monkeypatch.setattr(jax, "local_devices", refuse)
    try:
        jax.config.update("jax_platforms", "cuda")
        message = r"rounded on the processor, which JAX_PLATFORMS=cuda leaves out: add it, as in cuda,cpu\."
        with pytest.raises(ValueError, match=message):
            convert(source.path, tmp_path / "target", source.config, weights="int8")
        convert(source.path, tmp_path / "target", source.config)
    finally:
        jax.config.update("jax_platforms", before)
