"""Tells what a checkpoint holds, and what its parameters take on each device, without loading it."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.stacks import bytes_of_stacks, stacks_of
from grokjax.checkpoint.stored import Checkpoint, TensorSpec, specs_of
from grokjax.config import GrokConfig
from grokjax.model import abstract_model
from grokjax.sharding import MESH_AXES, Partitioner, ShardingRules


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, told without loading it.

    Attributes:
      path: its folder.
      layout: `release`, `safetensors` or `orbax`.
      config: the sizes.
      specs: the checkpoint's path -> shapes and dtypes.
    """

    path: Path
    layout: str
    config: GrokConfig
    specs: dict[str, TensorSpec] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """What an opened checkpoint holds."""
        return cls(checkpoint.path, checkpoint.layout, checkpoint.config, specs_of(checkpoint))

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(spec.num_bytes for spec in self.specs.values())

    @property
    def num_parameters(self) -> int:
        """Weights, scales not counted."""
        return sum(math.prod(spec.weight.shape) for spec in self.specs.values())

    def bytes_per_device(
        self,
        mesh: tuple[int, int] = (1, 1),
        *,
        rules: ShardingRules | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        quantized: bool | Sequence[str] = True,
    ) -> int:
        """Bytes of the parameters on each device after `load` onto a mesh of (data, model) devices; none are needed.

        Args:
          mesh: how many devices lie along data and along model.
          rules: as for `load`, and so are those that follow.
          dtype: of the plain weights.
          quantized: which int8 weights stay so.

        Raises:
          ValueError: The mesh or the rules do not fit the configuration, the dtype is not a compute dtype, or
            `quantized` is none of what `load` takes.
        """
        partitioner = Partitioner.create(self.config, AbstractMesh(mesh, MESH_AXES), rules)
        model = abstract_model(self.config, partitioner, dtype=dtype, quantized=False)
        stacks = stacks_of(model, {name: name for name in self.specs}, quantized)
        return bytes_of_stacks(stacks, self.specs, partitioner)


def describe(path: str | Path, config: GrokConfig | None = None) -> CheckpointInfo:
    """Reads names, shapes and dtypes of a checkpoint of any layout; no array is read.

    Args:
      path: as for `load`.
      config: as for `load`.

    Raises:
      CheckpointError: There is no checkpoint, or it is damaged.
      ValueError: `config` is no configuration.
    """
    return CheckpointInfo.of(open_checkpoint(path, config))
