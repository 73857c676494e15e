"""Writes safetensors checkpoints as the public ones are, with names and orientation spelt out a second time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from grokjax.checkpoint import SafetensorsCheckpoint, parameter_shapes, parts_of
from grokjax.config import GrokConfig

# No two of its sizes are the same, so that a matrix the wrong way round has the wrong shape.
SMALL = GrokConfig.tiny().replace(
    vocab_size=56, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=40, num_experts=3
)
DENSE = SMALL.replace(num_experts=1, experts_per_token=1)
TWELVE = SMALL.replace(num_layers=12)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float32", "bfloat16"]
Names = Callable[[str], str]


def keyfan_name(part: str) -> str:
    """The stored name of `layers.3.feed_forward.gate.5`, written down a second time and in another way."""
    if part == "embedding.table":
        return "transformer.in_out_embed.weight"
    if part == "final_norm.scale":
        return "transformer.rms_norm.weight"
    _, layer, block, name, *expert = part.split(".")
    inside = {
        "attention": f"multi_head_attention.{'linear' if name == 'output' else name}",
        "pre_attention_norm": "rms_norm",
        "post_attention_norm": "rms_norm_1",
        "pre_feed_forward_norm": "rms_norm_2",
        "post_feed_forward_norm": "rms_norm_3",
        "feed_forward": "router",
    }[block]
    if block == "feed_forward" and name != "router":
        linear = {"gate": "linear", "up": "linear_v", "down": "linear_1"}[name]
        inside = f"moe.{expert[0] if expert else 0}.{linear}"
    return f"transformer.decoder_layer.{layer}.{inside}.weight"


def hpcai_name(part: str, norm_ending: str = "scale") -> str:
    if part == "embedding.table":
        return "model.embed_tokens.weight"
    if part == "final_norm.scale":
        return "model.norm.weight"
    _, layer, block, name, *expert = part.split(".")
    if block == "attention":
        return f"model.layers.{layer}.attn.{name[0]}_proj.weight"
    if block != "feed_forward":
        return f"model.layers.{layer}.{block.replace('attention', 'attn').replace('feed_forward', 'moe')}.{norm_ending}"
    if name == "router":
        return f"model.layers.{layer}.moe_block.gate.weight"
    linear = {"gate": "linear", "up": "linear_v", "down": "linear_1"}[name]
    return f"model.layers.{layer}.moe_block.experts.{expert[0] if expert else 0}.{linear}.weight"


def hpcai_name_with_weights(part: str) -> str:
    return hpcai_name(part, "weight")


SCHEMES: list[Names] = [keyfan_name, hpcai_name, hpcai_name_with_weights]


def draw(config: GrokConfig, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Our path -> random values in our orientation."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in parameter_shapes(config).items()}


def as_stored(config: GrokConfig, weights: Mapping[str, np.ndarray], names: Names) -> dict[str, np.ndarray]:
    """Stored name -> stored array."""
    stored = {}
    for parameter, array in weights.items():
        for part in parts_of(parameter, config):
            matrix = array[part.index]
            flip = matrix.ndim == 2 and parameter != "embedding.table"
            stored[names(part.name)] = np.array(matrix.T if flip else matrix, order="C")
    return stored


def write(folder: Path, stored: Mapping[str, np.ndarray], num_files: int = 1) -> None:
    """Writes one file, or several with an index and with each layer spread over them."""
    folder.mkdir(parents=True, exist_ok=True)
    if num_files == 1:
        save_file(dict(stored), folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    places = {name: files[i % num_files] for i, name in enumerate(sorted(stored))}
    for file in files:
        save_file({name: stored[name] for name in stored if places[name] == file}, folder / file)
    total = sum(array.nbytes for array in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_holds(checkpoint: SafetensorsCheckpoint, weights: Mapping[str, np.ndarray]) -> None:
    assert list(checkpoint.tensors) == list(weights)
    for parameter, expected in weights.items():
        array = checkpoint.tensors[parameter].weight
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        found = array.read()
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes(), parameter
        assert found.flags.c_contiguous
        assert found.flags.writeable
