"""Reads and changes the values that a model computes on its way, at the sites where it calls `Probe.at`.

A probe with nothing to read or change gives back what it is given, and leaves no trace in a compiled program.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from grokjax.kernels import CachePlace

# Site -> its axes, in the letters of docs/architecture.md.
SITES: Mapping[str, str] = {
    "embedding": "PTD",
    "stream.in": "PTD",
    "attention.query": "PTNH",
    "attention.key": "PTKH",
    "attention.value": "PTKH",
    "attention.heads": "PTNH",
    "attention.out": "PTD",
    "stream.mid": "PTD",
    "router.logits": "PTE",
    "router.experts": "PTX",
    "router.probabilities": "PTX",
    "feed_forward.out": "PTD",
    "stream.out": "PTD",
    "final": "PTD",
}
OUTSIDE_LAYERS = frozenset({"embedding", "final"})


def axes_of(site: str) -> str:
    """The axes of a site, such as "PTD".

    Raises:
      ValueError: There is no such site.
    """
    if not isinstance(site, str) or site not in SITES:
        raise ValueError(
            f"{site!r} is no site: name one of {', '.join(SITES)}. Layers are named apart, as in layers=[3]."
        )
    return SITES[site]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class At:
    """Where in a model, and in its texts, a value [P, T, ...] stands.

    Attributes:
      layer: int32 [], the number of the layer; None outside the layers.
      positions: int32 [P, T], of the tokens in their texts, whatever part of these a call is given.
      valid: bool [P, T], which tokens are real ones; the others are padding.
      router_logits: float32 [P, T, E], from which the experts were chosen; at `router.probabilities` only.
      experts: int32 [P, T, X], those that were chosen; at `router.probabilities` only.
    """

    layer: jax.Array | None = None
    positions: jax.Array
    valid: jax.Array
    router_logits: jax.Array | None = None
    experts: jax.Array | None = None

    @classmethod
    def of(cls, place: CachePlace, num_new: int) -> "At":
        """Where the new tokens of a call stand, before any layer; T is `num_new`."""
        steps = jnp.arange(num_new, dtype=jnp.int32)[None]
        return cls(positions=place.start[:, None] + steps, valid=steps < place.count[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """A change of the values at one site, in some layers. `grokjax.research.edit` puts it into a model.

    Attributes:
      site: one of `SITES`.
      fn: (the site's value x, its floats in float32; `value`; where it stands) -> what stands for x from here on, of
        the same shape; it is cast back to the site's dtype. Pure; one of a module, not made anew, compiles once.
      layers: int32 [n], the numbers of the layers; None for all of them, and for a site outside them.
      value: a tree of arrays. Others of the same shapes, and other layers, compile nothing.
      by_layer: whether the value has a leading axis [n], of which `fn` is given what belongs to its layer.
      check: (`layers`, `value`, configuration) -> what is wrong with them, in a sentence, or None.
    """

    site: str = dataclasses.field(metadata={"static": True})
    fn: Callable[[jax.Array, Any, At], jax.Array] = dataclasses.field(metadata={"static": True})
    layers: Any = None
    value: Any = None
    by_layer: bool = dataclasses.field(default=False, metadata={"static": True})
    check: Callable[..., str | None] | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        axes_of(self.site)

    def __repr__(self) -> str:
        is_known = self.layers is not None and not isinstance(self.layers, jax.core.Tracer)
        where = f" in layers {_listed(self.layers)}" if is_known else ""
        return f"{self.fn.__name__.lstrip('_')} at {self.site}{where}"

    def apply(self, x: jax.Array, at: At) -> jax.Array:
        """The changed value, of the shape and dtype of x; x itself in other layers.

        Args:
          x: the value [P, T, ...] of the edit's site.
          at: where it stands.

        Raises:
          ValueError: The function gives another shape, or its value does not fit the shape of x.
        """
        if self.layers is None:
            return self._changed(x, self.value, at)
        is_here = self.layers == at.layer
        own = self.value
        if self.by_layer:
            number = jnp.argmax(is_here)
            own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False), own)
        return jnp.where(is_here.any(), self._changed(x, own, at), x)

    def _changed(self, x: jax.Array, value: Any, at: At) -> jax.Array:
        wide = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        try:
            changed = self.fn(wide, value, at)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the edit {self!r} does not fit x of shape {x.shape} ({', '.join(SITES[self.site])}): {error}"
            ) from error
        if changed.shape != x.shape:
            raise ValueError(
                f"the edit {self!r} makes {changed.shape} of x of shape {x.shape}: its function must keep the shape."
            )
        return changed.astype(x.dtype)


class Edits(nnx.Variable[tuple[Edit, ...]]):
    """The edits of a model, in the order in which they were given: no parameters, but arrays that go where it goes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reader:
    """What is read at one site, and how.

    Attributes:
      site: one of `SITES`.
      layers: int32 [n], the layers in which it reads; None outside the layers.
      positions: int32 [P, k], the positions in the texts that it reads; None for all that a call is given.
      is_last: whether it reads the last real token of each row only.
      via: (value, where it stands) -> the tree of arrays that is kept; a pytree, and pure.
      fold: (what was kept, what the next layer gives) -> what is kept, for one result of all layers.
    """

    site: str = dataclasses.field(metadata={"static": True})
    layers: jax.Array | None
    positions: jax.Array | None
    is_last: bool = dataclasses.field(metadata={"static": True})
    via: Callable[[jax.Array, At], Any]
    fold: Callable[[jax.Array, jax.Array], jax.Array] | None = dataclasses.field(metadata={"static": True})

    def read(self, x: jax.Array, at: At, held: Any) -> Any:
        """What is kept after this layer.

        Args:
          x: the site's value.
          at: where it stands.
          held: what is kept so far: [n, ...], or without that axis if it is folded; None where there is nothing to put
            it into, which gives what is read here.
        """

        def find() -> Any:
            return self.via(*self._selected(x, at))

        if held is None:
            return find()
        assert self.layers is not None
        assert at.layer is not None
        is_here = jnp.equal(self.layers, at.layer)
        if (join := self.fold) is not None:
            is_first = at.layer == self.layers.min()

            def fold(old: jax.Array, new: jax.Array) -> jax.Array:
                return jnp.where(is_first, new, join(old, new))

            return lax.cond(is_here.any(), lambda: jax.tree.map(fold, held, find()), lambda: held)
        number = jnp.argmax(is_here)
        old = jax.tree.map(lambda whole: lax.dynamic_index_in_dim(whole, number, keepdims=False), held)
        new = lax.cond(is_here.any(), find, lambda: old)
        return jax.tree.map(lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, number, 0), held, new)

    def empty(self, found: Any) -> Any:
        """Zeros for what the layers give, if each gives arrays such as those `found`, which may be abstract."""
        lead = () if self.fold is not None or self.layers is None else self.layers.shape
        return jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), found)

    def _selected(self, x: jax.Array, at: At) -> tuple[jax.Array, At]:
        """The positions that are wanted of a value [P, T, ...] and of where it stands; zeros where there are none."""
        if self.is_last:
            wanted = jnp.maximum(at.valid.sum(axis=1, dtype=jnp.int32) - 1, 0)[:, None]
            x, at = _take(x, at, wanted, jnp.ones_like(wanted, bool))
            return jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else leaf[:, 0], (x, at))
        if self.positions is None:
            return x, at
        wanted = self.positions - at.positions[:, :1]
        is_there = (wanted >= 0) & (wanted < at.valid.sum(axis=1, dtype=jnp.int32)[:, None])
        return _take(x, at, jnp.clip(wanted, 0, x.shape[1] - 1), is_there)


class Probe:
    """What is read and changed in one call of a model.

    It is made outside a model's loop over layers, and once more for each trace of a layer; `at` must not be called
    inside a `shard_map` or a branch of that trace, from which nothing may be kept.

    Attributes:
      seen: what each reader has found so far, by its name.
    """

    def __init__(self, readers: Mapping[str, Reader] | None = None, edits: Sequence[Edit] = (), at: At | None = None):
        self.seen: dict[str, Any] = {}
        self._readers, self._edits, self._at = readers or {}, edits, at

    def with_edits(self, edits: Sequence[Edit], at: At) -> "Probe":
        """A probe for a model that has these edits, outside its layers; what it sees is seen by this one."""
        inner = Probe(self._readers, edits, at)
        inner.seen = self.seen
        return inner

    def within(self, layer: jax.Array, seen: Mapping[str, Any]) -> "Probe":
        """A probe for layer `layer`, int32 [], before which this much has been seen."""
        assert self._at is not None
        inner = Probe(self._readers, self._edits, dataclasses.replace(self._at, layer=layer))
        inner.seen = dict(seen)
        return inner

    @property
    def parts(self) -> tuple[Mapping[str, Reader], Sequence[Edit], At | None]:
        """What it is made of: a tree of arrays, from which another program makes such a probe."""
        return self._readers, self._edits, self._at

    def empty(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What is to be seen of all layers, before the first, if one of them gives such arrays."""
        return {name: self._readers[name].empty(part) for name, part in found.items()}

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to read or change inside the layers."""
        return not any(self.is_at(site) for site in SITES if site not in OUTSIDE_LAYERS)

    def is_at(self, *sites: str) -> bool:
        """Whether something is read or changed at any of the sites."""
        return self.changes(*sites) or any(reader.site in sites for reader in self._readers.values())

    def changes(self, *sites: str) -> bool:
        """Whether something is changed at any of the sites."""
        return any(edit.site in sites for edit in self._edits)

    def at(self, site: str, x: jax.Array, **known: jax.Array) -> jax.Array:
        """The value x [P, T, ...] as the model is to go on with it; `known` are fields of `At` that the site has."""
        if not self.is_at(site):
            return x
        assert self._at is not None
        at = dataclasses.replace(self._at, **known)
        for edit in self._edits:
            if edit.site == site:
                x = edit.apply(x, at)
        for name, reader in self._readers.items():
            if reader.site == site:
                self.seen[name] = reader.read(x, at, self.seen.get(name))
        return x


UNPROBED = Probe()


def _take(x: jax.Array, at: At, wanted: jax.Array, is_there: jax.Array) -> tuple[jax.Array, At]:
    """A value [P, T, ...], and where it stands, at the places [P, k] of each row; zeros where it is not there."""

    def take(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:  # the layer's number
            return leaf
        lead = (...,) + (None,) * (leaf.ndim - 2)
        found = jnp.take_along_axis(leaf, wanted[lead], axis=1)
        return jnp.where(is_there[lead], found, jnp.zeros((), leaf.dtype))

    taken: tuple[jax.Array, At] = jax.tree.map(take, (x, at))
    return taken


def _listed(layers: Any) -> str:
    """Numbers of layers for a sentence."""
    numbers = np.asarray(layers)
    if numbers.ndim != 1 or numbers.size < 2 or (np.diff(numbers) != 1).any():
        return ", ".join(map(str, numbers.ravel().tolist()))
    return f"{numbers[0]} to {numbers[-1]}"
