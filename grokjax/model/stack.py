"""Runs a stack of layers. Backwards it goes layer by layer, each computed once more from its input.

So what is held beside the gradients is the input of every layer and what one layer makes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.cache import Entries
from grokjax.kernels import CachePlace, in_place, with_rule

Carry = tuple[jax.Array, Entries, Entries]
C = TypeVar("C")


def run_stack(
    run_layer: Callable[..., Carry],
    parameters: Any,
    carry: Carry,
    place: CachePlace,
    *,
    keeps: bool,
    platform: str,
) -> Carry:
    """Runs new tokens through all layers.

    Args:
      run_layer: (parameters; input and cache; number of the layer, int32 []; place in the cache; `is_pulled=`, whether
        it is run to be differentiated) -> output and cache.
      parameters: a tree of arrays [L, ...], of which the floats have derivatives.
      carry: the first layer's input [P, T, D] in the compute dtype, and the cache's keys and values [L, B, K, S, H]; of
        one layer, which all use in turn, if it is not kept.
      place: of the tokens in the first layer of the cache.
      keeps: whether each layer has a cache of its own.
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      The last layer's output [P, T, D], and the cache's keys and values, without derivatives where they are not kept.
    """
    stack = _Stack(run_layer, len(jax.tree.leaves(parameters)[0]), keeps=keeps, platform=platform)
    run = with_rule(stack.run, stack.pull, saving=stack.run_saving)
    finished: Carry = run(parameters, carry, place)
    return finished


@dataclasses.dataclass(frozen=True)
class _Stack:
    """How layers are run one after the other; arguments are those of `run_stack`."""

    run_layer: Callable[..., Carry]
    num_layers: int
    keeps: bool
    platform: str

    def run(self, parameters: Any, carry: Carry, place: CachePlace) -> Carry:
        """All layers, and nothing kept of them."""

        def step(layer: jax.Array, carry: Carry) -> Carry:
            return self._run_forwards(parameters, carry, layer, place)

        finished: Carry = lax.fori_loop(0, self.num_layers, step, carry)
        return finished

    def run_saving(self, parameters: Any, carry: Carry, place: CachePlace) -> tuple[Carry, jax.Array]:
        """All layers, and what each was given, [L, P, T, D]."""

        def step(carry: Carry, layer: jax.Array) -> tuple[Carry, jax.Array]:
            return self._run_forwards(parameters, carry, layer, place), carry[0]

        finished: tuple[Carry, jax.Array] = lax.scan(step, carry, jnp.arange(self.num_layers, dtype=jnp.int32))
        return finished

    def pull(self, operands: tuple[Any, Carry, CachePlace], inputs: jax.Array, out: Carry) -> tuple[Any, Carry, None]:
        """The cotangents of the operands of `run`, from what each layer was given and the cotangents of its result."""
        parameters, (_, *entries), place = operands
        leaves: list[jax.Array] = jax.tree.leaves(parameters)
        tree: Any = jax.tree.structure(parameters)
        floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        first = dataclasses.replace(place, layer=jnp.zeros((), jnp.int32))
        put = functools.partial(lax.dynamic_update_index_in_dim, axis=0)

        def pull_layer(i: jax.Array, carry: Any) -> Any:
            layer = self.num_layers - 1 - i
            of_floats, of_x, of_entries = carry
            own = {number: self._one_layer(leaf, layer) for number, leaf in enumerate(leaves)}
            number = layer if self.keeps else jnp.zeros_like(layer)
            own_entries = jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, number), tuple(entries))

            def run_own(values: list[jax.Array], x: jax.Array, entries: tuple[jax.Array, jax.Array]) -> Carry:
                parameters = tree.unflatten((own | dict(zip(floats, values, strict=True))).values())
                return self.run_layer(parameters, (x, *entries), first.layer, first, is_pulled=True)

            _, back = jax.vjp(run_own, [own[i] for i in floats], inputs[layer], own_entries)
            parts, of_x, of_own = back((of_x, *(lax.dynamic_index_in_dim(part, number) for part in of_entries)))
            of_floats = [put(whole, part, layer) for whole, part in zip(of_floats, parts, strict=True)]
            if self.keeps:
                of_entries = [put(whole, part, layer) for whole, part in zip(of_entries, of_own, strict=True)]
            return of_floats, of_x, of_entries

        of_x, *of_entries = out
        nothing = [jnp.zeros_like(leaves[i]) for i in floats]
        of_floats, of_x, of_entries = lax.fori_loop(0, self.num_layers, pull_layer, (nothing, of_x, of_entries))
        found = dict.fromkeys(range(len(leaves))) | dict(zip(floats, of_floats, strict=True))
        return tree.unflatten(found.values()), (of_x, *of_entries), None

    def _run_forwards(self, parameters: Any, carry: Carry, layer: jax.Array, place: CachePlace) -> Carry:
        """One layer, for its result alone."""
        place = _place_of(layer, place, keeps=self.keeps)
        return self.run_layer(parameters, carry, layer, place, is_pulled=False)

    def _one_layer(self, stack: jax.Array, layer: jax.Array) -> jax.Array:
        """What a stack holds of one layer, [1, ...]."""
        held, layer = in_place(stack, layer, platform=self.platform)
        return lax.dynamic_index_in_dim(held, layer)


def run_observed(
    run_layer: Callable[[C, jax.Array, CachePlace], C], carry: C, place: CachePlace, *, num_layers: int, keeps: bool
) -> C:
    """Runs new tokens through all layers, of which anything may be kept.

    Every float that the layers use has derivatives, by JAX's own rules for a loop whose steps are computed once more.

    Args:
      run_layer: (what is carried, number of the layer, int32 [], place in the cache) -> what is carried on.
      carry: what the first layer is given: a tree of arrays.
      place: of the tokens in the first layer of the cache.
      num_layers: L.
      keeps: whether each layer has a cache of its own.
    """

    @jax.checkpoint
    def step(layer: jax.Array, carry: C) -> C:
        layer = jnp.asarray(layer, jnp.int32)
        return run_layer(carry, layer, _place_of(layer, place, keeps=keeps))

    finished: C = lax.fori_loop(0, num_layers, step, carry)
    return finished


def _place_of(layer: jax.Array, place: CachePlace, *, keeps: bool) -> CachePlace:
    """The place of the tokens in the cache of a layer."""
    layer = jnp.asarray(layer, jnp.int32)  # a loop's index is of 64 bits under x64
    return dataclasses.replace(place, layer=layer if keeps else jnp.zeros_like(layer))
