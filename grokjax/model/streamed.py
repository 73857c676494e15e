"""Steps of a model whose layers come one after the other, such as from a disk, each only while it computes.

A step sends its tokens through the layers once. With all layers at hand it is one program. Without, it is cut: a first
program ends where the layers begin, a last one begins where they end, and between them ONE program runs each layer as
it comes. The outer two are traced from the whole step, in which something stands for the layers; what a part does not
need, the compiler leaves out.

Few tokens choose few experts, and the others are left unread. Which ones a layer chooses, its program itself says: it
runs while none of them is read, and again with those that were chosen. What it has made of the first run's experts is
let go; keys, values and the choice do not depend on them.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from humanize import naturalsize

from grokjax.cache import CACHE_AXES, Entries, KVCache
from grokjax.config import GrokConfig
from grokjax.kernels import CachePlace
from grokjax.model.building import with_values
from grokjax.model.grok import DecoderLayers, Grok
from grokjax.model.probes import UNPROBED, At, Probe, Reader
from grokjax.model.stack import Carry
from grokjax.request import check_integer
from grokjax.sharding import Partitioner, zeros

R = TypeVar("R")
# What a probe has seen in the layers so far, by its readers' names.
Seen = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LayerAtHand:
    """A layer on the devices.

    Attributes:
      state: of a `DecoderLayers` of one layer. Not the module: that takes part in cycles of references, and a layer's
        memory would wait for Python to collect them.
      experts: the numbers of those that are there; in place of the others stand any numbers.
    """

    state: nnx.State
    experts: Collection[int]


class TakeLayer(Protocol):
    """Waits for a layer of a pass."""

    def __call__(self, number: int, experts: Collection[int] = ()) -> LayerAtHand:
        """Gives a layer, each in turn from the first on, or the last one again, with these experts and maybe others.

        The next layer is fetched meanwhile. Whoever takes one has finished with what was taken before, and holds it no
        more.
        """


class LayerSource(Protocol):
    """Where layers come from."""

    def open_pass(self, first: int, share: float) -> AbstractContextManager[TakeLayer]:
        """Begins a pass.

        Args:
          first: the number of its first layer.
          share: of the experts, which is expected to be asked for; at 1 all of them come with their layer.
        """


class PassKeeper(Protocol):
    """Keeps how far passes have come."""

    def begin(self, x: jax.Array) -> tuple[int, jax.Array]:
        """Gives how many layers were finished before, and the input [B, T, D] of the next: x, if none was."""

    def keep(self, num_layers: int, x: jax.Array) -> None:
        """Keeps that so many layers are finished, and what the last of them gave, [B, T, D]."""


class StreamedLayers(DecoderLayers):
    """What a model has for its layers where these come one after the other: none of their parameters.

    Args:
      one_layer: one of them, maybe of shapes alone.
      num_layers: L.
      source: where they come from.
    """

    def __init__(self, one_layer: DecoderLayers, num_layers: int, source: LayerSource):
        self.num_layers, self.partitioner, self.source = num_layers, one_layer.partitioner, source
        self.config = one_layer.feed_forward.config
        self.keeper: PassKeeper | None = None
        self.graphdef, _ = nnx.split(one_layer)

    def run(self, carry: Carry, place: CachePlace, *, keeps: bool, probe: Probe) -> Carry:
        """Refuses: no program has all layers.

        Raises:
          ValueError: Always.
        """
        raise ValueError(_NO_PROGRAM)

    def __getitem__(self, index: int) -> DecoderLayers:
        raise ValueError(_NO_PROGRAM)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"layers.{name}: {_NO_PROGRAM}")

    def finish(self, carry: Carry, call: "Call") -> tuple[Carry, Seen]:
        """Runs one pass: all layers, each as it comes. DONATES `carry`.

        Args:
          carry: input of the first layer, keys and values.
          call: what all layers are told.

        Returns:
          Output of the last layer, keys and values; and what was seen.
        """
        seen: Seen | None = {} if call.probe is None else None
        first, (x, keys, values) = 0, carry
        if self.keeper is not None:
            assert call.probe is None, "what was seen is not kept"
            assert not call.keeps, "a cache is not kept"
            first, x = self.keeper.begin(x)
            carry = x, keys, values
        share = share_of_experts(self.config, x.shape[0] * x.shape[1])
        run = self._run_next if share == 1 else self._run_chosen
        with self.source.open_pass(first, share) as take:
            for number in range(first, self.num_layers):
                carry, seen = run(take, number, carry, seen, call)
                if self.keeper is not None:
                    self.keeper.keep(number + 1, carry[0])
        assert seen is not None
        return carry, seen

    @contextlib.contextmanager
    def kept_by(self, keeper: PassKeeper) -> Iterator[None]:
        """Meanwhile, a pass goes on where the keeper says, and tells it of each layer; it has no cache and no probe."""
        self.keeper = keeper
        try:
            yield
        finally:
            self.keeper = None

    def _run_next(
        self, take: TakeLayer, number: int, carry: Carry, seen: Seen | None, call: "Call"
    ) -> tuple[Carry, Seen]:
        """Runs one layer, and waits for it: its memory is free then. DONATES what the one before has left."""
        layer = take(number).state
        if seen is None:
            seen = self._nothing_seen(layer, carry, call)
        where = np.asarray(number, np.int32)
        return jax.block_until_ready(_run_layer(layer, where, carry, seen, call, graphdef=self.graphdef))

    def _run_chosen(
        self, take: TakeLayer, number: int, carry: Carry, seen: Seen | None, call: "Call"
    ) -> tuple[Carry, Seen]:
        """Runs one layer until all experts were there that it has chosen: twice, if the devices are sure of theirs."""
        x, *entries = carry
        taken = take(number)
        if seen is None:
            seen = self._nothing_seen(taken.state, carry, call)
        while True:
            (output, *entries), found, is_chosen = jax.block_until_ready(
                _run_and_choose(
                    taken.state, np.asarray(number, np.int32), x, tuple(entries), seen, call, graphdef=self.graphdef
                )
            )
            chosen = np.flatnonzero(np.asarray(is_chosen)).tolist()
            if set(chosen) <= set(taken.experts):
                return (output, *entries), found
            del taken, output, found
            taken = take(number, chosen)

    def _nothing_seen(self, layer: nnx.State, carry: Carry, call: "Call") -> Seen:
        """Zeros for what the probe is to see in the layers, before the first; on every device whole."""
        run = functools.partial(_run, graphdef=self.graphdef)
        _, found = jax.eval_shape(run, layer, np.zeros((), np.int32), carry, {}, call)
        shapes = jax.eval_shape(Probe(*call.probe).empty, found)
        whole = self.partitioner.sharding((), ())
        return zeros(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes))


_NO_PROGRAM = (
    "the layers of this model are streamed, and no program of yours can hold them: give the model to forward, score, "
    "prefill, decode, generate, observe or an engine, outside of jax.jit and other transformations; or load it."
)


def is_streamed(model: Grok) -> bool:
    """Whether the layers of a model come one after the other."""
    return isinstance(model.layers, StreamedLayers)


# Where few tokens are expected to choose more of the experts than this, what is left unread saves less than it costs
# that experts are read while nothing computes.
_MOST_CHOSEN = 0.75


def share_of_experts(config: GrokConfig, num_tokens: int) -> float:
    """The share of a layer's experts that a pass of streamed layers reads: that which few tokens choose, else 1.

    It is an expectation, as if each token chose by itself and each expert were as likely as any other.

    Args:
      config: the sizes.
      num_tokens: of the pass, rows times tokens of each, padding included.
    """
    chosen = 1 - (1 - config.experts_per_token / config.num_experts) ** num_tokens
    return chosen if chosen <= _MOST_CHOSEN else 1.0


# Layers that are there for a while: one that computes, and the next one, which is read.
_IN_PASSING = 2


def layers_that_stay(num_layers: int, of_outside: int, of_layer: int, device_bytes: int | None) -> tuple[int, int]:
    """How many layers stay on the devices, and how many are there at once.

    Args:
      num_layers: L.
      of_outside: bytes on each device of what is no layer.
      of_layer: bytes of one layer on each device.
      device_bytes: what all weights may take there; the least by default.

    Raises:
      ValueError: It is less than the least.
    """
    least = of_outside + min(_IN_PASSING, num_layers) * of_layer
    given = least if device_bytes is None else check_integer("device_bytes", device_bytes, 0)
    if given < least:
        found, needed = (naturalsize(size, binary=True) for size in (given, least))
        raise ValueError(
            f"device_bytes={given} ({found}) is too little: the embedding table and two layers at a time take {needed} "
            "on each device. Give as much, or take more devices along the model axis."
        )
    if given >= of_outside + num_layers * of_layer:
        return num_layers, num_layers
    at_once = (given - of_outside) // of_layer
    return at_once - _IN_PASSING, at_once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """What all layers of a step are told.

    Attributes:
      place: of the tokens in the first layer of the cache.
      probe: the parts of the probe that looks into the layers; None where none does.
      keeps: whether each layer has a cache of its own.
    """

    place: CachePlace
    probe: Any
    keeps: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entered:
    """What a step gives to its layers, but for its cache: a program would copy what it is given and gives back.

    Attributes:
      x: input of the first layer, [P, T, D].
      scratch: keys and values of one layer, which all use in turn; None where the step has a cache.
      call: what all layers are told.
    """

    x: jax.Array
    scratch: tuple[Entries, Entries] | None
    call: Call


class Compiled(Generic[R]):
    """A step, compiled: a function of a model that sends tokens through its layers once.

    Args:
      function: its first argument is the model, and given by place.
      donates: the argument that it DONATES, which holds its cache, if it takes one.
      static: arguments, given by name, that are no arrays; each value compiles anew.
    """

    def __init__(self, function: Callable[..., R], *, donates: str | None = None, static: tuple[str, ...] = ()):
        functools.update_wrapper(self, function)
        self._function, self._donates, self._static = function, donates, static
        self._whole = jax.jit(function, donate_argnames=donates, static_argnames=static)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The program for a model with all layers, not yet compiled; arguments may be abstract."""
        return self._whole.lower(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        """Runs the step."""
        model: Grok = args[0]
        if is_streamed(model):
            return self._run_in_parts(model, inspect.signature(self._function).bind(*args, **kwargs).arguments)
        run = self._function if isinstance(model.layers, _Entrance | _Exit) else self._whole
        return run(*args, **kwargs)

    def _run_in_parts(self, model: Grok, given: dict[str, Any]) -> R:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
            raise ValueError(_NO_PROGRAM)
        layers, outer = cast(StreamedLayers, model.layers), with_values(model, {})
        del outer.layers
        _, *arguments = given
        static = tuple((name, given[name]) for name in arguments if name in self._static)
        others = {name: given[name] for name in arguments if name not in (self._donates, *self._static)}
        donated = {self._donates: given[self._donates]} if self._donates else {}
        entered = _before(outer, donated, others, function=self._function, static=static)
        entries = _entries_in(donated) if entered.scratch is None else entered.scratch
        (output, *entries), seen = layers.finish((entered.x, *entries), entered.call)
        donated = _with_entries(donated, *entries)
        finished: R = _after(outer, donated, others, output, seen, function=self._function, static=static)
        return finished


class _Entrance(DecoderLayers):
    """Stands for the layers in the part of a step before them: notes what they are given."""

    def __init__(self, partitioner: Partitioner, note: Callable[[Entered], None]):
        self.partitioner, self.note = partitioner, note

    def run(self, carry: Carry, place: CachePlace, *, keeps: bool, probe: Probe) -> Carry:
        x, keys, values = carry
        # Whole, wherever the cache's lengths lie, so that one program runs the layers of every call of some shape.
        place = jax.tree.map(lambda leaf: self.partitioner.constrain(leaf, (None,) * leaf.ndim), place)
        call = Call(place, None if probe.is_idle else probe.parts, keeps)
        self.note(Entered(x, None if keeps else (keys, values), call))
        return carry


class _Exit(DecoderLayers):
    """Stands for the layers in the part of a step behind them: gives what they have left."""

    def __init__(self, left: Callable[[], tuple[jax.Array, Seen]]):
        self.left = left

    def run(self, carry: Carry, place: CachePlace, *, keeps: bool, probe: Probe) -> Carry:
        del place, keeps
        _, keys, values = carry  # of the step's own cache, which the layers have written
        output, seen = self.left()
        probe.seen.update(seen)
        return output, keys, values


@functools.partial(jax.jit, static_argnames=("function", "static"))
def _before(model: Grok, donated: Any, others: Any, *, function: Callable[..., Any], static: Any) -> Entered:
    """What a step gives to its layers."""
    notes: list[Entered] = []
    model.layers = _Entrance(model.partitioner, notes.append)
    function(model, **donated, **others, **dict(static))
    (entered,) = notes
    return entered


@functools.partial(jax.jit, donate_argnames="donated", static_argnames=("function", "static"))
def _after(
    model: Grok, donated: Any, others: Any, output: jax.Array, seen: Seen, *, function: Callable[..., R], static: Any
) -> R:
    """What a step makes of what its layers have left. DONATES `donated`, whose cache they have written."""
    model.layers = _Exit(lambda: (output, seen))
    return function(model, **donated, **others, **dict(static))


def _run(
    layer: nnx.State, number: jax.Array, carry: Carry, seen: Seen, call: Call, *, graphdef: Any
) -> tuple[Carry, Seen]:
    """One layer, which has number `number` in the model."""
    layers: DecoderLayers = nnx.merge(graphdef, layer)
    here = UNPROBED if call.probe is None else Probe(*call.probe).within(number, seen)
    place = dataclasses.replace(call.place, layer=number if call.keeps else call.place.layer)
    carry = layers(*carry, layer=jnp.zeros_like(number), place=place, probe=here)
    return _placed(carry, layers.partitioner), here.seen


_run_layer = jax.jit(_run, donate_argnames=("carry", "seen"), static_argnames="graphdef")
# The name of what reads the choice among those of a probe's readers.
_CHOICE = "experts that a token chose"


@functools.partial(jax.jit, donate_argnames="entries", static_argnames="graphdef")
def _run_and_choose(
    layer: nnx.State,
    number: jax.Array,
    x: jax.Array,
    entries: tuple[Entries, Entries],
    seen: Seen,
    call: Call,
    *,
    graphdef: Any,
) -> tuple[Carry, Seen, jax.Array]:
    """One layer, and which experts a real token chose, bool [E]. DONATES `entries` alone: it may have to run again."""
    readers, edits, at = call.probe or ({}, (), At.of(call.place, x.shape[1]))
    layers: DecoderLayers = nnx.merge(graphdef, layer)
    num_experts, partitioner = layers.feed_forward.config.num_experts, layers.partitioner

    def find_chosen(experts: jax.Array, at: At) -> jax.Array:
        numbers = jnp.where(at.valid[..., None] & (experts >= 0), experts, num_experts)
        return jnp.zeros(num_experts, bool).at[numbers].set(True, mode="drop")

    reader = Reader(site="router.experts", layers=None, positions=None, is_last=False, via=find_chosen, fold=None)
    call = dataclasses.replace(call, probe=({**readers, _CHOICE: reader}, edits, at))
    carry, found = _run(layer, number, (x, *entries), seen, call, graphdef=graphdef)
    return carry, {name: found[name] for name in seen}, partitioner.constrain(found[_CHOICE], (None,))


def _placed(carry: Carry, partitioner: Partitioner) -> Carry:
    """The same where every layer finds and leaves it, so that one program runs all of them."""
    x, *entries = carry
    keys, values = jax.tree.map(lambda leaf: partitioner.constrain(leaf, CACHE_AXES[: leaf.ndim]), entries)
    return partitioner.constrain(x, ("batch", None, None)), keys, values


def _entries_in(donated: Any) -> tuple[Entries, Entries]:
    """Keys and values of the only cache in a tree."""
    (cache,) = [leaf for leaf in jax.tree.leaves(donated, is_leaf=_is_cache) if _is_cache(leaf)]
    return cache.keys, cache.values


def _with_entries(donated: Any, keys: Entries, values: Entries) -> Any:
    """A tree whose cache, if it has one, holds these entries."""

    def put(leaf: Any) -> Any:
        return dataclasses.replace(leaf, keys=keys, values=values) if _is_cache(leaf) else leaf

    return jax.tree.map(put, donated, is_leaf=_is_cache)


def _is_cache(leaf: Any) -> bool:
    return isinstance(leaf, KVCache)
