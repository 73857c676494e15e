"""Export to safetensors: what was written opens as the same model, and nothing else is ever left behind."""

import json
import os
import resource
import shutil
import stat
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import WrittenCheckpoint
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors_files import (
    BFLOAT16,
    DENSE,
    DTYPES,
    SMALL,
    TWELVE,
    as_stored,
    assert_holds,
    draw,
    hpcai_name,
    keyfan_name,
)

from grokjax.checkpoint import CheckpointError, SchemeName, describe, export, parameter_shapes, parts_of
from grokjax.checkpoint.formats.safetensors import open_safetensors
from grokjax.checkpoint.formats.safetensors_export import write_safetensors
from grokjax.checkpoint.formats.safetensors_headers import find_safetensors
from grokjax.checkpoint.formats.safetensors_names import HPCAI, KEYFAN, Scheme
from grokjax.config import GrokConfig

Parts = Iterator[tuple[str, int | None, np.ndarray]]

# What the configurations of the public repositories say of their classes.
KEYFAN_FIELDS = {
    "architectures": ["GrokForCausalLM"],
    "model_type": "grok",
    "auto_map": {
        "AutoConfig": "configuration_grok.GrokConfig",
        "AutoModelForCausalLM": "modeling_grok.GrokForCausalLM",
    },
    "num_local_experts": 8,
}
HPCAI_FIELDS = {
    "architectures": ["Grok1ModelForCausalLM"],
    "model_type": "grok-1",
    "auto_map": {
        "AutoConfig": "configuration_grok1.Grok1Config",
        "AutoModel": "modeling_grok1.Grok1Model",
        "AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM",
    },
    "num_experts": 8,
}


def parts(config: GrokConfig, weights: dict[str, np.ndarray]) -> Parts:
    for parameter, array in weights.items():
        for part in parts_of(parameter, config):
            yield part.parameter, part.expert, array[part.index]


def num_bytes(config: GrokConfig, dtype: str) -> int:
    return sum(int(np.prod(shape)) for shape in parameter_shapes(config).values()) * np.dtype(dtype).itemsize


class TestRoundTrip:
    @pytest.mark.parametrize("config", [SMALL, DENSE, TWELVE], ids=["small", "dense", "twelve"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("max_shard_bytes", [1 << 30, 30_000])
    def test_comes_back_bit_for_bit(self, tmp_path: Path, config: GrokConfig, dtype: str, max_shard_bytes: int) -> None:
        weights = draw(config, dtype)
        write_safetensors(tmp_path, config, parts(config, weights), dtype=dtype, max_shard_bytes=max_shard_bytes)
        checkpoint = open_safetensors(tmp_path)
        assert checkpoint.config == config
        assert_holds(checkpoint, weights)

    def test_comes_back_with_the_other_names(self, tmp_path: Path) -> None:
        weights = draw(SMALL, "bfloat16")
        options = {"dtype": "bfloat16", "scheme": HPCAI, "max_shard_bytes": 6000}
        write_safetensors(tmp_path, SMALL, parts(SMALL, weights), **options)
        assert_holds(open_safetensors(tmp_path), weights)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        head = SMALL.vocab_size * SMALL.model_dim * 2
        assert index["metadata"] == {"total_size": num_bytes(SMALL, "bfloat16") + head}

    def test_comes_back_from_a_file_for_each_part(self, tmp_path: Path) -> None:
        weights = draw(DENSE, "float32")
        write_safetensors(tmp_path, DENSE, parts(DENSE, weights), dtype="float32", max_shard_bytes=1)
        assert len(list(tmp_path.glob("model-*-of-00024.safetensors"))) == 24
        assert_holds(open_safetensors(tmp_path), weights)

    @pytest.mark.parametrize("block_bytes", [1, 100])
    def test_blocks_of_any_size_give_the_same(
        self, tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("grokjax.checkpoint.formats.safetensors_export.BLOCK_BYTES", block_bytes)
        weights = draw(SMALL, "bfloat16")
        write_safetensors(tmp_path, SMALL, parts(SMALL, weights), dtype="bfloat16")
        assert_holds(open_safetensors(tmp_path), weights)

    def test_parts_may_come_in_any_order(self, tmp_path: Path) -> None:
        weights = draw(SMALL, "float32")
        mixed = list(parts(SMALL, weights))[::-1]
        write_safetensors(tmp_path, SMALL, mixed, dtype=np.float32, max_shard_bytes=5000)
        assert_holds(open_safetensors(tmp_path), weights)

    def test_parts_are_cast_to_the_dtype(self, tmp_path: Path) -> None:
        weights = draw(SMALL, "float32")
        write_safetensors(tmp_path / "narrow", SMALL, parts(SMALL, weights), dtype=BFLOAT16)
        narrow = {name: array.astype(BFLOAT16) for name, array in weights.items()}
        assert_holds(open_safetensors(tmp_path / "narrow"), narrow)
        write_safetensors(tmp_path / "wide", SMALL, parts(SMALL, narrow), dtype="float32")
        wide = {name: array.astype(np.float32) for name, array in narrow.items()}
        assert_holds(open_safetensors(tmp_path / "wide"), wide)

    def test_arrays_need_not_be_contiguous(self, tmp_path: Path) -> None:
        weights = draw(SMALL, "float32")
        views = [(name, expert, np.asfortranarray(array)) for name, expert, array in parts(SMALL, weights)]
        write_safetensors(tmp_path, SMALL, views, dtype="float32")
        assert_holds(open_safetensors(tmp_path), weights)


class TestFiles:
    def test_shards_and_their_index_are_read_by_the_safetensors_library(self, tmp_path: Path) -> None:
        weights = draw(SMALL, "bfloat16")
        folder = tmp_path / "new" / "folder"
        limit = 6000
        write_safetensors(folder, SMALL, parts(SMALL, weights), dtype="bfloat16", max_shard_bytes=limit)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        count = len(set(index["weight_map"].values()))
        shards = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        # Two shards that follow each other would not fit into one.
        assert 3 < count <= 2 * num_bytes(SMALL, "bfloat16") / limit + 1
        assert {entry.name for entry in folder.iterdir()} == {*shards, "config.json", "model.safetensors.index.json"}
        expected = as_stored(SMALL, weights, keyfan_name)
        found: dict[str, np.ndarray] = {}
        for shard in shards:
            tensors = load_file(folder / shard)
            assert sum(array.nbytes for array in tensors.values()) <= limit
            assert {index["weight_map"][name] for name in tensors} == {shard}
            with safe_open(folder / shard, framework="np") as file:
                assert file.metadata() == {"format": "pt"}
            found |= tensors
        assert found.keys() == expected.keys() == index["weight_map"].keys()
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
        assert index["metadata"] == {"total_size": num_bytes(SMALL, "bfloat16")}

    @pytest.mark.parametrize(("scheme", "fields"), [(KEYFAN, KEYFAN_FIELDS), (HPCAI, HPCAI_FIELDS)])
    def test_configuration_has_the_published_fields(
        self, tmp_path: Path, scheme: Scheme, fields: dict[str, Any]
    ) -> None:
        config = GrokConfig.grok_1().replace(**{name: getattr(SMALL, name) for name in ("vocab_size", "model_dim")})
        config = config.replace(num_layers=1, ffn_dim=8, num_heads=2, num_kv_heads=1, head_dim=4)
        write_safetensors(tmp_path, config, parts(config, draw(config, "float32")), dtype="float32", scheme=scheme)
        assert json.loads((tmp_path / "config.json").read_text()) == {
            **fields,
            "vocab_size": 56,
            "hidden_size": 24,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 8192,
            "embedding_multiplier_scale": 78.38367176906169,
            "output_multiplier_scale": 0.5773502691896257,
            "attn_output_multiplier": 0.08838834764831845,
            "max_attn_value": 30.0,
            "rope_base": 10000.0,
            "rms_norm_eps": 1e-05,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }
        assert open_safetensors(tmp_path).config == config

    @pytest.mark.parametrize("names", ["keyfan", "hpcai"])
    def test_an_export_is_what_the_public_checkpoint_would_be(
        self, tmp_path: Path, source: WrittenCheckpoint, names: SchemeName
    ) -> None:
        """Of int8 weights: every name, shape and value, and the tokenizer beside the source."""
        tokenizer = source.path / "tokenizer.model"
        tokenizer.write_bytes(b"pieces")
        export(source.path, tmp_path / "out", source.config, names=names, dtype="float32")
        tokenizer.unlink()
        weights = {name: tensor.dequantised() for name, tensor in source.tensors.items()}
        expected = as_stored(source.config, weights, {"keyfan": keyfan_name, "hpcai": hpcai_name}[names])
        if names == "hpcai":
            expected["lm_head.weight"] = weights["embedding.table"]
        found = {
            name: array for file in (tmp_path / "out").glob("*.safetensors") for name, array in load_file(file).items()
        }
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
        assert describe(tmp_path / "out").config == source.config

    def test_the_tokenizer_may_be_named(self, tmp_path: Path, source: WrittenCheckpoint) -> None:
        (tmp_path / "other.model").write_bytes(b"others")
        export(source.path, tmp_path / "out", source.config, tokenizer=tmp_path / "other.model")
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"others"
        for options, message in (
            ({"tokenizer": tmp_path / "none"}, "there is no tokenizer file .*none: name the release's"),
            ({"names": "hf"}, "names='hf': choose one of keyfan, hpcai"),
        ):
            with pytest.raises(ValueError, match=message):
                export(source.path, tmp_path / "new", source.config, **options)
            assert not (tmp_path / "new").exists()

    def test_may_be_read_by_whom_other_new_files_may(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "out", SMALL, parts(SMALL, draw(SMALL, "float32")), dtype="float32")
        (tmp_path / "new").touch()
        mode = stat.S_IMODE((tmp_path / "new").stat().st_mode)
        assert {stat.S_IMODE(entry.stat().st_mode) for entry in (tmp_path / "out").iterdir()} == {mode}

    def test_progress_counts_every_byte(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        write_safetensors(
            tmp_path,
            SMALL,
            parts(SMALL, draw(SMALL, "float32")),
            dtype="float32",
            max_shard_bytes=20_000,
            progress=lambda done, total: seen.append((done, total)),
        )
        total = num_bytes(SMALL, "float32")
        assert len(seen) > 3
        assert seen == sorted(seen)
        assert seen[-1] == (total, total)
        assert {whole for _, whole in seen} == {total}

    def test_memory_is_a_shard_and_a_part(self, tmp_path: Path) -> None:
        config = DENSE.replace(num_layers=6, model_dim=512, ffn_dim=1024)
        shapes = parameter_shapes(config)
        lazy = ((name, None, np.ones(shape, BFLOAT16)) for name, shape in shapes.items())
        tracemalloc.start()
        try:
            write_safetensors(tmp_path, config, lazy, dtype="bfloat16", max_shard_bytes=4 << 20)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert num_bytes(config, "bfloat16") > 18 << 20
        # A part of 1 MiB as it came and as it is stored, besides the shard.
        assert peak < (6 << 20) + (1 << 19)


class TestInterruption:
    def test_nothing_is_found_before_the_end(self, tmp_path: Path) -> None:
        shards: list[int] = []

        def look(done: int, total: int) -> None:
            assert find_safetensors(tmp_path) is None
            shards.append(len(list(tmp_path.glob("shard-*.part"))))

        weights = draw(SMALL, "float32")
        write_safetensors(
            tmp_path, SMALL, parts(SMALL, weights), dtype="float32", max_shard_bytes=20_000, progress=look
        )
        assert shards == list(range(1, len(shards) + 1))
        assert find_safetensors(tmp_path) == tmp_path

    def test_what_was_written_is_removed(self, tmp_path: Path) -> None:
        def interrupted() -> Parts:
            yield from list(parts(SMALL, draw(SMALL, "float32")))[:-1]
            assert any(tmp_path.iterdir())
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_safetensors(tmp_path, SMALL, interrupted(), dtype="float32", max_shard_bytes=2000)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["config.json", "model-00002-of-", "model.safetensors.index.json"])
    def test_failure_while_names_are_given_leaves_nothing(
        self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace, fsync = Path.replace, os.fsync

        def fail(path: Path, target: Path) -> Path:
            if target.name.startswith(name):
                raise OSError(5, "Input/output error")
            return replace(path, target)

        def fail_to_flush(number: int) -> None:
            if name == "config.json" and (tmp_path / name).exists():
                raise OSError(5, "Input/output error")
            fsync(number)

        monkeypatch.setattr(Path, "replace", fail)
        monkeypatch.setattr(os, "fsync", fail_to_flush)
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*Input/output error\), [\d.]+ [GT]B are free"):
            write_safetensors(
                tmp_path, SMALL, parts(SMALL, draw(SMALL, "float32")), dtype="float32", max_shard_bytes=20_000
            )
        assert not any(tmp_path.iterdir())

    def test_error_of_the_source_stays_what_it_is(self, tmp_path: Path) -> None:
        def failing() -> Parts:
            yield next(parts(SMALL, draw(SMALL, "float32")))
            raise OSError("the source's disk")

        with pytest.raises(OSError, match="the source's disk"):
            write_safetensors(tmp_path, SMALL, failing(), dtype="float32")
        assert not any(tmp_path.iterdir())


class TestFolder:
    def export(self, folder: Path) -> None:
        write_safetensors(folder, SMALL, parts(SMALL, draw(SMALL, "float32")), dtype="float32")

    def test_one_that_is_not_empty_stays_as_it_is(self, tmp_path: Path) -> None:
        self.export(tmp_path)
        before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}
        with pytest.raises(CheckpointError, match="exists and is not empty: choose another folder, or remove it first"):
            self.export(tmp_path)
        assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before

    def test_one_that_holds_an_interrupted_export_stays_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "shard-00001.part").touch()
        with pytest.raises(CheckpointError, match="holds what an interrupted export left: choose another folder"):
            self.export(tmp_path)
        assert (tmp_path / "shard-00001.part").exists()

    def test_one_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=r"cannot be made \(File exists\): choose a path that you may write"):
            self.export(tmp_path / "file")
        with pytest.raises(
            CheckpointError, match=r"cannot be made \(Not a directory\): choose a path that you may write"
        ):
            self.export(tmp_path / "file" / "folder")

    def test_too_little_room_is_refused_beforehand(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(CheckpointError, match=r"[\d.]+ kB are to be written and 1\.0 kB are free: make room"):
            self.export(tmp_path)

    def test_nothing_is_left_where_the_disk_takes_no_more(self, tmp_path: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(
                CheckpointError, match=r"cannot be written \(.*File too large.*\), [\d.]+ [GT]B are free"
            ):
                self.export(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("module", ["safetensors", "safetensors.numpy"])
    def test_nothing_is_made_where_the_package_is_absent(
        self, tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(CheckpointError, match=r"safetensors is not installed: run pip install '\.\[safetensors\]'"):
            self.export(tmp_path / "new")
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype=float16 cannot be exported: choose float32 or bfloat16"),
        ({"dtype": "float32", "max_shard_bytes": 0}, "max_shard_bytes=0 must be a number of bytes, 1 or more"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "new", SMALL, [], **options)
    assert not (tmp_path / "new").exists()


GATE = "layers.1.feed_forward.gate"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            ("lm_head", None, np.ones((56, 24), np.float32)),
            "lm_head is no part of the model, or was given before: give",
        ),
        ((GATE, None, np.ones((3, 24, 40), np.float32)), f"{GATE} is no part of the model"),
        ((GATE, 3, np.ones((24, 40), np.float32)), f"{GATE}.3 is no part of the model"),
        ((GATE, 0, np.ones((24, 40), np.float32)), f"{GATE}.0 is no part of the model, or was given before"),
        ((GATE, 2, np.ones((40, 24), np.float32)), rf"{GATE}.2 is float32 \[40, 24\]: float32 or bfloat16 \[24, 40\]"),
        (
            (GATE, 2, np.ones((24, 40), np.int8)),
            rf"{GATE}.2 is int8 \[24, 40\]: float32 or bfloat16 \[24, 40\] is needed",
        ),
        (None, rf"1 of the 38 parts were not given, such as {GATE}.2\."),
    ],
)
def test_parts_that_are_not_the_models_are_refused(tmp_path: Path, part: Any, message: str) -> None:
    given = [entry for entry in parts(SMALL, draw(SMALL, "float32")) if entry[:2] != (GATE, 2)]
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path, SMALL, given + ([part] if part else []), dtype="float32")
    assert not any(tmp_path.iterdir())
