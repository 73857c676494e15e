"""How arrays print, and what holds them: dtype, shape, the mesh axes that split them and bytes, never their numbers."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from humanize import naturalsize

from grokjax.sharding import device_bytes


def describe(value: Any) -> str:
    """An array as JAX writes its type, with the mesh axes that split it: `int8[2,64,128@model]`. All else by `repr`."""
    if not isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return repr(value)
    sharding = getattr(value, "sharding", None)  # tracers have none
    spec = getattr(sharding, "spec", None) or ()
    sizes = itertools.zip_longest(value.shape, spec)
    return f"{value.dtype.name}[{','.join(f'{size}{_split(names, sharding)}' for size, names in sizes)}]"


def _split(names: Any, sharding: Any) -> str:
    """How a dimension is split: `@model`, `@(data,model)`, or nothing where no axis of more than one device does."""
    named = [names] if isinstance(names, str) else names if isinstance(names, tuple) else []
    several = [name for name in named if sharding.mesh.shape[name] > 1]
    return "" if not several else f"@{several[0]}" if len(several) == 1 else f"@({','.join(several)})"


def describe_bytes(tree: Any) -> str:
    """The bytes of all arrays of a tree: `16.5 KiB`."""
    return describe_size(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _arrays(tree)))


def describe_devices(tree: Any) -> str:
    """The bytes of all arrays of a tree, and those on each device: `8.0 KiB, 1.0 KiB on each of 8 devices`."""
    leaves = [leaf for leaf in _arrays(tree) if getattr(leaf, "sharding", None) is not None]
    devices = max((leaf.sharding.num_devices for leaf in leaves), default=1)
    share = f", {describe_size(device_bytes(leaves))} on each of {devices} devices" if devices > 1 else ""
    return describe_bytes(tree) + share


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]


def describe_size(num_bytes: float) -> str:
    """A number of bytes in words: `16.5 KiB`."""
    return naturalsize(num_bytes, binary=True)


def describe_fields(value: Any) -> str:
    """The `repr` of a dataclass of arrays: each by `describe`, but for defaults, then the bytes of all."""
    held = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    fields = (f"{field.name}={describe(array)}" for field, array in held if array is not field.default)
    return f"{type(value).__name__}({', '.join(fields)}, {describe_bytes(value)})"


def on_lines(name: str, comment: str, attributes: Mapping[str, str]) -> str:
    """A `repr` of several lines, as Flax writes those of modules."""
    return "\n".join([f"{name}( # {comment}", *(f"  {key}={text}," for key, text in attributes.items()), ")"])


def display(value: Any, path: str | None, subtree_renderer: Any) -> Any:
    """A `__treescope_repr__` that shows the lines of `repr`, where `nnx.display` would show numbers."""
    from treescope import rendering_parts  # whoever displays nothing need not wait for it

    return rendering_parts.on_separate_lines([rendering_parts.text(line) for line in repr(value).splitlines()])
