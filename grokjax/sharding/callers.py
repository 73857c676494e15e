"""Between a model's mesh and that of its caller, who may have set another one, or works on one inside a `shard_map`."""

from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grokjax.context import is_traced
from grokjax.sharding.partitioner import Axes, Partitioner
from grokjax.sharding.rules import LOGICAL_AXES

T = TypeVar("T")


def check_caller(partitioner: Partitioner) -> None:
    """Checks that what a caller of the model compiles can hold the model's own steps.

    Raises:
      ValueError: It is compiled under a mesh of another number of devices, or of another shape and without Explicit
        axes; or inside a `shard_map` over an axis that the model uses, over another mesh, or over one with Explicit
        axes.
    """
    context = jax.sharding.get_abstract_mesh()
    if context.empty or not is_traced():
        return
    mesh, rules = partitioner.mesh, partitioner.rules
    used = {rules.axis_of(axis) for axis in LOGICAL_AXES}
    manual = [name for name in context.manual_axes if name in used or context.shape_tuple != mesh.shape_tuple]
    if manual:
        raise ValueError(
            f"the model lies on a mesh of {dict(mesh.shape)} and is called inside a shard_map over {manual} of a mesh "
            f"of {dict(context.shape)}: call it outside, or make it on that mesh, with rules that do not name those "
            "axes."
        )
    if context.manual_axes and context.explicit_axes:
        raise ValueError(
            f"the model is called inside a shard_map of a mesh whose other axes {list(context.explicit_axes)} are "
            "Explicit, where JAX does not compile it: give shard_map, and jax.set_mesh, that mesh with Auto axes."
        )
    # Under Auto axes of another shape JAX finds no name for how what it compiled divides an array.
    is_named = context.shape_tuple == mesh.shape_tuple or bool(context.explicit_axes)
    if context.size != mesh.size or not is_named:
        raise ValueError(
            f"the model lies on a mesh of {dict(mesh.shape)} and is transformed or compiled under jax.set_mesh of "
            f"{dict(context.shape)}: do it under the model's mesh or under none, or make the model on that mesh."
        )


def is_foreign(value: Any, partitioner: Partitioner) -> bool:
    """Whether a caller's value is an array that lies on other devices than the model, or on another mesh."""
    if not isinstance(value, jax.Array):
        return False
    mesh = jax.typeof(value).sharding.mesh
    if not mesh.empty and mesh != partitioner.mesh_here().abstract_mesh:
        return True
    if isinstance(value, jax.core.Tracer) or not value.committed:
        return False
    return value.sharding.device_set != _devices(partitioner.mesh)


def receive(value: T, partitioner: Partitioner) -> T:
    """A caller's value; an array that lies elsewhere is then whole on each device of the model."""
    if not is_foreign(value, partitioner):
        return value
    received: T = jax.device_put(value, NamedSharding(partitioner.mesh_here(), PartitionSpec()))
    return received


def hand_over(x: jax.Array, axes: Axes, partitioner: Partitioner) -> jax.Array:
    """An array of the model's as JAX takes it under the caller's mesh; as it is where none of these devices is set.

    JAX mixes no array with those of a mesh with Explicit axes. Under one of another shape it may find no name for how
    the array is divided.
    """
    context, mesh = jax.sharding.get_abstract_mesh(), partitioner.mesh
    if context.empty or not (is_traced() or _devices(jax.sharding.get_mesh()) == _devices(mesh)):
        return x
    is_alike = context.shape_tuple == mesh.shape_tuple
    if context.explicit_axes:
        names = partitioner.spec(axes, x.shape) if is_alike else ()
        explicit = [name if name in context.explicit_axes else None for name in names]
        return jax.sharding.reshard(x, PartitionSpec(*explicit))
    if is_alike:
        return x
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))


def _devices(mesh: Mesh) -> set[jax.Device]:
    return NamedSharding(mesh, PartitionSpec()).device_set
