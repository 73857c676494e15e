"""JAX's contexts: code of this package does the same under any mesh and transfer guard that its caller has set."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

P = ParamSpec("P")
R = TypeVar("R")


def is_traced() -> bool:
    """Whether this runs inside `jax.jit` or another of JAX's transformations, where no mesh may be set."""
    try:
        jax.sharding.get_mesh()
    except ValueError:
        return True
    return False


@contextlib.contextmanager
def own_context() -> Iterator[None]:
    """Around code of this package, which sees no mesh that a caller has set, and so does the same under any.

    Inside a caller's `shard_map` the axes that are Manual there stay so, and the others are Auto. What it moves between
    host and devices it means to, whatever a caller's transfer guard forbids. It decorates too.
    """
    context = jax.sharding.get_abstract_mesh()
    if not is_traced():
        with jax.set_mesh(None), jax.transfer_guard("allow"):
            yield
        return
    if context.empty:  # else what JAX has traced already would be traced, and written into the program, again
        yield
        return
    if context.manual_axes:
        kinds = tuple(kind if kind == AxisType.Manual else AxisType.Auto for kind in context.axis_types)
        own = context.update(axis_types=kinds)
    else:
        own = AbstractMesh((), (), abstract_device=context.abstract_device)
    with jax.sharding.use_abstract_mesh(own), jax.transfer_guard("allow"):
        yield


def in_own_context(function: Callable[P, R]) -> Callable[P, R]:
    """A function of arrays, made to run as if its caller had set no mesh; arrays on Explicit axes move to Auto ones.

    The results stay on Auto axes.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with own_context():
            received: Any = jax.tree.map(_on_auto_axes, (args, kwargs))
            return function(*received[0], **received[1])

    return wrapped


def _on_auto_axes(value: Any) -> Any:
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return value
    sharding = value.sharding
    if not isinstance(sharding, NamedSharding) or not sharding.mesh.explicit_axes:
        return value
    return jax.device_put(value, NamedSharding(with_auto_axes(sharding.mesh), sharding.spec))


def with_auto_axes(mesh: Mesh | AbstractMesh) -> Mesh:
    """The same mesh with Auto axes only; an abstract one is taken for a mesh by whoever asks for shapes alone."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(
            f"mesh={mesh!r} is a {type(mesh).__name__} and must be a jax.sharding.Mesh: make one with make_mesh."
        )
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
