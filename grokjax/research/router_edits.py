"""Ready-made edits of the router: which experts tokens choose, and how much these give."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grokjax.config import GrokConfig
from grokjax.model import At, Edit
from grokjax.research.ready_made import CheckPlaces, check_numbers, make_edit, patch, replace, steer


def drop_experts(experts: Mapping[int, Iterable[int]]) -> Edit:
    """Hides experts from the router: tokens choose among the others, whose shares sum to 1.

    Args:
      experts: layer -> the experts that it loses.
    """
    if not isinstance(experts, Mapping) or not all(isinstance(own, Iterable) for own in experts.values()):
        raise ValueError(f"{experts!r} was given: give layer -> the experts that it loses, as in {{12: [3]}}.")
    lost = {layer: dict.fromkeys(own, 0.0) for layer, own in experts.items()}
    return dataclasses.replace(_of_experts(_drop_experts, "router.logits", lost), check=_check_dropped)


def _drop_experts(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    del at
    is_it = value["experts"][:, None] == jnp.arange(x.shape[-1], dtype=jnp.int32)[None]
    return jnp.where(is_it.any(axis=0)[None, None], -jnp.inf, x)


def scale_experts(factors: Mapping[int, Mapping[int, float]]) -> Edit:
    """Multiplies the outputs of experts for the tokens that choose them; 0 silences, and nobody takes their place.

    Args:
      factors: layer -> expert -> factor.
    """
    if not isinstance(factors, Mapping) or not all(isinstance(own, Mapping) for own in factors.values()):
        raise ValueError(f"{factors!r} was given: give layer -> expert -> factor, as in {{12: {{3: 0.5}}}}.")
    return _of_experts(_scale_experts, "router.probabilities", factors)


def _scale_experts(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    assert at.experts is not None
    is_it = at.experts[..., None] == value["experts"][None, None, None]  # [P, T, X, m]
    return x * jnp.where(is_it, value["factors"][None, None, None], 1.0).prod(axis=-1)


def force_experts(experts: ArrayLike, layers: Iterable[int] | None = None) -> Edit:
    """Chooses the experts in the router's place; their shares are those that the router gives them.

    Args:
      experts: integers [X], the same for all tokens; or [P, T, X], those of the first T tokens of each row, or of one
        row for all. Or either for each layer, [n, X] or [n, P, T, X]. No expert twice for a token.
      layers: all by default.
    """
    check_numbers("experts", experts, "an array [X] or [P, T, X], or either for each layer")
    experts = experts if isinstance(experts, jax.Array) else np.asarray(experts)
    if experts.ndim < 3:
        forced = replace("router.experts", layers, experts)
    else:
        forced = patch("router.experts", layers, experts, np.arange(experts.shape[-2]))
    return dataclasses.replace(forced, check=_check_forced)


def _check_forced(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    experts = np.sort(np.asarray(value["value"]), axis=-1)
    if experts.dtype.kind not in "iu" or experts.shape[-1] != config.experts_per_token:
        return f"give the numbers of {config.experts_per_token} experts for a token."
    if experts.min() < 0 or experts.max() >= config.num_experts or (experts[..., 1:] == experts[..., :-1]).any():
        return f"its experts must be from 0 to {config.num_experts - 1}, and none twice for a token."
    return CheckPlaces("router.experts")(layers, value, config)


def bias_router(bias: ArrayLike, layers: Iterable[int] | None = None) -> Edit:
    """Adds to the router's logits, before experts are chosen.

    Args:
      bias: [E], or for each layer, [n, E].
      layers: all by default.
    """
    check_numbers("bias", bias, "an array [E], or [n, E] for n layers")
    return steer(bias, layers, site="router.logits")


def limit_experts(most: int, layers: Iterable[int] | None = None) -> Edit:
    """Leaves each token its best `most` experts of those that it chose; the shares stay as they are.

    Args:
      most: 0 to X.
      layers: all by default.
    """
    return make_edit(_limit_experts, "router.probabilities", layers, 0, check=_check_most, most=np.int32(most))


def _limit_experts(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    del at
    return jnp.where((jnp.arange(x.shape[-1], dtype=jnp.int32) < value["most"])[None, None], x, 0)


def _check_most(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    most, chosen = np.asarray(value["most"]), config.experts_per_token
    is_fitting = 0 <= most <= chosen
    return None if is_fitting else f"it leaves {most} experts: leave 0 to {chosen}, as many as a token chooses."


def _of_experts(fn: Any, site: str, numbers: Mapping[int, Mapping[int, float]]) -> Edit:
    """An edit with a number for some experts of some layers; -1 stands where a layer names fewer of them."""
    most = max((len(own) for own in numbers.values()), default=0)
    if not all(expert >= 0 for own in numbers.values() for expert in own):
        raise ValueError(
            f"experts are numbered from 0, and these were named: {[list(own) for own in numbers.values()]}."
        )
    experts, factors = np.full((len(numbers), most), -1, np.int32), np.ones((len(numbers), most), np.float32)
    for i, own in enumerate(numbers.values()):
        experts[i, : len(own)], factors[i, : len(own)] = list(own), list(own.values())
    value = {"experts": experts, "factors": factors}
    return Edit(site, fn, list(numbers), value, by_layer=True, check=_check_experts)


def _check_experts(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    experts, num_experts = np.asarray(value["experts"]), config.num_experts
    if (experts < 0).all(axis=1).any() or experts.max() >= num_experts:
        return f"name at least one expert in each layer, from 0 to {num_experts - 1}."
    return None


def _check_dropped(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    if (np.asarray(value["experts"]) >= 0).sum(axis=1).max() >= config.num_experts:
        return f"a layer loses all its {config.num_experts} experts: leave it one."
    return _check_experts(layers, value, config)
