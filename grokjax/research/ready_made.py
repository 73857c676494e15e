"""Ready-made edits: steering, patching, ablating directions and heads, each a change at one site."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grokjax.config import GrokConfig
from grokjax.model import SITES, At, Edit, axes_of
from grokjax.research.tap import problem_of_positions, shape_of


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
    check_numbers("vector", vector, "an array [D], or [n, D] for n layers")
    vector = jnp.asarray(vector, jnp.float32) * jnp.asarray(scale, jnp.float32)
    return make_edit(_steer, site, layers, _num_features(site), check=CheckPlaces(site), vector=vector, start=start)


def _steer(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    return _where(at.positions >= value["start"], x + _aligned(value["vector"], x), x)


def replace(
    site: str,
    layers: Iterable[int] | None,
    value: ArrayLike,
    *,
    start: ArrayLike = 0,
    heads: ArrayLike | None = None,
) -> Edit:
    """Puts the same value, such as 0 or a mean, in the place of every token's.

    Args:
      site: where.
      layers: None for all of them, or for a site outside of them.
      value: a number, or an array of the site's axes after [P, T], such as [D], or one for each layer, [n, D]. Of named
        heads, [m, H] or [n, m, H].
      start: the first position of each text at which it is put, from 0 to less than `max_seq_len`.
      heads: integers [m], the heads whose values these are, of a site that has heads; the others stay as they are.

    Raises:
      ValueError: There is no such site, it has no heads to name, or the value is no array.
    """
    check_numbers("value", value, "a number or an array")
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    rank = _num_features(site)
    wide = value if value.ndim else np.full((1,) * rank, value)
    named = {} if heads is None else {"heads": _heads(site, heads)}
    return make_edit(_replace, site, layers, rank, check=CheckPlaces(site), value=wide, start=start, **named)


def _replace(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    new, is_late = _aligned(value["value"], x).astype(x.dtype), at.positions >= value["start"]
    if "heads" not in value:
        return _where(is_late, jnp.broadcast_to(new, x.shape), x)
    heads, (*_, size) = value["heads"], x.shape
    if len(heads) > 1 or new.shape[2:] not in ((1, size), (1, 1), (heads.shape[1], size)):
        raise ValueError(
            f"its value has the shape {new.shape[2:]}, and the heads {heads.shape}: name m heads, [m], and give a "
            f"number, [{size}] or [m, {size}]."
        )
    wide = jnp.broadcast_to(new, (1, 1, heads.shape[1], size))
    new, is_head = _spread(wide, heads, _numbers(x.shape[2]), axis=2)
    return jnp.where(is_late[:, :, None, None] & is_head[:, None, :, None], new, x)


def patch(
    site: str,
    layers: Iterable[int] | None,
    value: ArrayLike,
    positions: ArrayLike | None = None,
    *,
    heads: ArrayLike | None = None,
) -> Edit:
    """Puts values of another run, such as `observe` gives, in the place of those at some positions.

    Args:
      site: where.
      layers: None for all of them, or for a site outside of them.
      value: [P, k, ...] as the site has it, P rows or one for all; or that for each layer, [n, P, k, ...]. Of named
        heads, [P, k, m, H] or [n, P, k, m, H].
      positions: integers [k] in the texts, or [P, k], from 0 to less than `max_seq_len`. One beyond a text changes
        nothing. By default the value is of whole texts, and no call may have more tokens than it.
      heads: integers [m], or [P, m], the heads whose values these are, of a site that has heads; the others stay as
        they are.

    Raises:
      ValueError: There is no such site, it has no heads to name, or the value or the positions have another form.
    """
    axes = axes_of(site)
    check_numbers("value", value, "an array, as observe gives it")
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    if value.ndim not in (len(axes), len(axes) + 1):
        wanted = ", ".join(("P", "k", *axes[2:]))
        one_head = f" Of some heads, give [P, k, m, {axes[3]}] and name the m heads." if "H" in axes else ""
        raise ValueError(
            f"a value of shape {value.shape} is none of {site!r}: give [{wanted}] of k positions, or [n, {wanted}] of "
            f'n layers. A tap at="last" leaves the axis of positions away: read at=[5], one position.{one_head}'
        )
    places = {} if positions is None else {"positions": _positions(positions)}
    if heads is not None:
        places["heads"] = _heads(site, heads)
    rows = max(map(len, places.values()), default=1)
    if value.shape[-len(axes)] == 1 < rows:
        value = jnp.repeat(value, rows, axis=-len(axes))
    return make_edit(_patch, site, layers, len(axes), check=CheckPlaces(site), value=value, **places)


def _patch(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    new, heads = value["value"], value.get("heads")
    is_whole = "positions" not in value
    positions = _numbers(new.shape[1]) if is_whole else value["positions"]
    _check_shapes(x, new, positions, heads, is_whole=is_whole)
    rows = jnp.broadcast_to(new, (len(x), *new.shape[1:])).astype(x.dtype)
    rows, is_it = _spread(rows, positions, at.positions, axis=1)
    if heads is None:
        return _where(is_it, rows, x)
    rows, is_head = _spread(rows, heads, _numbers(x.shape[2]), axis=2)
    return jnp.where(is_it[:, :, None, None] & is_head[:, None, :, None], rows, x)


def _check_shapes(
    x: jax.Array, new: jax.Array, positions: jax.Array, heads: jax.Array | None, *, is_whole: bool
) -> None:
    """Checks that a patch fits what it is put into.

    Raises:
      ValueError: It does not.
    """
    features = x.shape[2:] if heads is None else (heads.shape[1], *x.shape[3:])
    if new.shape[1:] != (positions.shape[1], *features):
        of_heads = "" if heads is None else f" and {heads.shape[1]} heads"
        wanted = ", ".join(map(str, ("P", positions.shape[1], *features)))
        raise ValueError(f"{new.shape} are no values of {positions.shape[1]} positions{of_heads}: give [{wanted}].")
    if is_whole and new.shape[1] < x.shape[1]:
        raise ValueError(
            f"its values are of {new.shape[1]} positions, and this call has {x.shape[1]} tokens, padding among them: "
            "name the positions, as in patch(..., positions=[5])."
        )
    given = {"values": new, "positions": positions} | ({} if heads is None else {"heads": heads})
    if not {len(part) for part in given.values()} <= {1, len(x)}:
        counts = ", ".join(f"{len(part)} of {name}" for name, part in given.items())
        raise ValueError(
            f"it has rows: {counts}; and this call has {len(x)}: give as many as the call has, or one row for all, as "
            "an engine needs, whose calls have other rows than yours."
        )


def _spread(new: jax.Array, places: jax.Array, present: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Values of some numbered places along an axis, at all places that there are; and which of these were named.

    Args:
      new: values with k places along the axis.
      places: integers [P, k], their numbers.
      present: integers [P, T], the numbers of all places.
      axis: which.
    """
    is_it = present[:, :, None] == places[:, None]  # [P, T, k]
    shape = [1] * new.ndim
    index = jnp.argmax(is_it, axis=-1)
    shape[0], shape[axis] = index.shape
    return jnp.take_along_axis(new, index.reshape(shape), axis=axis), is_it.any(axis=-1)


def _numbers(count: int) -> jax.Array:
    """From 0 on, one row for all, int32 [1, count]."""
    return jnp.arange(count, dtype=jnp.int32)[None]


def _positions(given: Any) -> Any:
    """Positions as rows [P, k], or one row for all."""
    if isinstance(given, str):
        raise ValueError(
            f"positions={given!r}: give their numbers, [k] or [P, k]. The last tokens of whole texts are at "
            "np.array(lengths)[:, None] - 1, for the tap, too, that reads the value."
        )
    return _as_rows("positions", given)


def _heads(site: str, given: Any) -> Any:
    """Numbers of heads as rows [P, m], or one row for all; checks that the site has heads."""
    if "H" not in axes_of(site):
        with_heads = ", ".join(name for name, axes in SITES.items() if "H" in axes)
        raise ValueError(f"heads={given!r} are named at {site!r}, which has none: name them at {with_heads}.")
    return _as_rows("heads", given)


def _as_rows(name: str, given: Any) -> Any:
    """Numbers as rows [P, k], or one row for all; NumPy's stay known under jit."""
    numbers = given if isinstance(given, jax.Array) else np.asarray(given)
    if numbers.ndim > 2:
        raise ValueError(f"{name} have the shape {numbers.shape}: give one row for all, [k], or [P, k].")
    return numbers[(None,) * (2 - numbers.ndim)]


@dataclasses.dataclass(frozen=True)
class CheckPlaces:
    """Checks the positions and heads of an edit at a site; equal for equal sites, so that nothing is compiled anew."""

    site: str

    def __call__(self, layers: jax.Array, value: Mapping[str, jax.Array], config: GrokConfig) -> str | None:
        """What is wrong with them, in a sentence, or None."""
        for name in ("start", "positions"):
            if name in value and (problem := problem_of_positions(value[name], config.max_seq_len)):
                return problem
        if "heads" not in value:
            return None
        known, (num_heads,) = np.asarray(value["heads"]), shape_of(axes_of(self.site)[2], config, 1, 1)
        is_known = known.dtype.kind in "iu" and known.size and known.min() >= 0 and known.max() < num_heads
        if is_known and (np.diff(np.sort(known, axis=-1), axis=-1) > 0).all():
            return None
        return f"it names the heads {known}: name at least one, from 0 to {num_heads - 1}, and each once."


def project_out(direction: ArrayLike, layers: Iterable[int] | None = None, *, site: str = "stream.out") -> Edit:
    """Takes out what values have along a direction.

    Args:
      direction: [D], of any length but 0, or one for each layer, [n, D].
      layers: all by default.
      site: where; one whose values are vectors.
    """
    check_numbers("direction", direction, "an array [D], or [n, D] for n layers")
    direction = jnp.asarray(direction, jnp.float32)
    unit = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    return make_edit(_project_out, site, layers, 1, check=_check_finite, direction=unit)


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
    check_numbers("scales", scales, "an array [N], or [n, N] for n layers")
    scales = jnp.asarray(scales, jnp.float32)
    return make_edit(_scale_heads, "attention.heads", layers, 1, check=_check_heads, scales=scales)


def _scale_heads(x: jax.Array, value: Mapping[str, jax.Array], at: At) -> jax.Array:
    del at
    return x * _aligned(value["scales"][:, None], x)


def mask_heads(mask: ArrayLike, layers: Iterable[int] | None = None) -> Edit:
    """Silences heads.

    Args:
      mask: bool [N], or for each layer, [n, N]: True for the heads that stay.
      layers: all by default.
    """
    check_numbers("mask", mask, "an array [N], or [n, N] for n layers")
    mask = jnp.asarray(mask, bool)
    return make_edit(_mask_heads, "attention.heads", layers, 1, check=_check_heads, mask=mask)


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


def make_edit(fn: Any, site: str, layers: Iterable[int] | None, rank: int, check: Any = None, **value: Any) -> Edit:
    """An edit whose first value has `rank` axes, or one more in front for layers; the others are for all layers."""
    first = next(iter(value))
    by_layer = np.ndim(value[first]) > rank
    if by_layer:
        num_layers = np.shape(value[first])[0]
        for name in list(value)[1:]:
            xp: Any = jnp if isinstance(value[name], jax.Array) else np  # under jit, NumPy's values stay known
            value[name] = xp.broadcast_to(xp.asarray(value[name])[None], (num_layers, *np.shape(value[name])))
    return Edit(site, fn, layers, value, by_layer=by_layer, check=check)


def _num_features(site: str) -> int:
    """How many axes a site has after [P, T]."""
    return len(axes_of(site)) - 2


def check_numbers(what: str, given: Any, wanted: str) -> None:
    """Checks that an array was given, and not a dict, as the edits of experts take.

    Raises:
      ValueError: It was not.
    """
    if given is None or isinstance(given, Mapping | str):
        raise ValueError(f"{what} is {given!r}: give {wanted}, and name layers apart, as in layers=[3].")


def _aligned(value: jax.Array, x: jax.Array) -> jax.Array:
    """The value with as many axes as x, which does not promote ranks by itself."""
    return value.reshape((1,) * (x.ndim - value.ndim) + value.shape)


def _where(is_it: jax.Array, new: jax.Array, x: jax.Array) -> jax.Array:
    """A value [P, T, ...] for the tokens [P, T] of which something is so, x for the others."""
    return jnp.where(is_it[(...,) + (None,) * (x.ndim - 2)], new, x)
