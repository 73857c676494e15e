"""Ready-made edits: steering, patching, ablating directions, heads and experts, each a change at one site."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grokjax.config import GrokConfig
from grokjax.model import SITES, At, Edit
from grokjax.research.tap import problem_of_positions


def steer(
    vector: ArrayLike,
    layers: Iterable[int] | None = None,
    *,
    scale: ArrayLike = 1.0,
    start: ArrayLike = 0,
    site: str = "stream.out",
) -> Edit:
    """Adds a vector.

    Args:
      vector: [D], or one for each layer, [n, D]; at another site in place of D its axes after [P, T].
      layers: all by default.
      scale: its factor.
      start: the first position of each text to which it is added, from 0 to less than `max_seq_len`.
      site: where.
    """
    vector = jnp.asarray(vector, jnp.float32) * jnp.asarray(scale, jnp.float32)
    return _ready(_steer, site, layers, _num_features(site), check=_check_start, vector=vector, start=start)


def _steer(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    return _where(at.positions >= value["start"], x + _aligned(value["vector"], x), x)


def _check_start(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    return problem_of_positions(value["start"], config)


def replace(site: str, layers: Iterable[int] | None, value: ArrayLike) -> Edit:
    """Puts the same value, such as 0 or a mean, in the place of every token's.

    Args:
      site: where.
      layers: None for all of them, or for a site outside of them.
      value: a number, or an array of the site's axes after [P, T], such as [D], or one for each layer, [n, D].
    """
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    wide = value if value.ndim else np.full((1,) * _num_features(site), value)
    return _ready(_replace, site, layers, _num_features(site), value=wide)


def _replace(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    del at
    return jnp.broadcast_to(_aligned(value["value"], x), x.shape)


def patch(site: str, layers: Iterable[int] | None, value: ArrayLike, positions: ArrayLike | None = None) -> Edit:
    """Puts values of another run, such as `observe` gives, in the place of those at some positions.

    Args:
      site: where.
      layers: None for all of them, or for a site outside of them.
      value: [P, k, ...] as the site has it, P rows or one for all; or that for each layer, [n, P, k, ...].
      positions: integers [k] in the texts, or [P, k], from 0 to less than `max_seq_len`; by default the first k. One
        beyond a text changes nothing.
    """
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    rank = len(SITES.get(site, ""))
    if positions is None:
        positions = np.arange(value.shape[value.ndim - rank + 1] if value.ndim >= rank else 0)
    positions = positions if isinstance(positions, jax.Array) else np.asarray(positions)
    positions = positions.reshape(-1, positions.shape[-1]) if positions.ndim else positions.reshape(1, 1)
    if value.ndim >= rank > 0 and value.shape[-rank] == 1 < len(positions):
        value = jnp.repeat(value, len(positions), axis=-rank)
    return _ready(_patch, site, layers, rank, check=_check_positions, value=value, positions=positions)


def _patch(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    new, positions = value["value"], value["positions"]
    if new.ndim != x.ndim or new.shape[2:] != x.shape[2:] or new.shape[1] != positions.shape[1]:
        raise ValueError(
            f"{new.shape} are no values of {positions.shape[1]} positions: give as many, and the last axes of x."
        )
    if not {len(new), len(positions)} <= {1, len(x)}:
        raise ValueError(
            f"its values have {len(new)} rows, its positions {len(positions)}, and this call has {len(x)}: give as "
            "many as the call has, or one row for all, as an engine needs, whose calls have other rows than yours."
        )
    rows = jnp.broadcast_to(new, (len(x), *new.shape[1:]))
    is_it = at.positions[:, :, None] == positions[:, None]  # [P, T, k]
    index = jnp.argmax(is_it, axis=-1)[(...,) + (None,) * (x.ndim - 2)]
    return _where(is_it.any(axis=-1), jnp.take_along_axis(rows, index, axis=1).astype(x.dtype), x)


def _check_positions(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    return problem_of_positions(value["positions"], config)


def project_out(direction: ArrayLike, layers: Iterable[int] | None = None, *, site: str = "stream.out") -> Edit:
    """Takes out what values have along a direction.

    Args:
      direction: [D], of any length but 0, or one for each layer, [n, D].
      layers: all by default.
      site: where; one whose values are vectors.
    """
    direction = jnp.asarray(direction, jnp.float32)
    unit = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    return _ready(_project_out, site, layers, 1, check=_check_finite, direction=unit)


def _project_out(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    del at
    direction = _aligned(value["direction"], x)
    if direction.shape[-1] != x.shape[-1]:
        raise ValueError(f"the direction has {direction.shape[-1]} numbers.")
    return x - (x * direction).sum(axis=-1, keepdims=True) * direction


def _check_finite(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    is_finite = np.isfinite(np.asarray(value["direction"])).all()
    return None if is_finite else "its direction has the length 0, or is not finite: give another."


def scale_heads(scales: ArrayLike, layers: Iterable[int] | None = None) -> Edit:
    """Multiplies what each head has mixed, before the output projection.

    Args:
      scales: [N], or for each layer, [n, N].
      layers: all by default.
    """
    scales = jnp.asarray(scales, jnp.float32)
    return _ready(_scale_heads, "attention.heads", layers, 1, check=_check_heads, scales=scales)


def _scale_heads(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    del at
    return x * _aligned(value["scales"][:, None], x)


def mask_heads(mask: ArrayLike, layers: Iterable[int] | None = None) -> Edit:
    """Silences heads.

    Args:
      mask: bool [N], or for each layer, [n, N]: True for the heads that stay.
      layers: all by default.
    """
    mask = jnp.asarray(mask, bool)
    return _ready(_mask_heads, "attention.heads", layers, 1, check=_check_heads, mask=mask)


def _mask_heads(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    del at
    return jnp.where(_aligned(value["mask"][:, None], x), x, 0)


def _check_heads(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    (of_heads,), num_heads = value.values(), config.num_heads
    if of_heads.ndim in (1, 2) and of_heads.shape[-1] == num_heads:
        return None
    return (
        f"its value has the shape {of_heads.shape}, and the model has {num_heads} heads in a layer: give "
        f"[{num_heads}], one for each head, or [n, {num_heads}] for n layers."
    )


def drop_experts(experts: Mapping[int, Iterable[int]]) -> Edit:
    """Hides experts from the router: tokens choose among the others, whose shares sum to 1.

    Args:
      experts: layer -> the experts that it loses.
    """
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
    experts = experts if isinstance(experts, jax.Array) else np.asarray(experts)
    make = replace if experts.ndim < 3 else patch
    return dataclasses.replace(make("router.experts", layers, experts), check=_check_forced)


def _check_forced(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    experts = np.sort(np.asarray(value["value"]), axis=-1)
    if experts.dtype.kind not in "iu" or experts.shape[-1] != config.experts_per_token:
        return f"give the numbers of {config.experts_per_token} experts for a token."
    if experts.min() < 0 or experts.max() >= config.num_experts or (experts[..., 1:] == experts[..., :-1]).any():
        return f"its experts must be from 0 to {config.num_experts - 1}, and none twice for a token."
    return _check_positions(layers, value, config) if "positions" in value else None


def bias_router(bias: ArrayLike, layers: Iterable[int] | None = None) -> Edit:
    """Adds to the router's logits, before experts are chosen.

    Args:
      bias: [E], or for each layer, [n, E].
      layers: all by default.
    """
    return steer(bias, layers, site="router.logits")


def limit_experts(most: int, layers: Iterable[int] | None = None) -> Edit:
    """Leaves each token its best `most` experts of those that it chose; the shares stay as they are.

    Args:
      most: 0 to X.
      layers: all by default.
    """
    return _ready(_limit_experts, "router.probabilities", layers, 0, check=_check_most, most=np.int32(most))


def _limit_experts(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    del at
    return jnp.where((jnp.arange(x.shape[-1], dtype=jnp.int32) < value["most"])[None, None], x, 0)


def _check_most(layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
    most, chosen = np.asarray(value["most"]), config.experts_per_token
    is_fitting = 0 <= most <= chosen
    return None if is_fitting else f"it leaves {most} experts: leave 0 to {chosen}, as many as a token chooses."


def _ready(fn: Any, site: str, layers: Iterable[int] | None, rank: int, check: Any = None, **value: Any) -> Edit:
    """An edit whose first value has `rank` axes, or one more in front for layers; the others are for all layers."""
    first = next(iter(value))
    by_layer = np.ndim(value[first]) > rank
    if by_layer:
        num_layers = np.shape(value[first])[0]
        for name in list(value)[1:]:
            xp: Any = jnp if isinstance(value[name], jax.Array) else np  # under jit, NumPy's values stay known
            value[name] = xp.broadcast_to(xp.asarray(value[name])[None], (num_layers, *np.shape(value[name])))
    return Edit(site, fn, layers, value, by_layer=by_layer, check=check)


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


def _num_features(site: str) -> int:
    """How many axes a site has after [P, T]."""
    return len(SITES.get(site, "PT")) - 2


def _aligned(value: jax.Array, x: jax.Array) -> jax.Array:
    """The value with as many axes as x, which does not promote ranks by itself."""
    return value.reshape((1,) * (x.ndim - value.ndim) + value.shape)


def _where(is_it: jax.Array, new: jax.Array, x: jax.Array) -> jax.Array:
    """A value [P, T, ...] for the tokens [P, T] of which something is so, x for the others."""
    return jnp.where(is_it[(...,) + (None,) * (x.ndim - 2)], new, x)
