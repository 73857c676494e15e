"""Models that compute something else: edits of the values on their way, each a change at one site in some layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.context import own_context
from grokjax.model import SITES, At, Edit, Edits, Grok, with_values
from grokjax.research.tap import check_site, layers_of, shape_of
from grokjax.sharding import Partitioner, receive


@own_context()
def edit(model: Grok, *edits: Edit) -> Grok:
    """A model with edits; the weights are shared, and `model` stays as it is.

    It goes wherever a model goes: `forward`, `prefill`, `decode`, `generate`, `observe`, `Engine`, derivatives, also
    those with respect to the values of its edits. Those that are at one site act in the order in which they were given,
    after those that the model has already.

    Args:
      model: the model, edited or not.
      edits: ready-made ones, such as `steer`, or of your own, see `Edit`.

    Raises:
      ValueError: An edit reaches nothing: its site, its layers or its positions do not exist, or its value does not fit
        there.
    """
    if not edits or not all(isinstance(one, Edit) for one in edits):
        raise ValueError("edit takes a model and one edit or more, such as steer(vector, layers=[3]) makes.")
    edited = with_values(model, {})
    edited.edits = Edits((*edits_of(model), *(_bound(one, model) for one in edits)))
    return edited


def edits_of(model: Grok) -> tuple[Edit, ...]:
    """The edits of a model, in the order in which they were given."""
    return () if model.edits is None else tuple(model.edits.get_value())


@own_context()
def unedited(model: Grok) -> Grok:
    """The model without its edits; the weights are shared, and `model` stays as it is."""
    plain = with_values(model, {})
    plain.edits = None
    return plain


def _bound(one: Edit, model: Grok) -> Edit:
    """The edit with its layers and its value as arrays where the model lies, checked."""
    named, config = f"the edit {one!r}", model.config
    check_site(named, one.site, config)
    layers = layers_of(named, one.site, one.layers, config)
    given = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), one.value)
    value = jax.tree.map(lambda leaf: _array(leaf, model.partitioner), given)
    bound = dataclasses.replace(one, layers=layers, value=value)
    if one.by_layer:
        num_layers = 0 if layers is None else len(layers)
        wrong = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(value)} - {num_layers}
        if wrong:
            raise ValueError(
                f"{named} is in {num_layers} layer(s), and its value is for {', '.join(map(str, sorted(wrong)))}: give "
                f"it {num_layers} for a first axis, or leave that axis away, to have the same in all layers."
            )
    try:
        problem = None if one.check is None else one.check(layers, given, config)
    except jax.errors.JAXTypeError:
        problem = None  # what is traced is not known
    if problem is not None:
        raise ValueError(f"{named}: {problem}")
    _try(bound, config)
    return bound


def _try(bound: Edit, config: GrokConfig) -> None:
    """Applies the edit to shapes alone: of as many rows and tokens as its value may have, else of one of each."""
    rank = len(SITES[bound.site]) + bound.by_layer
    full = [leaf.shape[bound.by_layer :] for leaf in jax.tree.leaves(bound.value) if leaf.ndim == rank]
    rows, length = full[0][:2] if full else (1, 1)

    def shape(axes: str, dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct(shape_of(axes, config, rows, length), dtype)

    at = At(
        layer=shape("", jnp.int32),
        positions=shape("PT", jnp.int32),
        valid=shape("PT", bool),
        router_logits=shape("PTE", jnp.float32),
        experts=shape("PTX", jnp.int32),
    )
    x = shape(SITES[bound.site], jnp.int32 if bound.site == "router.experts" else jnp.float32)
    jax.eval_shape(lambda x, at, value: dataclasses.replace(bound, value=value).apply(x, at), x, at, bound.value)


def _array(array: Any, partitioner: Partitioner) -> jax.Array:
    """An array on the model's devices, floats in at most 32 bits: a number of Python must not widen what it changes."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jnp.asarray(array, array.dtype if array.dtype.itemsize < 4 else jnp.float32)
    elif jnp.issubdtype(array.dtype, jnp.integer):
        array = jnp.asarray(array, jnp.int32)
    return receive(jnp.asarray(array), partitioner)
