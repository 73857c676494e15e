"""What makes a model's functions do the same in every context of JAX: whatever mesh the caller has set, or works on."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.cache import KVCache
from grokjax.context import own_context
from grokjax.kernels import varying_over
from grokjax.sharding import Axes, Partitioner, check_caller, hand_over, is_foreign, receive

P = ParamSpec("P")
R = TypeVar("R")


def in_any_context(function: Callable[P, R]) -> Callable[P, R]:
    """A function or method whose first argument is a model, or a part of one, made to run as if no mesh were set.

    Its arrays may lie anywhere; only a cache must lie where the model does. Under a caller's mesh the results are
    arrays that JAX takes there, but for a cache, which stays on the model's mesh.
    """
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        model, *others = args or [kwargs.pop(first)]
        if not hasattr(model, "partitioner"):
            raise ValueError(f"the model must be one that init or load makes, not a {type(model).__name__}.")
        partitioner: Partitioner = model.partitioner
        check_caller(partitioner)
        axes = _varying_axes((model, others, kwargs))
        if axes:
            model, others, kwargs = jax.tree.map(functools.partial(_as_one, axes=axes), (model, others, kwargs))
        with own_context():
            received: Any = _map(_receive, (others, kwargs), partitioner)
            results = function(model, *received[0], **received[1])
        if axes:
            results = jax.tree.map(functools.partial(varying_over, axes=axes), results)
        if jax.sharding.get_abstract_mesh().empty:
            return results
        return _map(functools.partial(_hand_over, vocab_size=model.config.vocab_size), results, partitioner)

    return cast(Callable[P, R], wrapped)


def _varying_axes(tree: Any) -> frozenset[str]:
    """The axes of a caller's `shard_map` over which some arrays vary, where it has JAX keep count of that."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return frozenset()
    return frozenset().union(*(_axes_of(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)))


def _axes_of(value: jax.Array) -> frozenset[str]:
    varying: frozenset[str] = jax.typeof(value).manual_axis_type.varying
    return varying


def _as_one(value: Any, *, axes: frozenset[str]) -> Any:
    """An array that a model takes for the same on all devices of a caller's axes, over which it exchanges nothing.

    Derivatives with respect to what is the same there, such as weights, are summed, as JAX does.
    """
    if not isinstance(value, jax.Array):
        return value
    missing = axes - _axes_of(value)
    if missing and jnp.issubdtype(value.dtype, jnp.floating):
        value = lax.pcast(value, tuple(sorted(missing)), to="varying")
    return varying_over(value, frozenset()) if _axes_of(value) else value


def _map(function: Callable[[Any, Partitioner], Any], tree: R, partitioner: Partitioner) -> R:
    """The tree with the function's results for its leaves, of which a cache is one."""
    mapped: R = jax.tree.map(
        lambda leaf: function(leaf, partitioner), tree, is_leaf=lambda leaf: isinstance(leaf, KVCache)
    )
    return mapped


def _receive(value: Any, partitioner: Partitioner) -> Any:
    if not isinstance(value, KVCache):
        return receive(value, partitioner)
    value.check_is_there()
    if any(is_foreign(leaf, partitioner) for leaf in jax.tree.leaves(value)):
        raise ValueError(
            f"the cache lies elsewhere than the model, which is on a mesh of {dict(partitioner.mesh.shape)}: create it "
            "with the model's configuration, mesh and rules, as new_cache of the model does."
        )
    return value


def _hand_over(value: Any, partitioner: Partitioner, *, vocab_size: int) -> Any:
    if isinstance(value, KVCache):
        return value
    last = "vocab" if value.ndim > 1 and value.shape[-1] == vocab_size else None
    axes: Axes = (
        ("batch", *(None,) * value.ndim)[: value.ndim] if last is None else ("batch", *(None,) * (value.ndim - 2), last)
    )
    return hand_over(value, axes, partitioner)
