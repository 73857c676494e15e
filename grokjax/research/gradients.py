"""What values on a model's way do to a number made of its logits, by derivatives: all places at once.

Where a token's experts change between two values, the number jumps, and no derivative tells of it. `force_experts`
holds them as they are.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from grokjax.model import SITES, At, Edit, Grok, check_texts, in_any_context
from grokjax.research.attribution import LogitDifference
from grokjax.research.edit import edit
from grokjax.research.tap import Tap, as_pytree, check_site, layers_of, observe, shape_of

Metric = Callable[[jax.Array], jax.Array]


@in_any_context
def estimate_patches(
    model: Grok,
    metric: Metric,
    tokens: ArrayLike,
    lengths: ArrayLike,
    site: str,
    value: ArrayLike,
    layers: Iterable[int] | None = None,
) -> jax.Array:
    """Attribution patching: by how much each patch alone would change a number, to first order, by one backward pass.

    Args:
      model: the model, edited or not.
      metric: (logits, float32 [B, V], after each text's last token) -> float32 []; such as `LogitDifference(5, 7)`. A
        function of a module compiles once; a lambda made anew, anew.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T.
      site: where; one of floats.
      value: what another run had there, as `observe` gives it for the same layers, [n, B, T, ...].
      layers: all by default.

    Returns:
      float32 [n, B, T], or [n, B, T, N] at a site with heads: for each layer and token, and for each head, the change
      of the number if its value were put in the place of the model's own. Outside the layers there is no first axis.

    Raises:
      ValueError: The site or the layers do not exist, the site has integers, the value has another shape than the site
        there, or the texts are none, see `check_texts`.
    """
    tokens, lengths = check_texts(model, tokens, lengths)
    held = _layers_of_floats("estimate_patches", model, site, layers)
    wanted = _shape_of(site, held, model, tokens)
    if np.shape(value) != wanted:
        raise ValueError(
            f"the value has shape {np.shape(value)}, and {site!r} has {wanted} in these layers and texts: give what "
            "observe has read there, of texts padded to the same length."
        )
    given = jnp.asarray(value, jnp.float32)
    return _estimate(model, _checked(metric, tokens, model), tokens, lengths, given, held, site=site)


@in_any_context
def integrate_gradients(
    model: Grok,
    metric: Metric,
    tokens: ArrayLike,
    lengths: ArrayLike,
    site: str,
    baseline: ArrayLike,
    layer: int | None = None,
    *,
    steps: int = 32,
) -> jax.Array:
    """Integrated gradients: what each token's value at a site gives to a number, compared with a baseline.

    They sum to the number less what it is where all tokens have the baseline, the closer the more steps.

    Args:
      model: the model, edited or not.
      metric: as in `estimate_patches`.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T.
      site: where; one of floats.
      baseline: a number, or an array that has, or broadcasts to, the site's axes [B, T, ...].
      layer: its number; None outside the layers.
      steps: points on the straight line from the baseline to the model's own values, each as costly as a gradient.

    Returns:
      float32 [B, T], or [B, T, N] at a site with heads.

    Raises:
      ValueError: The site or the layer does not exist, the site has integers, the baseline does not broadcast, there is
        no step, or the texts are none, see `check_texts`.

    Source: Sundararajan, Taly, Yan, Axiomatic Attribution for Deep Networks (arXiv 1703.01365).
    """
    tokens, lengths = check_texts(model, tokens, lengths)
    held = _layers_of_floats("integrate_gradients", model, site, None if layer is None else [layer])
    if held is not None and len(held) > 1:
        raise ValueError(f"{site!r} is in {len(held)} layers: name one, as in layer=0.")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a whole number from 1, such as 32.")
    shape = _shape_of(site, held, model, tokens)
    given = jnp.asarray(baseline, jnp.float32)
    try:
        start = jnp.broadcast_to(given, shape)
    except ValueError:
        raise ValueError(
            f"the baseline has shape {given.shape}, and {site!r} has {shape[held is not None :]} in these texts: give "
            "that, or what broadcasts to it, such as 0."
        ) from None
    found = _integrate(model, _checked(metric, tokens, model), tokens, lengths, start, held, site=site, steps=steps)
    return found if held is None else found[0]


def _layers_of_floats(named: str, model: Grok, site: str, layers: Iterable[int] | None) -> jax.Array | None:
    check_site(named, site, model.config)
    if site == "router.experts":
        raise ValueError(f"{named} is at {site!r}, which has integers: take router.logits or router.probabilities.")
    return layers_of(named, site, layers, model.config)


def _shape_of(site: str, layers: jax.Array | None, model: Grok, tokens: jax.Array) -> tuple[int, ...]:
    """The shape of what a tap reads at a site in some layers."""
    return (() if layers is None else layers.shape) + shape_of(SITES[site], model.config, *tokens.shape)


def _checked(metric: Metric, tokens: jax.Array, model: Grok) -> Any:
    if isinstance(metric, LogitDifference):
        metric.check(len(tokens), model.config.vocab_size)
    return as_pytree(metric)


@functools.partial(jax.jit, static_argnames="site")
def _estimate(
    model: Grok,
    metric: Metric,
    tokens: jax.Array,
    lengths: jax.Array,
    value: jax.Array,
    layers: jax.Array | None,
    *,
    site: str,
) -> jax.Array:
    def of_added(added: jax.Array) -> tuple[jax.Array, jax.Array]:
        edited = edit(model, Edit(site, _add, layers, added, by_layer=layers is not None))
        logits, seen = observe(edited, tokens, lengths, {"x": Tap(site, layers)})
        return metric(logits), seen["x"]

    slopes, own = jax.grad(of_added, has_aux=True)(jnp.zeros_like(value))
    return (slopes * (value - own.astype(jnp.float32))).sum(axis=-1)


@functools.partial(jax.jit, static_argnames=("site", "steps"))
def _integrate(
    model: Grok,
    metric: Metric,
    tokens: jax.Array,
    lengths: jax.Array,
    start: jax.Array,
    layers: jax.Array | None,
    *,
    site: str,
    steps: int,
) -> jax.Array:
    _, seen = observe(model, tokens, lengths, {"x": Tap(site, layers)})
    way = seen["x"].astype(jnp.float32) - start

    def of_value(value: jax.Array) -> jax.Array:
        edited = edit(model, Edit(site, _put, layers, value, by_layer=layers is not None))
        return metric(observe(edited, tokens, lengths, {})[0])

    def add_point(i: jax.Array, slopes: jax.Array) -> jax.Array:
        return slopes + jax.grad(of_value)(start + way * ((i.astype(jnp.float32) + 0.5) / steps))

    slopes = lax.fori_loop(0, steps, add_point, jnp.zeros_like(way))
    return (slopes / steps * way).sum(axis=-1)


def _add(x: jax.Array, value: jax.Array, at: At) -> jax.Array:
    del at
    return x + value


def _put(x: jax.Array, value: jax.Array, at: At) -> jax.Array:
    del at
    return value
