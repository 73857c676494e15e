"""Safetensors checkpoints: their configuration, and a sentence for whatever is wrong with them."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors_files import BFLOAT16, DENSE, SMALL, TWELVE, as_stored, draw, hpcai_name, keyfan_name, write

from grokjax.checkpoint import CheckpointError
from grokjax.checkpoint.formats.safetensors import open_safetensors
from grokjax.checkpoint.formats.safetensors_names import HPCAI, KEYFAN, Scheme, config_fields, read_config
from grokjax.config import GrokConfig


class TestConfig:
    def write_config(self, folder: Path, **changes: Any) -> Path:
        fields = {
            name: value for name, value in {**config_fields(SMALL, HPCAI), **changes}.items() if value != "absent"
        }
        (folder / "config.json").write_text(json.dumps(fields))
        return folder / "config.json"

    @pytest.mark.parametrize(
        "config",
        [SMALL, GrokConfig.grok_1(), DENSE.replace(rope_base=5e5, norm_eps=1e-6, eos_id=9, attention_softcap=50)],
    )
    @pytest.mark.parametrize("scheme", [KEYFAN, HPCAI])
    def test_comes_back_as_it_was_written(self, tmp_path: Path, config: GrokConfig, scheme: Scheme) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config_fields(config, scheme)))
        assert read_config(tmp_path / "config.json") == config

    def test_ours_is_understood(self, tmp_path: Path) -> None:
        write(tmp_path, as_stored(SMALL, draw(SMALL, "float32"), hpcai_name))
        (tmp_path / "config.json").write_text(SMALL.to_json())
        assert open_safetensors(tmp_path).config == SMALL

    def test_published_fields_of_grok_1_are_understood(self, tmp_path: Path) -> None:
        fields = {
            "architectures": ["Grok1ModelForCausalLM"],
            "vocab_size": 131072,
            "hidden_size": 6144,
            "intermediate_size": 32768,
            "num_hidden_layers": 64,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "attn_output_multiplier": 0.08838834764831845,
            "embedding_multiplier_scale": 78.38367176906169,
            "output_multiplier_scale": 0.5773502691896257,
            "max_attn_value": 30.0,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000.0,
            "use_cache": True,
            "num_experts_per_tok": 2,
            "num_experts": 8,
            "pad_token_id": None,
        }
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert read_config(tmp_path / "config.json") == GrokConfig.grok_1()

    def test_is_used_and_gives_way_to_an_argument(self, tmp_path: Path) -> None:
        write(tmp_path, as_stored(SMALL, draw(SMALL, "float32"), keyfan_name))
        self.write_config(tmp_path)
        assert open_safetensors(tmp_path).config == SMALL
        self.write_config(tmp_path, vocab_size="none")
        other = SMALL.replace(max_seq_len=99)
        assert open_safetensors(tmp_path, other).config == other

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_size": "absent", "num_experts": None}, r"config.json: lacks hidden_size, num_experts: add what"),
            ({"num_attention_heads": 3}, "num_heads=3 is not a multiple of num_kv_heads=2"),
            ({"num_attention_heads": 0, "head_dim": None}, "num_heads=0 must be an integer, 1 or more"),
            ({"hidden_size": "24", "head_dim": None}, "model_dim='24' must be an integer"),
            ({"hidden_size": 2, "head_dim": None}, "head_dim=0 must be an integer, 1 or more"),
            ({"rms_norm_eps": float("nan")}, "norm_eps=nan must be a finite number"),
            ({"eos_token_id": [2, 3]}, r"eos_id=\[2, 3\] must be a token id"),
        ],
    )
    def test_impossible_fields_are_refused(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            read_config(self.write_config(tmp_path, **changes))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "config.json: not JSON .*: download it again"),
            ("[" * 100_000, "config.json: not JSON .*: download it again"),
            ("[]", "config.json: holds no JSON object but a list: download it again"),
        ],
    )
    def test_text_that_is_no_object_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_config(tmp_path / "config.json")

    def test_one_that_cannot_be_read_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"cannot be read \(No such file or directory\): check its permissions"
        ):
            read_config(tmp_path / "config.json")
        os.mkfifo(tmp_path / "config.json")
        with pytest.raises(CheckpointError, match=r"a link, a pipe or a folder, and a file of its own is needed"):
            read_config(tmp_path / "config.json")

    def test_a_byte_order_mark_is_passed_over(self, tmp_path: Path) -> None:
        path = self.write_config(tmp_path)
        path.write_text(path.read_text(), encoding="utf-8-sig")
        assert read_config(path) == SMALL

    def test_a_link_is_followed(self, tmp_path: Path) -> None:
        """As they lie in the cache of the hub's client."""
        blob = self.write_config(tmp_path).rename(tmp_path / "blob")
        (tmp_path / "config.json").symlink_to(blob)
        assert read_config(tmp_path / "config.json") == SMALL

    @pytest.mark.parametrize("field", ["num_layers", "num_experts"])
    def test_more_layers_or_experts_than_tensors_are_refused(self, tmp_path: Path, field: str) -> None:
        """A number that would take hours to go through is refused at once."""
        write(tmp_path, as_stored(SMALL, draw(SMALL, "float32"), hpcai_name))
        with pytest.raises(CheckpointError, match=rf"{field}=1000000000 is too large for the \d+ tensors in its files"):
            open_safetensors(tmp_path, SMALL.replace(**{field: 10**9}))

    def test_unknown_sizes_are_asked_for(self, tmp_path: Path) -> None:
        write(tmp_path, as_stored(TWELVE, draw(TWELVE, "float32"), hpcai_name))
        with pytest.raises(CheckpointError) as error:
            open_safetensors(tmp_path)
        assert str(error.value) == (
            f"{tmp_path}: the files say vocab_size=56, model_dim=24, num_layers=12, num_experts=3, ffn_dim=40, "
            "num_heads*head_dim=32, num_kv_heads*head_dim=16, which is not Grok-1; they cannot say num_heads, "
            "num_kv_heads, head_dim, experts_per_token, max_seq_len, embedding_multiplier, output_multiplier, "
            "attention_multiplier: put the model's config.json beside them, or pass the whole configuration, "
            "config=GrokConfig(...) or --config FILE."
        )

    def test_sizes_that_cannot_be_told_are_an_error(self, tmp_path: Path) -> None:
        stored = as_stored(SMALL, draw(SMALL, "float32"), hpcai_name)
        del stored["model.layers.0.attn.k_proj.weight"]
        write(tmp_path, stored)
        with pytest.raises(
            CheckpointError, match=r"found no matrix model\.layers\.0\.attn\.k_proj\.weight, which tells"
        ):
            open_safetensors(tmp_path)


def resave(file: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


class TestFiles:
    """What is wrong with the files."""

    FIRST = "model-00001-of-00003.safetensors"
    HELD = "transformer.decoder_layer.0.moe.0.linear.weight"

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write(tmp_path, as_stored(SMALL, draw(SMALL, "float32"), keyfan_name), num_files=3)
        assert self.HELD in load_file(tmp_path / self.FIRST)
        return tmp_path

    def problems(self, folder: Path) -> list[str]:
        with pytest.raises(CheckpointError) as error:
            open_safetensors(folder, SMALL)
        head, *lines, advice = str(error.value).split("\n")
        assert re.fullmatch(rf"{folder}: files are damaged or missing, \d+ problems?:", head)
        assert advice == "Download these files again."
        return [line.strip() for line in lines]

    def test_missing_ones_are_listed(self, folder: Path) -> None:
        (folder / self.FIRST).unlink()
        assert self.problems(folder) == [f"{self.FIRST}: missing, model.safetensors.index.json names it"]

    def test_one_that_the_index_does_not_name_is_not_read_and_said_so(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (folder / "consolidated.safetensors").write_bytes(b"something else")
        assert open_safetensors(folder, SMALL).config == SMALL
        assert "model.safetensors.index.json does not name consolidated.safetensors, which is not read" in caplog.text

    @pytest.mark.parametrize("with_index", [True, False])
    def test_what_systems_leave_is_passed_over(self, folder: Path, with_index: bool) -> None:
        for name in (f"._{self.FIRST}", ".DS_Store", f"@eaDir/{self.FIRST}"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"left by a system")
        if not with_index:
            (folder / "model.safetensors.index.json").unlink()
        assert open_safetensors(folder, SMALL).config == SMALL

    def test_other_tensors_than_the_index_says_are_listed(self, folder: Path) -> None:
        resave(folder / self.FIRST, lambda tensors: tensors.update(strange=tensors.pop(self.HELD)))
        assert self.problems(folder) == [
            f"{self.FIRST}: lacks {self.HELD}, which model.safetensors.index.json says it holds",
            f"{self.FIRST}: holds strange, which model.safetensors.index.json does not say",
        ]

    def test_a_tensor_in_two_files_is_named(self, folder: Path) -> None:
        (folder / "model.safetensors.index.json").unlink()
        resave(folder / "model-00003-of-00003.safetensors", lambda tensors: tensors.update({self.HELD: np.ones(1)}))
        assert self.problems(folder) == [f"model-00003-of-00003.safetensors: holds {self.HELD}, as does {self.FIRST}"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: data[:-1], "incomplete metadata, file not fully covered"),
            (lambda data: data + b"more", "incomplete metadata, file not fully covered"),
            (lambda data: data[:50], "invalid header length"),
            (lambda data: b"", "header too small"),
            (lambda data: b"\xff" * 64, "header too large"),
            (lambda data: data[:8] + b"x" * (len(data) - 8), "invalid (UTF-8|JSON) in header"),
        ],
    )
    def test_damaged_ones_are_named(self, folder: Path, change: Callable[[bytes], bytes], message: str) -> None:
        file = folder / self.FIRST
        file.write_bytes(change(file.read_bytes()))
        (problem,) = self.problems(folder)
        assert re.match(rf"{file}: cannot be read \(.*{message}.*\): download it again\.", problem)

    def test_one_that_was_replaced_after_opening_is_named(self, folder: Path) -> None:
        gate = open_safetensors(folder, SMALL).tensors["layers.0.feed_forward.gate"].weight
        resave(folder / self.FIRST, lambda tensors: tensors.update({self.HELD: np.ones((40, 23), np.float32)}))
        with pytest.raises(CheckpointError, match=f"{self.FIRST}: the file was changed or replaced after .*: open it"):
            gate.read()
        (folder / self.FIRST).write_bytes(b"short")
        with pytest.raises(CheckpointError, match=f"{self.FIRST}: the file was changed or replaced after .*: open it"):
            gate.read((0,))
        (folder / self.FIRST).unlink()
        with pytest.raises(CheckpointError, match=rf"{self.FIRST}: cannot be read \(No such file"):
            gate.read((0,))
        assert gate.read((slice(0, 0),)).shape == (0, 24, 40)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ("{", "index.json: not JSON .*: download it again"),
            ("\ufeff{}", "index.json: has no weight_map"),
            ("[]", "index.json: holds no JSON object but a list"),
            ("{}", "index.json: has no weight_map from tensors to files: download it again"),
            ('{"weight_map": {}}', "index.json: has no weight_map"),
            ('{"weight_map": {"a": 1}}', r"index.json: places a in 1; a \*\.safetensors file beside it is allowed"),
            ('{"weight_map": {"a": "../x.safetensors"}}', r"places a in '\.\./x\.safetensors'; a "),
            ('{"weight_map": {"a": "x.bin"}}', r"places a in 'x\.bin'; a "),
        ],
    )
    def test_bad_index_is_refused(self, folder: Path, index: str, message: str) -> None:
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match=message):
            open_safetensors(folder, SMALL)


class TestTensors:
    """What is wrong with the tensors."""

    GATE = "transformer.decoder_layer.1.moe.2.linear.weight"
    NORM = "transformer.decoder_layer.0.rms_norm.weight"

    def problems(self, folder: Path, stored: dict[str, np.ndarray], config: GrokConfig = SMALL) -> list[str]:
        write(folder, stored)
        with pytest.raises(CheckpointError) as error:
            open_safetensors(folder, config)
        head, *lines, advice = str(error.value).split("\n")
        assert re.fullmatch(rf"{folder}: the files do not fit the configuration, \d+ problems?:", head)
        assert advice == "Pass the configuration that the checkpoint was made with, or download these files again."
        return [line.strip() for line in lines]

    @pytest.fixture
    def stored(self) -> dict[str, np.ndarray]:
        return as_stored(SMALL, draw(SMALL, "float32"), keyfan_name)

    def test_missing_and_surplus_ones_are_listed(self, tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
        stored["transformer.extra"] = stored.pop(self.GATE)
        assert self.problems(tmp_path, stored) == [f"{self.GATE}: missing", "transformer.extra: surplus"]

    def test_norm_under_both_endings_is_surplus(self, tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
        other = self.NORM.replace(".weight", ".scale")
        assert self.problems(tmp_path, stored | {other: stored[self.NORM].copy()}) == [f"{other}: surplus"]

    def test_missing_norm_is_named(self, tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
        del stored[self.NORM]
        assert self.problems(tmp_path, stored) == [f"{self.NORM}: missing"]

    def test_other_shapes_are_listed(self, tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
        stored[self.GATE] = stored[self.GATE].T.copy()
        stored[self.NORM] = stored[self.NORM][:, None].copy()
        assert self.problems(tmp_path, stored) == [
            f"{self.NORM}: the weight has the shape [24, 1], the configuration asks for [24]",
            f"{self.GATE}: the weight has the shape [24, 40], the configuration asks for [40, 24]",
        ]

    @pytest.mark.parametrize(("dtype", "name"), [("float16", "F16"), ("int8", "I8"), ("float64", "F64")])
    def test_other_dtypes_are_listed(
        self, tmp_path: Path, stored: dict[str, np.ndarray], dtype: str, name: str
    ) -> None:
        stored[self.GATE] = stored[self.GATE].astype(dtype)
        problem, mixed = self.problems(tmp_path, stored)
        assert problem == f"{self.GATE}: the dtype is {name}; F32 and BF16 are allowed: convert it first"
        assert mixed.startswith("layers.1.feed_forward.gate: its experts are stored as F")

    def test_experts_of_two_dtypes_are_refused(self, tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
        stored[self.GATE] = stored[self.GATE].astype(BFLOAT16)
        assert self.problems(tmp_path, stored) == [
            "layers.1.feed_forward.gate: its experts are stored as BF16 and F32; one dtype for all is allowed"
        ]

    @pytest.mark.parametrize("shape", [(56, 23), (24, 56), (56,)])
    def test_head_that_cannot_be_tied_is_refused(
        self, tmp_path: Path, stored: dict[str, np.ndarray], shape: tuple[int, ...]
    ) -> None:
        assert self.problems(tmp_path, stored | {"lm_head.weight": np.ones(shape, np.float32)}) == [
            f"lm_head.weight: the weight has the shape {list(shape)}, the embedding [56, 24]; Grok ties them"
        ]

    def test_layers_beyond_the_configuration_s_are_surplus(self, tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
        problems = self.problems(tmp_path, stored, SMALL.replace(num_layers=1))
        assert len(problems) == 18
        assert all(re.fullmatch(r"transformer\.decoder_layer\.1\..*: surplus", problem) for problem in problems)

    @pytest.mark.parametrize("names", [["language_model.embed"], []])
    def test_unknown_names_are_refused(self, tmp_path: Path, names: list[str]) -> None:
        write(tmp_path, {name: np.ones(1, np.float32) for name in names})
        held = re.escape(", ".join(names) or "no tensors")
        with pytest.raises(CheckpointError, match=f"holds {held}; names that begin with transformer.* are known"):
            open_safetensors(tmp_path, SMALL)
