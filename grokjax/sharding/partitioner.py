"""The one translator from logical axes to `NamedSharding`, and what runs on each device's own shards."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from grokjax.config import GrokConfig, check_config
from grokjax.context import with_auto_axes
from grokjax.sharding.meshes import default_mesh
from grokjax.sharding.rules import ShardingRules, indivisible, shards_of

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh and its rules: translates logical axes into shardings. Hashable, a static part of the model.

    Attributes:
      mesh: whose axes are all Auto.
      rules: which of its axes splits what.
      is_backwards: whether it is for derivatives, see `backwards`.
    """

    mesh: Mesh
    rules: ShardingRules
    is_backwards: bool = False

    @classmethod
    def create(
        cls, config: GrokConfig, mesh: Mesh | AbstractMesh | None = None, rules: ShardingRules | None = None
    ) -> Self:
        """The translator for `config` on `mesh` (by default that of `default_mesh`), with every size checked once.

        The axes of the mesh may be of any type: the model keeps a mesh of the same devices whose axes are all Auto. An
        `AbstractMesh` is enough where only shapes are asked for.

        Raises:
          ValueError: `config` is no configuration, the mesh lacks an axis that a rule names, or an axis does not divide
            a size of `config`.
        """
        check_config(config)
        rules = ShardingRules() if rules is None else rules
        mesh = default_mesh(config, rules) if mesh is None else with_auto_axes(mesh)
        for problem in rules.find_problems(config, mesh):
            raise ValueError(problem)
        return cls(mesh, rules)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its device: it is unpickled for the default one, where arrays come back too.

        Raises:
          ValueError: The mesh has several devices.
        """
        mesh = self.mesh
        if mesh.size > 1:
            raise ValueError(
                f"a model on {mesh.size} devices is not pickled: write it with grokjax.save, and load that on any mesh."
            )
        return _on_default_device, (mesh.axis_names, mesh.axis_types, self.rules)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a copy of a model stays on its devices

    def without_embed(self) -> "Partitioner":
        """This translator with D of the weights whole, as they are used: gathered where the rule `embed` shards it."""
        return dataclasses.replace(self, rules=self.rules.replace(embed=None))

    def backwards(self) -> "Partitioner":
        """This translator for what is run to be differentiated: the same numbers, and nothing summed over one device.

        JAX sums a derivative over each mesh axis that the spec of a `shard_map` does not name. Where the axis has one
        device there is nothing to add, and XLA's CPU backend copies all of it, as float32 numbers. So the specs name
        such axes, which splits nothing.
        """
        return dataclasses.replace(self, is_backwards=True)

    @property
    def platform(self) -> str:
        """The platform of the mesh's devices: "cpu", "gpu" or "tpu".

        Raises:
          ValueError: The mesh is an `AbstractMesh` that does not say for which devices.
        """
        mesh: Mesh | AbstractMesh = self.mesh
        if isinstance(mesh, Mesh):
            return mesh.devices.flat[0].platform
        if mesh.abstract_device is None:
            raise ValueError(
                f"{mesh} does not say for which devices, which decides how things are computed and the default "
                "dtype of a cache: name that dtype, give AbstractMesh an abstract_device, or give a Mesh of devices."
            )
        return str(mesh.abstract_device.platform)

    def shards(self, axis: str) -> int:
        """How many shards the logical `axis` is cut into."""
        return shards_of(self.rules.axis_of(axis), self.mesh)

    def kv_copies(self, config: GrokConfig) -> int:
        """How many neighbouring devices hold each kv head: 1 unless the mesh axis is longer than K."""
        return max(1, self.shards("kv_heads") // config.num_kv_heads)

    def spec(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """The `PartitionSpec` of an array of `shape` whose dimensions have the logical `axes`.

        Raises:
          ValueError: An axis is unknown, two dimensions land on one mesh axis, or a size is not divisible.
        """
        if len(axes) != len(shape):
            raise ValueError(
                f"the shape {shape} has {len(shape)} dimensions and its logical axes {axes} name {len(axes)}."
            )
        names = [self._place(axis, size) for axis, size in zip(axes, shape, strict=True)]
        used = [name for name in names if name is not None]
        if len(used) != len(set(used)):
            raise ValueError(
                f"the logical axes {axes} put two dimensions on one mesh axis ({names}): change a rule of {self.rules}."
            )
        return PartitionSpec(*names)

    def sharding(self, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """The `NamedSharding` of an array of `shape` with the logical `axes`."""
        return NamedSharding(self.mesh_here(), self.spec(axes, shape))

    def shardings(self, specs: Any) -> Any:
        """`NamedSharding`s for a tree of `PartitionSpec`s."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh_here(), spec), specs)

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """An activation whose sharding is stated, inside a compiled function.

        Args:
          x: an array of any shape and dtype.
          axes: the logical axis of each of its axes, None where it is not split.

        Raises:
          ValueError: As `spec` says.
        """
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def shard_map(self, function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Runs a function on each device's own shards; collectives inside name mesh axes.

        One device has all of it, so there the function is called as it is: less to trace, and to compile.

        Args:
          function: of shards, which gives shards.
          in_specs: a `PartitionSpec` for each argument, or a tree of them.
          out_specs: the same for the result.
        """
        if self.mesh.size == 1:
            return function
        mesh = self.mesh_here()
        names = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
        if self.is_backwards:
            lone = tuple(name for name in mesh.axis_names if name in names and mesh.shape[name] == 1)
            in_specs = jax.tree.map(functools.partial(_naming, names=lone), in_specs)
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
        )

    def psum(self, x: jax.Array, *axes: str) -> jax.Array:
        """Inside `shard_map`: the sum of shards, of any shape, over the mesh axes that split the logical `axes`."""
        names = {self._split_axis(axis) for axis in axes} - {None}
        return jax.lax.psum(x, tuple(sorted(names))) if names else x

    def index(self, axis: str) -> jax.Array | int:
        """Inside `shard_map`: the number of this device's shard, int32 [], along the logical `axis`."""
        name = self._split_axis(axis)
        return 0 if name is None else jax.lax.axis_index(name)

    def all_gather(self, x: jax.Array, axis: str, *, dimension: int) -> jax.Array:
        """Inside `shard_map`: the shards along the logical `axis`, joined along `dimension`."""
        name = self._split_axis(axis)
        return x if name is None else jax.lax.all_gather(x, name, axis=dimension, tiled=True)

    def mesh_here(self) -> Mesh | AbstractMesh:
        """The mesh as code must name it: inside a caller's `shard_map`, with the axes that are Manual there."""
        context = jax.sharding.get_abstract_mesh()
        return context if context.manual_axes else self.mesh

    def _split_axis(self, axis: str) -> str | None:
        """The mesh axis over which the shards of the logical `axis` lie; None if one device has all of it."""
        name = self.rules.axis_of(axis)
        return None if name is None or self.mesh.shape[name] == 1 else name

    def _place(self, axis: str | None, size: int) -> str | None:
        name = None if axis is None else self.rules.axis_of(axis)
        if name is None or size % self.mesh.shape[name] == 0:
            return name
        if axis == "batch":
            return None
        raise ValueError(indivisible(f"{axis} of size {size}", name, self.mesh))


def _naming(spec: PartitionSpec, *, names: tuple[str, ...]) -> PartitionSpec:
    """The spec, whose first dimension is split over these mesh axes too, unless another is; a scalar's names none."""
    if not spec:
        return spec
    first, *rest = (() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    used = first + sum(rest, ())
    return PartitionSpec(first + tuple(name for name in names if name not in used), *rest)


def _on_default_device(
    axis_names: tuple[str, ...], axis_types: tuple[AxisType, ...], rules: ShardingRules
) -> Partitioner:
    (device,) = jnp.zeros(()).devices()
    return Partitioner(Mesh(np.full((1,) * len(axis_names), device), axis_names, axis_types=axis_types), rules)
