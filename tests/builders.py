"""What several test modules need.

Small checkpoints on disk, with what the float64 reference makes of them; programs for devices that are not here; the
rules and the choice of cases for parametrised tests.
"""

import contextlib
import dataclasses
import functools
import gc
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.typing import DTypeLike

from grokjax import Grok, QuantizedArray, ShardingRules, reference
from grokjax.checkpoint import parameter_names, parameter_shapes
from grokjax.config import GrokConfig
from grokjax.model import abstract_model, named_parameters, with_quantized_table, with_values
from grokjax.sharding import RULES, Partitioner
from grokjax.testing import WrittenTensor, tensor_pickle, write_release_checkpoint

ROOT = Path(__file__).resolve().parents[1]

# 8 devices divide its heads, expert hidden and vocabulary; they outnumber its kv heads.
SMALL = GrokConfig.tiny().replace(
    model_dim=32, num_heads=8, num_kv_heads=4, head_dim=8, ffn_dim=48, vocab_size=64, max_seq_len=32, num_layers=1
)
DENSE = SMALL.replace(num_experts=1, experts_per_token=1)
# For tests in which experts show nothing: they are most of what is traced and compiled.
TINY_DENSE = GrokConfig.tiny().replace(num_layers=1, num_experts=1, experts_per_token=1)

TENSOR, EXPERT, FULLY = (RULES[name] for name in ("tensor", "expert", "fsdp"))


def label(value: object) -> str:
    """How a parameter is called in a test's name: rules by their own name, all else as it prints."""
    return next((name for name, rules in RULES.items() if rules == value), str(value))


@dataclasses.dataclass(frozen=True, eq=False)
class WrittenCheckpoint:
    """A checkpoint in the release's format.

    Attributes:
      path: the parent of `ckpt-0`.
      config: the sizes.
      tensors: our parameter path -> what its file holds.
    """

    path: Path
    config: GrokConfig
    tensors: dict[str, WrittenTensor]

    def stack(self, name: str) -> np.ndarray:
        """The stored weights of all layers, [L, ...], of a parameter such as `attention.query`."""
        return np.stack([self.tensors[f"layers.{i}.{name}"].weight for i in range(self.config.num_layers)])

    def dequantised_stack(self, name: str) -> np.ndarray:
        """What the stored weights of all layers stand for, float32 [L, ...]."""
        return np.stack([self.tensors[f"layers.{i}.{name}"].dequantised() for i in range(self.config.num_layers)])

    def expected_logits(self, tokens: np.ndarray) -> np.ndarray:
        """The float64 reference's logits [B, T, V] for tokens [B, T]."""
        return np.stack([reference.forward(self._weights, self.config, row).logits for row in tokens])

    @functools.cached_property
    def _weights(self) -> dict[str, np.ndarray]:
        return {name: tensor.dequantised().astype(np.float64) for name, tensor in self.tensors.items()}


def still_held(references: Iterable[weakref.ref]) -> int:
    """How many of the objects are in memory."""
    gc.collect()
    return sum(reference() is not None for reference in references)


def or_thorough(cases: Sequence[tuple[Any, ...]], chosen: Collection[tuple[Any, ...]]) -> list[Any]:
    """All cases as parameters of a test; those that are not chosen run only with `-m thorough`."""
    assert set(chosen) <= set(cases)
    return [pytest.param(*case, marks=() if case in chosen else pytest.mark.thorough) for case in cases]


def write_checkpoint(path: Path, config: GrokConfig = SMALL, **options) -> WrittenCheckpoint:
    """Writes `path/ckpt-0`; the options are those of `write_release_checkpoint`."""
    return WrittenCheckpoint(path, config, write_release_checkpoint(path / "ckpt-0", config, **options))


def random_model(
    config: GrokConfig,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    dtype: DTypeLike = ml_dtypes.bfloat16,
    quantized: bool = True,
    quantized_table: bool = False,
) -> Grok:
    """A model as `init` makes one, with weights that NumPy draws: nothing is compiled for it."""
    partitioner, random = Partitioner.create(config, mesh, rules), np.random.default_rng(seed)
    abstract = abstract_model(config, partitioner, dtype=dtype, quantized=quantized)

    def draw(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if name.endswith("norm.scale"):
            drawn = np.ones(leaf.shape)
        elif leaf.dtype == np.int8:
            drawn = random.integers(-127, 128, leaf.shape)
        elif isinstance(parameters[name].get_value(), QuantizedArray):  # the scales
            drawn = np.full(leaf.shape, parameters[name].get_value().shape[-2] ** -0.5 / 73)
        else:
            drawn = random.standard_normal(leaf.shape) * leaf.shape[-1 if name == "embedding.table" else -2] ** -0.5
        return jax.device_put(drawn.astype(leaf.dtype), leaf.sharding)

    parameters = named_parameters(abstract)
    model = with_values(
        abstract,
        {name: jax.tree.map(functools.partial(draw, name), param.get_value()) for name, param in parameters.items()},
    )
    return with_quantized_table(model) if quantized_table else model


def write_full_release(folder: Path) -> None:
    """All 770 files of the release at their full size: headers and scales are real, weights are holes."""
    shapes = parameter_shapes(GrokConfig.grok_1())
    for file, parameter in parameter_names(GrokConfig.grok_1()).items():
        suffix = ".".join(parameter.split(".")[2:])
        plain = not suffix or suffix.endswith(("scale", "router"))
        blocks = 8 if suffix.endswith(("output", "down")) else 1
        _write_sparse_tensor(folder / file, shapes[parameter], None if plain else blocks)
        if file == "tensor00000_000":
            assert (folder / file).stat().st_blocks < 100, "these tests need a file system that keeps holes as holes"


def _write_sparse_tensor(path: Path, shape: tuple[int, ...], scale_blocks: int | None) -> None:
    """A file of the release's full size whose payloads are holes: zeros that take no space on the disk."""
    dtype = np.float32 if scale_blocks is None else np.int8
    scales = None if scale_blocks is None else np.zeros((*shape[:-2], scale_blocks, shape[-1]), ml_dtypes.bfloat16)
    with path.open("wb") as stream:
        for part in tensor_pickle(np.zeros(shape, dtype), scales):
            if isinstance(part, memoryview):
                stream.seek(part.nbytes, os.SEEK_CUR)
            else:
                stream.write(part)


TWO_LAYERS = SMALL.replace(num_layers=2)


def contents(checkpoint: Path) -> dict[str, bytes]:
    """The files that hold values, by name."""
    weights = checkpoint / "weights"
    return {
        str(file.relative_to(weights)): file.read_bytes()
        for file in sorted(weights.rglob("*"))
        if file.is_file() and "c" in file.relative_to(weights).parts
    }


def program_for(platform: str, function: Callable[..., Any], *arrays: Any) -> str:
    """The lowered program of a function for "cpu", "tpu" or "gpu" (an H100), none of which need be here."""
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=h100)
    is_gpu = platform == "gpu"
    with jax.sharding.use_abstract_mesh(mesh) if is_gpu else contextlib.nullcontext():
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda" if is_gpu else platform,))
    return lowered.as_text()
