"""Safetensors checkpoints: both sets of public names, read in our orientation, slice by slice."""

import json
import os
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors_files import (
    DENSE,
    DTYPES,
    SCHEMES,
    SMALL,
    TWELVE,
    Names,
    as_stored,
    assert_holds,
    draw,
    hpcai_name,
    keyfan_name,
    write,
)

from grokjax.checkpoint import CheckpointError, parameter_shapes, parts_of
from grokjax.checkpoint.formats.safetensors import open_safetensors
from grokjax.checkpoint.formats.safetensors_headers import find_safetensors
from grokjax.checkpoint.formats.safetensors_names import HPCAI, KEYFAN
from grokjax.checkpoint.parameters import Part
from grokjax.config import GrokConfig


class TestValues:
    @pytest.mark.parametrize("names", SCHEMES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num_files", [1, 3])
    def test_every_parameter_is_what_was_written(
        self, tmp_path: Path, names: Names, dtype: str, num_files: int
    ) -> None:
        weights = draw(SMALL, dtype)
        write(tmp_path, as_stored(SMALL, weights, names), num_files)
        checkpoint = open_safetensors(tmp_path, SMALL)
        assert (checkpoint.path, checkpoint.config, checkpoint.layout) == (tmp_path, SMALL, "safetensors")
        assert all(tensor.scales is None for tensor in checkpoint.tensors.values())
        assert_holds(checkpoint, weights)

    @pytest.mark.parametrize("names", SCHEMES)
    def test_dense_model_is_what_was_written(self, tmp_path: Path, names: Names) -> None:
        weights = draw(DENSE, "bfloat16")
        assert weights["layers.0.feed_forward.gate"].shape == (24, 40)
        write(tmp_path, as_stored(DENSE, weights, names))
        assert_holds(open_safetensors(tmp_path, DENSE), weights)

    @pytest.mark.parametrize("names", SCHEMES)
    def test_twelve_layers_keep_their_numbers(self, tmp_path: Path, names: Names) -> None:
        weights = draw(TWELVE, "float32")
        write(tmp_path, as_stored(TWELVE, weights, names), num_files=5)
        assert_holds(open_safetensors(tmp_path, TWELVE), weights)

    def test_twelve_experts_keep_their_numbers(self, tmp_path: Path) -> None:
        config = SMALL.replace(num_experts=12, num_layers=1)
        weights = draw(config, "float32")
        write(tmp_path, as_stored(config, weights, keyfan_name))
        assert_holds(open_safetensors(tmp_path, config), weights)

    def test_several_files_need_no_index(self, tmp_path: Path) -> None:
        weights = draw(SMALL, "float32")
        write(tmp_path, as_stored(SMALL, weights, keyfan_name), num_files=3)
        (tmp_path / "model.safetensors.index.json").unlink()
        assert_holds(open_safetensors(tmp_path, SMALL), weights)

    def test_parameters_may_differ_in_dtype(self, tmp_path: Path) -> None:
        weights = draw(SMALL, "bfloat16") | {"layers.1.feed_forward.router": np.ones((24, 3), np.float32)}
        write(tmp_path, as_stored(SMALL, weights, keyfan_name))
        assert_holds(open_safetensors(tmp_path, SMALL), weights)

    @pytest.mark.parametrize("names", SCHEMES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_head_must_be_the_table(self, tmp_path: Path, names: Names, dtype: str) -> None:
        """One of its own would be dropped."""
        weights = draw(SMALL, "bfloat16")
        head = weights["embedding.table"].astype(dtype)
        write(tmp_path, as_stored(SMALL, weights, names) | {"lm_head.weight": head})
        assert_holds(open_safetensors(tmp_path, SMALL), weights)
        trained = np.ascontiguousarray(head * 1.25)
        write(tmp_path, as_stored(SMALL, weights, names) | {"lm_head.weight": trained})
        with pytest.raises(CheckpointError, match=r"lm_head.weight: row 0 is not that of the embedding; Grok ties"):
            open_safetensors(tmp_path, SMALL)


INDICES: dict[str, list[tuple[int | slice, ...]]] = {
    "final_norm.scale": [(), (slice(3, 9),), (5,), (-1,), (slice(-4, None),), (slice(9, 3),)],
    "embedding.table": [
        (slice(8, 16),),
        (slice(None), slice(6, 12)),
        (7,),
        (7, slice(0, 5)),
        (-1, 3),
        (slice(50, 99),),
    ],
    "layers.1.attention.query": [(slice(4, 8),), (slice(None), slice(8, 24)), (slice(2, 20), slice(30, 32)), (3,)],
    "layers.1.feed_forward.router": [(slice(None), slice(1, 2)), (slice(None), 1), (-2, -1)],
    "layers.1.feed_forward.gate": [
        (1,),
        (-1,),
        (slice(1, 3),),
        (slice(None), slice(None), slice(10, 20)),
        (2, slice(3, 20), slice(0, 7)),
        (slice(0, 2), 5, slice(1, None)),
        (slice(0, 1), slice(None), 39),
        (0, 23, 39),
        (slice(2, 2),),
    ],
}


@pytest.fixture(scope="module", params=DTYPES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder, weights = tmp_path_factory.mktemp("slices"), draw(SMALL, request.param)
    write(folder, as_stored(SMALL, weights, hpcai_name), num_files=2)
    return folder, weights


class TestSlices:
    @pytest.mark.parametrize(("parameter", "index"), [(name, index) for name in INDICES for index in INDICES[name]])
    @pytest.mark.parametrize(
        ("stripe", "columns"), [((512, 8 << 20), 352), ((3, 1 << 20), 5), ((512, 100), 7), ((1, 1), 1)]
    )
    def test_slices_are_numpys(
        self,
        written: tuple[Path, Any],
        parameter: str,
        index: Any,
        stripe: tuple[int, int],
        columns: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name, value in zip(("STRIPE_ROWS", "STRIPE_BYTES", "BLOCK_COLUMNS"), (*stripe, columns), strict=True):
            monkeypatch.setattr(f"grokjax.checkpoint.formats.safetensors.{name}", value)
        folder, weights = written
        found = open_safetensors(folder, SMALL).tensors[parameter].weight.read(index)
        expected = weights[parameter][index]
        assert isinstance(found, np.ndarray)
        assert (found.shape, found.dtype, found.tobytes()) == (expected.shape, expected.dtype, expected.tobytes())
        assert found.flags.c_contiguous

    @pytest.mark.parametrize("index", [(3,), (slice(None), 24), (0, 0, -41)])
    def test_indices_outside_are_errors(self, written: tuple[Path, Any], index: Any) -> None:
        array = open_safetensors(written[0], SMALL).tensors["layers.0.feed_forward.gate"].weight
        with pytest.raises(IndexError):
            array.read(index)

    def test_memory_is_the_slice_and_a_block(self, tmp_path: Path) -> None:
        config = DENSE.replace(num_layers=1, model_dim=1024, ffn_dim=8192)
        stored = as_stored(config, draw(config, "bfloat16"), keyfan_name)
        write(tmp_path, stored)
        tracemalloc.start()
        try:
            gate = open_safetensors(tmp_path, config).tensors["layers.0.feed_forward.gate"].weight
            opened = tracemalloc.get_traced_memory()[1]
            whole = gate.read()
            tracemalloc.reset_peak()
            part = gate.read((slice(None), slice(0, 2048)))
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert opened < 1 << 20
        assert (whole.nbytes, part.nbytes) == (16 << 20, 4 << 20)
        assert now < (20 << 20) + (1 << 19)
        assert peak < (22 << 20) + (1 << 19)


class TestNames:
    @pytest.mark.parametrize(("scheme", "names"), [(KEYFAN, keyfan_name), (HPCAI, hpcai_name)])
    @pytest.mark.parametrize("config", [TWELVE, DENSE], ids=["experts", "dense"])
    def test_every_part_has_its_name(self, scheme: Any, names: Names, config: GrokConfig) -> None:
        parts = [part for parameter in parameter_shapes(config) for part in parts_of(parameter, config)]
        assert [scheme.name(part) for part in parts] == [names(part.name) for part in parts]
        assert len({scheme.name(part) for part in parts}) == len(parts)

    def test_names_are_those_of_the_published_files(self) -> None:
        assert (
            KEYFAN.name(Part("layers.63.feed_forward.down", 7)) == "transformer.decoder_layer.63.moe.7.linear_1.weight"
        )
        assert (
            KEYFAN.name(Part("layers.0.post_feed_forward_norm.scale"))
            == "transformer.decoder_layer.0.rms_norm_3.weight"
        )
        assert HPCAI.name(Part("layers.63.feed_forward.up", 7)) == "model.layers.63.moe_block.experts.7.linear_v.weight"
        assert HPCAI.name(Part("layers.0.pre_feed_forward_norm.scale")) == "model.layers.0.pre_moe_norm.scale"


class TestFind:
    @pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "any.safetensors"])
    def test_found_by_any_of_its_files(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        assert find_safetensors(tmp_path) == tmp_path
        assert find_safetensors(str(tmp_path)) == tmp_path

    def test_not_found_where_there_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "shard-00001.part").touch()
        (tmp_path / "folder.safetensors").mkdir()
        os.mkfifo(tmp_path / "pipe.safetensors")
        assert find_safetensors(tmp_path) is None
        assert find_safetensors(tmp_path / "shard-00001.part") is None
        assert find_safetensors(tmp_path / "absent") is None
        with pytest.raises(
            CheckpointError, match=r"found no \*\.safetensors files and no model\.saf.*: pass the folder"
        ):
            open_safetensors(tmp_path, SMALL)

    def test_package_is_needed_to_open_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path, as_stored(SMALL, draw(SMALL, "float32"), keyfan_name))
        monkeypatch.setitem(sys.modules, "safetensors", None)
        assert find_safetensors(tmp_path) == tmp_path
        with pytest.raises(CheckpointError, match=r"safetensors is not installed: run pip install '\.\[safetensors\]'"):
            open_safetensors(tmp_path, SMALL)


class TestGrok1:
    @pytest.mark.parametrize("names", [keyfan_name, hpcai_name])
    def test_is_recognised_without_a_configuration(self, tmp_path: Path, names: Names) -> None:
        config = GrokConfig.grok_1()
        end, header = 0, {}
        for parameter, shape in parameter_shapes(config).items():
            for part in parts_of(parameter, config):
                matrix = shape[len(part.index) :]
                stored = matrix[::-1] if parameter != "embedding.table" else matrix
                start, end = end, end + 2 * int(np.prod(matrix))
                header[names(part.name)] = {"dtype": "BF16", "shape": stored, "data_offsets": [start, end]}
        data = json.dumps(header).encode()
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(data)) + data)
            file.truncate(8 + len(data) + end)  # the arrays are a hole, which takes no space on the disk
        assert (tmp_path / "model.safetensors").stat().st_blocks < 10_000, "a file system that keeps holes is needed"
        checkpoint = open_safetensors(tmp_path)
        assert checkpoint.config == config
        down = checkpoint.tensors["layers.63.feed_forward.down"].weight
        assert down.shape == (8, 32768, 6144)
        assert down.read((7, slice(32760, None), slice(0, 4))).tolist() == [[0] * 4] * 8
