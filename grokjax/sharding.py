"""Where arrays live: the mesh, rules from logical axes to mesh axes, and the one translator to `NamedSharding`."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from grokjax.config import GrokConfig
from grokjax.context import is_traced, own_context, with_auto_axes

Axes = tuple[str | None, ...]
T = TypeVar("T")

MESH_AXES = ("data", "model")


def make_mesh(
    local: tuple[int, int] = (1, 1),
    between_hosts: tuple[int, int] = (1, 1),
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `("data", "model")`, in Auto mode.

    Args:
      local: (data, model) extent over the devices of one host.
      between_hosts: (data, model) extent over hosts; each host is one granule of the mesh.
      devices: devices to use, by default `jax.devices()`; on one host the first `data * model` of them are taken.

    Raises:
      ValueError: There are not as many devices or hosts as the mesh needs, or, where no devices are named, it leaves
        out all those of a process, which would wait for the others without end.

    Source: the release's `runners.py`, `make_mesh`.
    """
    is_chosen = devices is not None
    devices = list(devices if devices is not None else jax.devices())
    per_host, hosts = math.prod(local), math.prod(between_hosts)
    if min(*local, *between_hosts) < 1:
        raise ValueError(f"mesh extents must be 1 or more, not local={local}, between_hosts={between_hosts}.")
    if hosts > 1 and per_host * hosts != len(devices):
        raise ValueError(
            f"a mesh of local={local} x between_hosts={between_hosts} needs {per_host * hosts} devices and there are "
            f"{len(devices)}: over several hosts name extents whose product is all of them."
        )
    if per_host * hosts > len(devices):
        raise ValueError(
            f"a mesh of local={local} x between_hosts={between_hosts} needs {per_host * hosts} devices and there are "
            f"{len(devices)}: choose extents whose product is at most that (on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={per_host * hosts} simulates as many)."
        )
    found = len({device.process_index for device in devices})
    if hosts > 1 and hosts != found:
        raise ValueError(
            f"between_hosts={between_hosts} needs {hosts} hosts and the devices belong to {found}: "
            "name extents over hosts whose product is their number, and put the rest into `local`."
        )
    used = devices[: per_host * hosts]
    left_out = {device.process_index for device in devices} - {device.process_index for device in used}
    if left_out and not is_chosen:
        raise ValueError(
            f"a mesh of local={local} leaves out all devices of process {', '.join(map(str, sorted(left_out)))}: "
            f"name the extent over hosts too, such as between_hosts=({found}, 1), or pass the devices to use."
        )
    if hosts == 1:
        grid = mesh_utils.create_device_mesh(local, used, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(local, between_hosts, devices, process_is_granule=True)
    return Mesh(np.asarray(grid), MESH_AXES, axis_types=(AxisType.Auto,) * 2)


def spread_over_hosts(data: int, model: int) -> Mesh:
    """A mesh over all hosts: the data axis crosses them if their number divides it, else the model axis.

    Raises:
      ValueError: The hosts cannot share it evenly, or there are not as many devices.
    """
    hosts = jax.process_count()
    if data % hosts == 0:
        return make_mesh((data // hosts, model), (hosts, 1))
    if model % hosts == 0:
        return make_mesh((data, model // hosts), (1, hosts))
    raise ValueError(
        f"{hosts} hosts cannot share a mesh of {data} x {model}: make one of the numbers a multiple of {hosts}."
    )


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


# Rules by the names that the command line takes.
RULES = {
    "tensor": ShardingRules.tensor_parallel(),
    "expert": ShardingRules.expert_parallel(),
    "fsdp": ShardingRules.tensor_parallel().replace(embed="data"),
}


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh and its rules: translates logical axes into shardings. Hashable, a static part of the model."""

    mesh: Mesh
    rules: ShardingRules

    @classmethod
    def create(
        cls, config: GrokConfig, mesh: Mesh | AbstractMesh | None = None, rules: ShardingRules | None = None
    ) -> Self:
        """The translator for `config` on `mesh` (by default that of `default_mesh`), with every size checked once.

        The axes of the mesh may be of any type: the model keeps a mesh of the same devices whose axes are all Auto. An
        `AbstractMesh` is enough where only shapes are asked for.

        Raises:
          ValueError: The mesh lacks an axis that a rule names, or an axis does not divide a size of `config`.
        """
        rules = ShardingRules() if rules is None else rules
        mesh = default_mesh(config, rules) if mesh is None else with_auto_axes(mesh)
        partitioner = cls(mesh, rules)
        for problem in partitioner.find_problems(config):
            raise ValueError(problem)
        return partitioner

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
        name = self._mesh_axis(axis)
        return 1 if name is None else self.mesh.shape[name]

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
        return NamedSharding(self._mesh_here(), self.spec(axes, shape))

    def shardings(self, specs: Any) -> Any:
        """`NamedSharding`s for a tree of `PartitionSpec`s."""
        return jax.tree.map(lambda spec: NamedSharding(self._mesh_here(), spec), specs)

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """States the sharding of an activation inside a compiled function."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def shard_map(self, function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Runs `function` on each device's own shards; collectives inside name mesh axes."""
        mesh = self._mesh_here()
        names = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
        )

    def psum(self, x: jax.Array, *axes: str) -> jax.Array:
        """Inside `shard_map`: the sum over the mesh axes that split the logical `axes`."""
        names = {self._mesh_axis(axis) for axis in axes} - {None}
        return jax.lax.psum(x, tuple(sorted(names))) if names else x

    def index(self, axis: str) -> jax.Array | int:
        """Inside `shard_map`: the number of this device's shard, int32 [], along the logical `axis`."""
        name = self._mesh_axis(axis)
        return 0 if name is None else jax.lax.axis_index(name)

    def all_gather(self, x: jax.Array, axis: str, *, dimension: int) -> jax.Array:
        """Inside `shard_map`: the shards along the logical `axis`, joined along `dimension`."""
        name = self._mesh_axis(axis)
        return x if name is None else jax.lax.all_gather(x, name, axis=dimension, tiled=True)

    def check_context(self) -> None:
        """Checks that what a caller of the model compiles can hold the model's own steps.

        Raises:
          ValueError: It is compiled under a mesh of another number of devices, or of another shape and without
            Explicit axes; or inside a `shard_map` over an axis that the model uses, over another mesh, or over one
            with Explicit axes.
        """
        context = jax.sharding.get_abstract_mesh()
        if context.empty or not is_traced():
            return
        used = {getattr(self.rules, axis) for axis in _LOGICAL_AXES}
        manual = [name for name in context.manual_axes if name in used or context.shape_tuple != self.mesh.shape_tuple]
        if manual:
            raise ValueError(
                f"the model lies on a mesh of {dict(self.mesh.shape)} and is called inside a shard_map over {manual} "
                f"of a mesh of {dict(context.shape)}: call it outside, or make it on that mesh, with rules that do not "
                "name those axes."
            )
        if context.manual_axes and context.explicit_axes:
            raise ValueError(
                f"the model is called inside a shard_map of a mesh whose other axes {list(context.explicit_axes)} are "
                "Explicit, where JAX does not compile it: give shard_map, and jax.set_mesh, that mesh with Auto axes."
            )
        # Under Auto axes of another shape JAX finds no name for how what it compiled divides an array.
        is_named = context.shape_tuple == self.mesh.shape_tuple or bool(context.explicit_axes)
        if context.size != self.mesh.size or not is_named:
            raise ValueError(
                f"the model lies on a mesh of {dict(self.mesh.shape)} and is transformed or compiled under "
                f"jax.set_mesh of {dict(context.shape)}: do it under the model's mesh or under none, or make the model "
                "on that mesh."
            )

    def is_foreign(self, value: Any) -> bool:
        """Whether a caller's value is an array that lies on other devices than the model, or on another mesh."""
        if not isinstance(value, jax.Array):
            return False
        mesh = jax.typeof(value).sharding.mesh
        if not mesh.empty and mesh != self._mesh_here().abstract_mesh:
            return True
        if isinstance(value, jax.core.Tracer) or not value.committed:
            return False
        return value.sharding.device_set != _devices(self.mesh)

    def receive(self, x: jax.Array) -> jax.Array:
        """A caller's array, whole on each device of the model."""
        return jax.device_put(x, NamedSharding(self._mesh_here(), PartitionSpec()))

    def hand_over(self, x: jax.Array, axes: Axes) -> jax.Array:
        """An array of the model's as JAX takes it under the caller's mesh; as it is where none of these devices is set.

        JAX mixes no array with those of a mesh with Explicit axes. Under one of another shape it may find no name for
        how the array is divided.
        """
        context = jax.sharding.get_abstract_mesh()
        if context.empty or not (is_traced() or _devices(jax.sharding.get_mesh()) == _devices(self.mesh)):
            return x
        is_alike = context.shape_tuple == self.mesh.shape_tuple
        if context.explicit_axes:
            names = self.spec(axes, x.shape) if is_alike else ()
            explicit = [name if name in context.explicit_axes else None for name in names]
            return jax.sharding.reshard(x, PartitionSpec(*explicit))
        if is_alike:
            return x
        return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))

    def _mesh_here(self) -> Mesh | AbstractMesh:
        """The mesh as code must name it: inside a caller's `shard_map`, with the axes that are Manual there."""
        context = jax.sharding.get_abstract_mesh()
        return context if context.manual_axes else self.mesh

    def _mesh_axis(self, axis: str) -> str | None:
        if axis == "layers":
            return None
        if axis not in _LOGICAL_AXES:
            raise ValueError(f"{axis!r} is not a logical axis; those are {('layers', *_LOGICAL_AXES)}.")
        return getattr(self.rules, axis)

    def _place(self, axis: str | None, size: int) -> str | None:
        name = None if axis is None else self._mesh_axis(axis)
        if name is None or size % self.mesh.shape[name] == 0:
            return name
        if axis == "batch":
            return None
        raise ValueError(_indivisible(f"{axis} of size {size}", name, self.mesh.shape[name]))

    def find_problems(self, config: GrokConfig) -> Iterator[str]:
        """What of the rules, and of the sizes of `config`, does not fit the mesh, in sentences."""
        for axis in _LOGICAL_AXES:
            name = getattr(self.rules, axis)
            if name is not None and name not in self.mesh.shape:
                yield (
                    f"the rule {axis}={name!r} names no axis of the mesh, which has {self.mesh.axis_names}: name one "
                    "of these in the rule, or give a mesh with that axis, such as make_mesh makes."
                )
                return
        if self.rules.heads != self.rules.kv_heads:
            yield (
                f"the rules heads={self.rules.heads!r} and kv_heads={self.rules.kv_heads!r} must name the same mesh "
                "axis: a device needs the kv heads of its query heads."
            )
        yield from self._find_indivisible(config)

    def _find_indivisible(self, config: GrokConfig) -> Iterator[str]:
        sizes = {
            "heads": ("num_heads", config.num_heads),
            "ffn": ("ffn_dim", config.ffn_dim),
            "vocab": ("vocab_size", config.vocab_size),
            "experts": ("num_experts", config.num_experts),
            "embed": ("model_dim", config.model_dim),
        }
        for axis, (field, size) in sizes.items():
            if size % self.shards(axis):
                yield _indivisible(f"{field}={size}", getattr(self.rules, axis), self.shards(axis))
        shards, heads = self.shards("kv_heads"), config.num_kv_heads
        if heads % shards and (shards % heads or heads * config.head_dim % shards):
            yield (
                _indivisible(f"num_kv_heads={heads}", self.rules.kv_heads, shards)
                + " A longer axis works too where it is a multiple of the kv heads."
            )


def default_mesh(config: GrokConfig, rules: ShardingRules | None = None) -> Mesh:
    """The mesh of `init`, `load`, a cache or a command that is given none.

    It has all devices along the model axis, or as many as divide what the rules split there. Over several hosts none is
    left out: what the model axis does not take, the data axis does. If the user has set a default device
    (`jax.default_device`, `jax_default_device`, JAX_DEFAULT_DEVICE), it is that device alone.

    Raises:
      ValueError: The hosts cannot share the devices evenly.
    """
    device = jax.config.values["jax_default_device"]
    if device is not None:
        return make_mesh(devices=[jax.local_devices(backend=device)[0] if isinstance(device, str) else device])
    extents = default_extents(config, rules, jax.device_count(), uses_all=jax.process_count() > 1)
    return spread_over_hosts(*extents)


def default_extents(
    config: GrokConfig, rules: ShardingRules | None, num_devices: int, *, uses_all: bool
) -> tuple[int, int]:
    """The (data, model) extents with the longest model axis that divides what the rules split.

    Args:
      config: the sizes.
      rules: tensor parallel by default.
      num_devices: that there are.
      uses_all: whether the data axis takes what the model axis leaves; else it is 1, and devices may be left out.
    """
    rules = ShardingRules() if rules is None else rules
    lengths = [n for n in range(num_devices, 0, -1) if not uses_all or num_devices % n == 0]
    extents = [(num_devices // n if uses_all else 1, n) for n in lengths]
    for one in extents:
        mesh: Any = AbstractMesh(one, MESH_AXES)
        if not any(Partitioner(mesh, rules).find_problems(config)):
            return one
    return extents[-1]  # whoever makes a mesh of it is told why it does not fit either


def _on_default_device(
    axis_names: tuple[str, ...], axis_types: tuple[AxisType, ...], rules: ShardingRules
) -> Partitioner:
    (device,) = jnp.zeros(()).devices()
    return Partitioner(Mesh(np.full((1,) * len(axis_names), device), axis_names, axis_types=axis_types), rules)


_LOGICAL_AXES = tuple(field.name for field in dataclasses.fields(ShardingRules))


def _devices(mesh: Mesh) -> set[jax.Device]:
    return NamedSharding(mesh, PartitionSpec()).device_set


def check_has_devices(mesh: Mesh | AbstractMesh) -> None:
    """Checks that arrays can be made on a mesh; where only their shapes are asked for, any mesh will do.

    Raises:
      ValueError: It is an `AbstractMesh`.
    """
    if isinstance(mesh, AbstractMesh) and not is_traced():
        raise ValueError(
            f"no array can lie on {mesh}, which has no devices: give a Mesh of devices, such as make_mesh makes, or "
            "ask for shapes only, by jax.eval_shape or KVCache.abstract."
        )


def with_shardings(arrays: Any, shardings: Any) -> Any:
    """A tree of arrays, maybe abstract ones, as `jax.ShapeDtypeStruct`s with the `shardings` of a tree like it."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arrays, shardings
    )


@own_context()
def zeros(shapes: T) -> T:
    """Arrays of zeros for a tree of `jax.ShapeDtypeStruct`s with shardings, each shard made on its own device.

    Raises:
      ValueError: A sharding is on an `AbstractMesh`.
    """

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        check_has_devices(leaf.sharding.mesh)
        is_abstract = isinstance(leaf.sharding.mesh, AbstractMesh)  # inside a caller's `shard_map`
        return jnp.zeros(leaf.shape, leaf.dtype, device=None if is_abstract else leaf.sharding)

    made: T = jax.tree.map(make, shapes)
    return made


def device_bytes(leaves: Iterable[jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Bytes of some arrays, maybe abstract ones, on each device.

    Raises:
      ValueError: An array has no sharding.
    """
    total = 0
    for leaf in leaves:
        if leaf.sharding is None:
            raise ValueError(f"an array of shape {leaf.shape} has no sharding: give it one to know its size.")
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def _indivisible(what: str, mesh_axis: str | None, extent: int) -> str:
    return (
        f"the mesh axis {mesh_axis!r} of {extent} devices does not divide {what}: choose a mesh whose {mesh_axis!r} "
        "extent divides it, or a sharding rule that leaves it whole."
    )
