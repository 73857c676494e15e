"""The release's files: found, measured and mapped without unpickling; whatever is wrong with them is a sentence."""

import itertools
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from goldens import MODEL_CASES, GoldenCase, load_case

from grokjax.checkpoint import CheckpointError, Progress, load, open_release, parameter_names
from grokjax.checkpoint.formats.release import find_release, infer_sizes, read_tensor, release_name
from grokjax.config import GrokConfig
from grokjax.testing import tensor_pickle, write_release_checkpoint, write_tensor

TINY = GrokConfig.tiny()
DENSE = TINY.replace(num_experts=1, experts_per_token=1)


class StrictUnpickler(pickle.Unpickler):
    """An independent reader for the files of this repository: the real unpickler, with the release's globals only."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.ndarray(0).__reduce__()[0]
        return {
            "__main__.QuantizedWeight8bit": type("QuantizedWeight8bit", (), {}),
            "numpy.core.multiarray._reconstruct": reconstruct,
            "numpy._core.multiarray._reconstruct": reconstruct,
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
            "ml_dtypes.bfloat16": ml_dtypes.bfloat16,
        }[f"{module}.{name}"]


def assert_same_array(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


@pytest.fixture(params=MODEL_CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return load_case(request.param)


class TestGoldenFiles:
    def test_headers_match_the_manifest(self, case: GoldenCase) -> None:
        checkpoint = open_release(case.checkpoint, case.config)
        assert [tensor.file.name for tensor in checkpoint.tensors.values()] == [
            entry["file"] for entry in case.manifest
        ]
        for entry, (parameter, tensor) in zip(case.manifest, checkpoint.tensors.items(), strict=True):
            assert release_name(parameter, case.config) == f"{entry['module']} {entry['param']}"
            quantized = entry["kind"] == "QuantizedWeight8bit"
            assert (tensor.scales is not None) == quantized
            prefix = "weight_" if quantized else ""
            assert list(tensor.weight.shape) == entry[f"{prefix}shape"]
            assert tensor.weight.dtype.name == entry[f"{prefix}dtype"]
            if tensor.scales is not None:
                assert list(tensor.scales.shape) == entry["scales_shape"]
                assert tensor.scales.dtype.name == entry["scales_dtype"]

    def test_arrays_are_what_an_unpickler_reads(self, case: GoldenCase) -> None:
        for tensor in open_release(case.checkpoint, case.config).tensors.values():
            with tensor.file.open("rb") as stream:
                value = StrictUnpickler(stream).load()
            if tensor.scales is None:
                assert_same_array(tensor.weight.array(), value)
            else:
                assert_same_array(tensor.weight.array(), value.weight)
                assert_same_array(tensor.scales.array(), value.scales)

    def test_writer_makes_the_same_bytes(self, case: GoldenCase) -> None:
        for tensor in open_release(case.checkpoint, case.config).tensors.values():
            scales = None if tensor.scales is None else tensor.scales.array()
            assert b"".join(tensor_pickle(tensor.weight.array(), scales)) == tensor.file.read_bytes(), tensor.file

    def test_array_is_a_read_only_map(self, case: GoldenCase) -> None:
        weight = read_tensor(case.checkpoint / "tensor00002_000").weight
        array = weight.array()
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert weight.num_bytes == array.nbytes


# One entry, some, all or none of an axis, from its beginning, its middle and its end.
ENTRIES = (0, 2, slice(None), slice(0, 2), slice(1, 2), slice(1, 3), slice(2, None), slice(0, 0))


def test_every_region_is_read_as_a_map_would_give_it(tmp_path: Path) -> None:
    """Some lie side by side in the file, others in many parts; axes of one entry are in no way of either."""
    values = np.arange(27 * 2, dtype=np.float32).reshape(3, 1, 3, 3, 2)
    write_tensor(tmp_path / "tensor", values)
    weight = read_tensor(tmp_path / "tensor").weight
    for first, second, third in itertools.product(ENTRIES, repeat=3):
        for index in ((first,), (first, 0, second), (first, slice(None), second, third)):
            assert_same_array(weight.read(index), values[index])


# File in the layer -> the bytes of the published file.
PUBLISHED_SIZES = {
    "embedding.table": 3_221_225_637,
    "final_norm.scale": 24_727,
    "feed_forward.gate": 1_611_137_347,
    "feed_forward.down": 1_611_399_491,
    "feed_forward.up": 1_611_137_347,
    "attention.key": 6_293_814,
    "attention.output": 37_847_359,
    "attention.query": 37_761_334,
    "attention.value": 6_293_814,
    "pre_attention_norm.scale": 24_727,
    "post_attention_norm.scale": 24_727,
    "pre_feed_forward_norm.scale": 24_727,
    "post_feed_forward_norm.scale": 24_727,
    "feed_forward.router": 196_770,
}


class TestFullRelease:
    def test_files_have_the_published_sizes(self, full_release: Path) -> None:
        sizes = {
            parameter: tensor.file.stat().st_size for parameter, tensor in open_release(full_release).tensors.items()
        }
        for parameter, size in sizes.items():
            assert size == PUBLISHED_SIZES[re.sub(r"^layers\.\d+\.", "", parameter)], parameter
        assert (len(sizes), sum(sizes.values())) == (770, 318_239_886_140)

    def test_is_recognised_without_a_configuration(self, full_release: Path) -> None:
        assert open_release(full_release.parent).config == GrokConfig.grok_1()

    def test_opening_reads_no_array(self, full_release: Path) -> None:
        # A process of its own: other tests' threads would count too.
        program = """
import sys, tracemalloc
from grokjax.checkpoint import open_release
tracemalloc.start()
checkpoint = open_release(sys.argv[1])
print(tracemalloc.get_traced_memory()[1])
assert checkpoint.tensors["layers.63.feed_forward.down"].weight.array()[7, 32767, :4].tolist() == [0] * 4
"""
        command = [sys.executable, "-c", program, str(full_release)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert peak < 4 * 2**20


class TestNames:
    def test_layers_follow_the_sorted_order_of_names(self) -> None:
        names = parameter_names(TINY.replace(num_layers=12))
        assert len(names) == 2 + 12 * 12
        starts = [names[f"tensor{2 + 12 * block:05d}_000"] for block in range(12)]
        order = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
        assert starts == [f"layers.{i}.feed_forward.gate" for i in order]

    def test_twelve_layers_are_read_in_that_order(self, tmp_path: Path) -> None:
        config = TINY.replace(num_layers=12)
        marks = {f"layers.{i}.pre_attention_norm.scale": np.full(64, i, np.float32) for i in range(12)}
        write_release_checkpoint(tmp_path, config, weights=marks)
        tensors = open_release(tmp_path, config).tensors
        assert [tensors[parameter].weight.array()[0] for parameter in marks] == list(range(12))
        # Block 2 of the files is layer 10: its first norm is the file 2 + 12 * 2 + 7.
        assert read_tensor(tmp_path / "tensor00033_000").weight.array()[0] == 10

    def test_names_are_the_release_s(self) -> None:
        assert release_name("layers.3.feed_forward.gate", TINY) == "transformer/decoder_layer_3/moe/linear w"
        assert release_name("layers.3.feed_forward.gate", DENSE) == "transformer/decoder_layer_3/linear w"
        assert (
            release_name("layers.12.post_feed_forward_norm.scale", TINY)
            == "transformer/decoder_layer_12/rms_norm_3 scale"
        )
        assert release_name("embedding.table", TINY) == "language_model/in_out_embed embeddings"

    def test_dense_has_no_router(self) -> None:
        assert not [name for name in parameter_names(DENSE).values() if "router" in name]


class TestFindRelease:
    @pytest.mark.parametrize("child", ["", "ckpt-0", "ckpt"])
    def test_found_in_each_of_its_places(self, tmp_path: Path, child: str) -> None:
        folder = tmp_path / child
        folder.mkdir(exist_ok=True)
        write_tensor(folder / "tensor00000_000", np.ones(3, np.float32))
        assert find_release(tmp_path) == folder

    def test_not_found_where_there_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "tensor00000_000.part").write_bytes(b"")
        assert find_release(tmp_path) is None
        assert find_release(tmp_path / "absent") is None
        with pytest.raises(CheckpointError, match=r"found no files tensorNNNNN_000 in it.*: pass the folder"):
            open_release(tmp_path, TINY)


class TestWrittenCheckpoint:
    @pytest.mark.parametrize("scale_blocks", [1, 4, 8])
    @pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
    def test_what_was_written_is_read_back(self, tmp_path: Path, scale_blocks: int, scale_dtype: str) -> None:
        written = write_release_checkpoint(tmp_path, TINY, scale_blocks=scale_blocks, scale_dtype=scale_dtype)
        tensors = open_release(tmp_path, TINY).tensors
        assert list(tensors) == list(written)
        for parameter, (weight, scales) in written.items():
            assert_same_array(tensors[parameter].weight.array(), weight)
            assert (tensors[parameter].scales is None) == (scales is None)
            if scales is not None:
                assert_same_array(tensors[parameter].scales.array(), scales)
        down = written["layers.1.feed_forward.down"]
        assert down.scales is not None
        assert (down.scales.shape, down.scales.dtype.name) == ((8, scale_blocks, 64), scale_dtype)

    @pytest.mark.parametrize("config", [TINY, DENSE], ids=["experts", "dense"])
    def test_plain_weights_have_no_scales(self, tmp_path: Path, config: GrokConfig) -> None:
        write_release_checkpoint(tmp_path, config, quantized=False)
        assert all(tensor.scales is None for tensor in open_release(tmp_path, config).tensors.values())

    def test_blocks_are_dequantised_with_their_own_scales(self, tmp_path: Path) -> None:
        weight = np.arange(1, 9, dtype=np.int8).reshape(4, 2)
        scales = np.array([[1, 10], [100, 1000]], np.float32)
        written = write_release_checkpoint(tmp_path, TINY, weights={"layers.0.attention.key": (weight, scales)})
        expected = [[1, 20], [3, 40], [500, 6000], [700, 8000]]
        assert written["layers.0.attention.key"].dequantised().tolist() == expected

    def test_weights_have_unit_gain(self, tmp_path: Path) -> None:
        for parameter, tensor in write_release_checkpoint(tmp_path, TINY, scale_blocks=8).items():
            if tensor.scales is not None:
                gain = tensor.dequantised().std() * np.sqrt(tensor.weight.shape[-2])
                assert 0.8 < gain < 1.3, parameter

    def test_replacing_one_tensor_changes_no_other(self, tmp_path: Path) -> None:
        weights = {"final_norm.scale": np.ones(64, np.float32)}
        first = write_release_checkpoint(tmp_path / "first", TINY, seed=5)
        second = write_release_checkpoint(tmp_path / "second", TINY, seed=5, weights=weights)
        different = [name for name in first if first[name].weight.tobytes() != second[name].weight.tobytes()]
        assert different == ["final_norm.scale"]

    def test_impossible_requests_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"scale_blocks=3 does not divide N\*H=128 and F=128: choose a divisor"):
            write_release_checkpoint(tmp_path, TINY, scale_blocks=3)
        with pytest.raises(ValueError, match="scale_dtype='float16' is unknown: choose one of"):
            write_release_checkpoint(tmp_path, TINY, scale_dtype="float16")
        with pytest.raises(ValueError, match=r"unknown parameters \['lm_head'\]: docs/model\.md lists them"):
            write_release_checkpoint(tmp_path, TINY, weights={"lm_head": np.ones(1)})


class TestFileSet:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_release_checkpoint(tmp_path, TINY)
        return tmp_path

    def test_missing_files_are_listed(self, folder: Path) -> None:
        for number in (3, 20, 21, 22):
            (folder / f"tensor{number:05d}_000").unlink()
        with pytest.raises(CheckpointError) as error:
            open_release(folder, TINY)
        assert str(error.value) == (
            f"{folder}: the files do not fit the configuration, 2 problems:\n"
            "  missing tensor00003_000\n"
            "  missing tensor00020_000 to tensor00022_000\n"
            "Pass the configuration that the checkpoint was made with, or download these files again."
        )

    def test_surplus_files_are_listed(self, folder: Path) -> None:
        write_tensor(folder / "tensor00026_000", np.ones(64, np.float32))
        write_tensor(folder / "tensor00003_001", np.ones(64, np.float32))
        with pytest.raises(
            CheckpointError, match=r"2 problems:\n  surplus tensor00003_001\n  surplus tensor00026_000\n"
        ):
            open_release(folder, TINY)

    def test_other_files_do_not_matter(self, folder: Path) -> None:
        for name in ("README.md", ".DS_Store", "._tensor00000_000"):
            (folder / name).write_text("notes")
        (folder / "tensor00000_000.part").write_bytes(b"")
        assert len(open_release(folder, TINY).tensors) == 26

    def test_more_layers_than_files_are_refused_at_once(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="num_layers=1000000000 is too large for the 26 files in it: use"):
            open_release(folder, TINY.replace(num_layers=10**9))

    def test_a_file_that_changes_after_it_was_opened_is_named(self, folder: Path) -> None:
        """Shortened, written, replaced or removed: the bytes would be others, or none."""
        table = open_release(folder, TINY).tensors["embedding.table"].weight
        data = table.path.read_bytes()
        other = folder / "other"
        other.write_bytes(bytes(len(data)))
        for change in (
            lambda: table.path.write_bytes(data[:-100]),
            lambda: table.path.write_bytes(data),
            lambda: other.replace(table.path),
        ):
            change()
            for index in ((), (3,), (slice(0, 2),)):
                with pytest.raises(CheckpointError, match="tensor00000_000: the file was changed or replaced after it"):
                    table.read(index)
        table.path.unlink()
        with pytest.raises(CheckpointError, match=r"tensor00000_000: cannot be read \(No such file or directory\)"):
            table.read()

    @pytest.mark.usefixtures("part_by_part")
    def test_a_file_that_changes_under_a_load_ends_it(self, folder: Path) -> None:
        """Parts are read one after the other: threads may have read the last before anybody hears of the first."""
        last = max(folder.iterdir())

        def shorten(_: Progress) -> None:
            last.write_bytes(last.read_bytes()[:-1])

        with pytest.raises(CheckpointError, match=f"{last.name}: the file was changed or replaced after it"):
            load(folder, TINY, progress=shorten)

    def test_all_mismatches_are_listed(self, folder: Path) -> None:
        write_tensor(folder / "tensor00000_000", np.ones((512, 32), np.float32))
        (folder / "tensor00001_000").write_bytes(b"")
        write_tensor(folder / "tensor00013_000", np.ones((64, 8), np.int8))
        with pytest.raises(CheckpointError) as error:
            open_release(folder, TINY)
        assert str(error.value).split("\n")[1:-1] == [
            "  tensor00000_000 (language_model/in_out_embed embeddings): the weight has the shape [512, 32], the "
            "configuration asks for [512, 64]",
            f"  {folder}/tensor00001_000: found an empty file at byte 0; a pickled array was expected: download the "
            "file again and compare its size with the published one.",
            "  tensor00013_000 (transformer/decoder_layer_0/router w): the weight is int8 without scales; only float32 "
            "and bfloat16 go without",
        ]

    def test_a_long_list_is_cut(self, folder: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"26 problems:(\n  tensor.*){20}\n  and 6 more\nPass the configuration"
        ):
            open_release(folder, TINY.replace(model_dim=32, num_experts=4, ffn_dim=64, num_heads=4, num_kv_heads=2))


GATE = r"tensor00002_000 \(transformer/decoder_layer_0/moe/linear w\): "
INT8 = np.ones((8, 64, 128), np.int8)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"layers.0.feed_forward.gate": np.ones((8, 64, 64), np.float32)},
            GATE + r"the weight has the shape \[8, 64, 64\], the configuration asks for \[8, 64, 128\]\n",
        ),
        (
            {"layers.0.feed_forward.gate": INT8},
            GATE + "the weight is int8 without scales; only float32 and bfloat16 go without\n",
        ),
        (
            {"layers.0.feed_forward.gate": (INT8, np.ones((8, 1, 128), np.int8))},
            GATE + "the weight is int8 with int8 scales; int8 with float32 or bfloat16 scales is allowed\n",
        ),
        (
            {"layers.0.feed_forward.gate": (INT8.astype(np.float32), np.ones((8, 1, 128), np.float32))},
            GATE + "the weight is float32 with float32 scales; int8 with",
        ),
        (
            {"layers.0.feed_forward.gate": (INT8, np.ones((8, 3, 128), np.float32))},
            GATE + r"the scales have the shape \[8, 3, 128\]; \[8, Q, 128\] is allowed, Q any divisor of 64\n",
        ),
        (
            {"layers.0.feed_forward.gate": (INT8, np.ones((8, 1, 64), np.float32))},
            GATE + r"the scales have the shape \[8, 1, 64\]; \[8, Q, 128\] is allowed",
        ),
        (
            {"layers.0.feed_forward.gate": (INT8, np.ones((1, 128), np.float32))},
            GATE + r"the scales have the shape \[1, 128\]; \[8, Q, 128\] is allowed",
        ),
        (
            {"layers.0.feed_forward.router": (np.ones((64, 8), np.int8), np.ones((1, 8), np.float32))},
            "the weight is quantised; only attention and feed-forward weights are, in a release\n",
        ),
        (
            {"embedding.table": (np.ones((512, 64), np.int8), np.ones((1, 64), np.float32))},
            r"tensor00000_000 \(language_model/in_out_embed embeddings\): the weight is quantised; only",
        ),
        (
            {"layers.0.attention.key": (np.ones(64, np.int8), np.ones(64, np.float32))},
            r"the weight has the shape \[64\].*\n.*the weight is quantised",
        ),
    ],
)
def test_tensor_that_does_not_fit_is_named(tmp_path: Path, weights: Mapping[str, Any], message: str) -> None:
    write_release_checkpoint(tmp_path, TINY, weights=weights)
    with pytest.raises(CheckpointError, match=message):
        open_release(tmp_path, TINY)


class TestInference:
    SIZES = {"vocab_size": 512, "model_dim": 64, "num_layers": 2, "num_experts": 8, "ffn_dim": 128}  # noqa: RUF012
    PRODUCTS = {"num_heads*head_dim": 128, "num_kv_heads*head_dim": 64}  # noqa: RUF012

    @pytest.mark.parametrize("quantized", [True, False])
    def test_sizes_are_told_by_the_shapes(self, tmp_path: Path, quantized: bool) -> None:
        write_release_checkpoint(tmp_path / "ckpt-0", TINY, quantized=quantized)
        assert infer_sizes(tmp_path) == self.SIZES | self.PRODUCTS

    def test_sizes_of_a_dense_model(self, tmp_path: Path) -> None:
        write_release_checkpoint(tmp_path, DENSE)
        assert infer_sizes(tmp_path) == self.SIZES | self.PRODUCTS | {"num_experts": 1}

    def test_what_is_not_known_is_asked_for(self, tmp_path: Path) -> None:
        write_release_checkpoint(tmp_path, TINY)
        with pytest.raises(CheckpointError) as error:
            open_release(tmp_path)
        assert str(error.value) == (
            f"{tmp_path}: the files say vocab_size=512, model_dim=64, num_layers=2, num_experts=8, ffn_dim=128, "
            "num_heads*head_dim=128, num_kv_heads*head_dim=64, which is not Grok-1; they cannot say num_heads, "
            "num_kv_heads, head_dim, experts_per_token, max_seq_len, embedding_multiplier, output_multiplier, "
            "attention_multiplier: pass the whole configuration, config=GrokConfig(...) or --config FILE."
        )

    def test_gap_is_named(self, tmp_path: Path) -> None:
        write_release_checkpoint(tmp_path, TINY)
        (tmp_path / "tensor00007_000").unlink()
        with pytest.raises(CheckpointError, match="missing tensor00007_000: download the missing files"):
            open_release(tmp_path)

    @pytest.mark.parametrize("count", [1, 5, 13, 25])
    def test_no_whole_layers_are_refused(self, tmp_path: Path, count: int) -> None:
        write_release_checkpoint(tmp_path, TINY)
        for number in range(count, 26):
            (tmp_path / f"tensor{number:05d}_000").unlink()
        with pytest.raises(
            CheckpointError, match=rf"{count} files, the first with the shapes \[\[512, 64\].*12 for each layer"
        ):
            infer_sizes(tmp_path)
