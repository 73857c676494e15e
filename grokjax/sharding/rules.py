"""Which mesh axis splits which logical axis, and whether that fits a mesh and the sizes of a model."""

import dataclasses
from collections.abc import Iterator
from typing import Self

from jax.sharding import AbstractMesh, Mesh

from grokjax.config import GrokConfig


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis splits each logical axis; None keeps it whole on every device.

    Attributes:
      batch: rows. Rows that the mesh axis does not divide are computed on every device of that axis.
      embed: D of the weights only; `"data"` shards the parameters fully, gathered layer by layer at use.
      heads: N; the projections are split between heads, never inside one.
      kv_heads: K; must name the same mesh axis as `heads`. Where that axis is longer than K, each head of the cache
        lives on a group of `axis / K` neighbouring devices, while the key and value weights are still split evenly.
      experts: E; `"model"` is expert parallelism.
      ffn: F; `"model"` is tensor parallelism inside every expert.
      vocab: V.
    """

    batch: str | None = "data"
    embed: str | None = None
    heads: str | None = "model"
    kv_heads: str | None = "model"
    experts: str | None = None
    ffn: str | None = "model"
    vocab: str | None = "model"

    @classmethod
    def tensor_parallel(cls) -> Self:
        """The default rules: heads, expert hidden and vocabulary over `model`, rows over `data`."""
        return cls()

    @classmethod
    def expert_parallel(cls) -> Self:
        """The rules of `tensor_parallel`, but with whole experts spread over `model`."""
        return cls(experts="model", ffn=None)

    def replace(self, **changes: str | None) -> Self:
        """A copy with some rules changed; `replace(embed="data")` shards the parameters fully."""
        return dataclasses.replace(self, **changes)

    def axis_of(self, axis: str) -> str | None:
        """The mesh axis that splits a logical axis; None if none does, as of `layers`.

        Raises:
          ValueError: There is no such logical axis.
        """
        if axis == "layers":
            return None
        if axis not in LOGICAL_AXES:
            raise ValueError(f"{axis!r} is not a logical axis; those are {('layers', *LOGICAL_AXES)}.")
        name: str | None = getattr(self, axis)
        return name

    def find_problems(self, config: GrokConfig, mesh: Mesh | AbstractMesh) -> Iterator[str]:
        """What of these rules, and of the sizes of `config`, does not fit a mesh, in sentences."""
        for axis in LOGICAL_AXES:
            name = self.axis_of(axis)
            if name is not None and name not in mesh.shape:
                yield (
                    f"the rule {axis}={name!r} names no axis of the mesh, which has {mesh.axis_names}: name one "
                    "of these in the rule, or give a mesh with that axis, such as make_mesh makes."
                )
                return
        if self.heads != self.kv_heads:
            yield (
                f"the rules heads={self.heads!r} and kv_heads={self.kv_heads!r} must name the same mesh "
                "axis: a device needs the kv heads of its query heads."
            )
        sizes = {
            "heads": ("num_heads", config.num_heads),
            "ffn": ("ffn_dim", config.ffn_dim),
            "vocab": ("vocab_size", config.vocab_size),
            "experts": ("num_experts", config.num_experts),
            "embed": ("model_dim", config.model_dim),
        }
        for axis, (field, size) in sizes.items():
            if size % shards_of(self.axis_of(axis), mesh):
                yield indivisible(f"{field}={size}", self.axis_of(axis), mesh)
        shards, heads = shards_of(self.kv_heads, mesh), config.num_kv_heads
        if heads % shards and (shards % heads or heads * config.head_dim % shards):
            yield (
                indivisible(f"num_kv_heads={heads}", self.kv_heads, mesh)
                + " A longer axis works too where it is a multiple of the kv heads."
            )


LOGICAL_AXES = tuple(field.name for field in dataclasses.fields(ShardingRules))

# Rules by the names that the command line takes.
RULES = {
    "tensor": ShardingRules.tensor_parallel(),
    "expert": ShardingRules.expert_parallel(),
    "fsdp": ShardingRules.tensor_parallel().replace(embed="data"),
}


def shards_of(mesh_axis: str | None, mesh: Mesh | AbstractMesh) -> int:
    """How many parts a mesh axis makes: 1 where there is none."""
    return 1 if mesh_axis is None else mesh.shape[mesh_axis]


def indivisible(what: str, mesh_axis: str | None, mesh: Mesh | AbstractMesh) -> str:
    """Says that a mesh axis does not divide something."""
    return (
        f"the mesh axis {mesh_axis!r} of {shards_of(mesh_axis, mesh)} devices does not divide {what}: choose a mesh "
        f"whose {mesh_axis!r} extent divides it, or a sharding rule that leaves it whole."
    )
