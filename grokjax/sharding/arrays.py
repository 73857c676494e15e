"""Arrays with shardings: made as zeros, described without numbers, counted in bytes, brought to the host."""

import math
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from grokjax.context import is_traced, own_context

T = TypeVar("T")


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


@own_context()
def to_host(values: Any) -> Any:
    """A tree of arrays as NumPy arrays: whole, also where a mesh spans processes, all of which call this."""

    def whole(leaf: jax.Array) -> jax.Array:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return jax.device_put(leaf, NamedSharding(cast(NamedSharding, leaf.sharding).mesh, PartitionSpec()))

    return jax.device_get(jax.tree.map(whole, values))


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
