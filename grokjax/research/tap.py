"""Reads the values that a model computes on its way, under jit and on any mesh."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grokjax.cache import KVCache
from grokjax.config import GrokConfig
from grokjax.model import (
    OUTSIDE_LAYERS,
    At,
    Compiled,
    Grok,
    Probe,
    Reader,
    axes_of,
    check_chunks,
    check_texts,
    in_any_context,
    last_logits,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """What is to be read at one site. Only the layers and positions that it names take memory.

    Attributes:
      site: where, one of `SITES`; docs/research.md has a table.
      layers: their numbers, each once, in the order in which they are to stand; all of them by default.
      at: "last", for the last real token of each row, of which what is read has no axis for positions; or positions in
        the texts, [k] or [P, k], from 0 to less than `max_seq_len`; all by default. What a call does not reach of the
        positions is 0.
      via: (value [P, T, ...] or less of it, where it stands, an `At`) -> the tree of arrays that is kept instead, as
        `top_tokens` makes. It runs in the layer, so that the value itself takes no memory. A function of a module
        compiles once; a lambda made anew, anew.
      fold: (what is kept, what the next layer gives) -> what is kept: one result of all layers, such as `jnp.maximum`
        makes.
    """

    site: str
    layers: Iterable[int] | None = None
    at: Any = None
    via: Callable[[jax.Array, At], Any] | None = None
    fold: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    def __post_init__(self) -> None:
        axes_of(self.site)


@in_any_context
def observe(
    model: Grok, tokens: ArrayLike, lengths: ArrayLike, taps: Mapping[str, Tap]
) -> tuple[jax.Array, dict[str, Any]]:
    """Runs whole texts through the model, keeps no cache, and gives what the taps have read.

    It has derivatives where `forward` has them. Other layers, in the same number, and other positions compile nothing.

    Args:
      model: the model, edited or not.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each text, 1 to T.
      taps: by names of your choice.

    Returns:
      Logits, float32 [B, V], at each text's last token, as `prefill` gives them; and what was read, by the taps' names:
      [n, B, T, ...] of n layers, in the site's dtype and in its shards, without the first axis outside the layers or
      where layers are folded, and [n, B, ...] or [n, B, k, ...] of some positions.

    Raises:
      ValueError: A tap names no layer of the model, or one twice, or a position that no text here has; or the texts are
        none, see `check_texts`.
    """
    tokens, lengths = check_texts(model, tokens, lengths)
    return _observe(model, tokens, lengths, _readers_of(model, taps, len(tokens), tokens.shape[1]))


@in_any_context
def observe_step(
    model: Grok,
    tokens: ArrayLike,
    lengths: ArrayLike,
    cache: KVCache,
    taps: Mapping[str, Tap],
    *,
    rows: ArrayLike | None = None,
) -> tuple[jax.Array, dict[str, Any], KVCache]:
    """`prefill` that also gives what the taps have read in this call. DONATES `cache`.

    It adds prompts, or further chunks of them; with T = 1 it is `decode`, whose inactive rows have length 0.

    Args:
      model: the model, edited or not.
      tokens: integers [P, T] in the vocabulary, right-padded.
      lengths: integers [P], real tokens of each row in this call, 0 to T.
      cache: of B rows; each row continues after what it holds.
      taps: by names of your choice; their positions count from the beginning of a row, not of the call.
      rows: integers [P], the cache's rows that the tokens are for; by default all B in order.

    Returns:
      Logits, float32 [P, V], at each row's last real token; what was read, as `observe` gives it; and the cache.

    Raises:
      ValueError: As in `observe` and `prefill`; but a tap may name positions that this call does not reach.
    """
    tokens, lengths, rows = check_chunks(model, tokens, lengths, cache, rows)
    readers = _readers_of(model, taps, len(tokens), model.config.max_seq_len)
    given = (model, tokens, lengths, cache, rows, readers)
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given))
    return (_observe_step_keeping if is_traced else _observe_step)(*given)


@Compiled
def _observe(
    model: Grok, tokens: jax.Array, lengths: jax.Array, readers: Mapping[str, Reader]
) -> tuple[jax.Array, dict[str, Any]]:
    probe = Probe(readers)
    hidden = model.hidden_states(tokens, count=lengths, probe=probe)
    return last_logits(model, hidden, lengths), probe.seen


def _run_step(
    model: Grok,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: KVCache,
    rows: jax.Array | None,
    readers: Mapping[str, Reader],
) -> tuple[jax.Array, dict[str, Any], KVCache]:
    probe = Probe(readers)
    hidden, cache = model(tokens, lengths, cache, rows=rows, probe=probe)
    return last_logits(model, hidden, lengths), probe.seen, cache


_observe_step = Compiled(_run_step, donates="cache")
_observe_step_keeping = Compiled(_run_step)  # a derivative needs the cache again


def _readers_of(model: Grok, taps: Mapping[str, Tap], num_rows: int, end: int) -> dict[str, Reader]:
    """What the taps read of so many rows, whose texts have less than `end` positions."""
    if not isinstance(taps, Mapping) or not all(isinstance(tap, Tap) for tap in taps.values()):
        raise ValueError('taps must be a dict of Taps by names of your choice, such as {"x": Tap("stream.out")}.')
    return {name: _reader_of(f"the tap {name!r}", tap, model.config, num_rows, end) for name, tap in taps.items()}


def _reader_of(named: str, tap: Tap, config: GrokConfig, num_rows: int, end: int) -> Reader:
    check_site(named, tap.site, config)
    layers = layers_of(named, tap.site, tap.layers, config)
    if tap.fold is not None and layers is None:
        raise ValueError(f"{named} folds layers, and {tap.site!r} stands outside of them: leave fold away.")
    is_last = isinstance(tap.at, str) and tap.at == "last"
    via = _whole if tap.via is None else tap.via
    return Reader(
        site=tap.site,
        layers=layers,
        positions=None if is_last or tap.at is None else _positions_of(named, tap.at, num_rows, end),
        is_last=is_last,
        via=as_pytree(via),
        fold=tap.fold,
    )


def as_pytree(function: Callable[..., Any]) -> Any:
    """A function of a caller's as compiled code takes it: itself if it is a pytree, or else static."""
    return jax.tree_util.Partial(function) if jax.tree_util.all_leaves([function]) else function


def _whole(x: jax.Array, at: At) -> jax.Array:
    del at
    return x


def _positions_of(named: str, at: Any, num_rows: int, end: int) -> jax.Array:
    positions: Any = at if isinstance(at, jax.Array) else np.asarray(at)
    is_fitting = positions.ndim == 1 or (positions.ndim == 2 and len(positions) == num_rows)
    if positions.dtype.kind not in "iu" or not is_fitting or not positions.size:
        raise ValueError(
            f'{named} is at {at!r}: give "last", or positions as integers [k], or [{num_rows}, k] for {num_rows} rows.'
        )
    problem = None if isinstance(positions, jax.core.Tracer) else problem_of_positions(positions, end)
    if problem is not None:
        raise ValueError(f'{named}: {problem} Or give "last".')
    return jnp.broadcast_to(
        jnp.asarray(positions, jnp.int32).reshape(-1, positions.shape[-1]), (num_rows, positions.shape[-1])
    )


def problem_of_positions(positions: ArrayLike, end: int) -> str | None:
    """What is wrong with positions that are known, in a sentence; None if texts of `end` tokens have them all."""
    known = np.asarray(positions)
    if known.dtype.kind in "iu" and known.size and known.min() >= 0 and known.max() < end:
        return None
    return f"positions count from 0 at the beginning of a text, up to {end - 1}, and these were given: {known}."


def check_site(named: str, site: str, config: GrokConfig) -> None:
    """Checks that a model has a site, for what is `named` so in the error.

    Raises:
      ValueError: It has not.
    """
    axes_of(site)
    if site.startswith("router.") and config.num_experts == 1:
        raise ValueError(f"{named} is at {site!r}, and this model is dense: it has no router.")


def layers_of(named: str, site: str, layers: Iterable[int] | None, config: GrokConfig) -> jax.Array | None:
    """The numbers of layers as an array, int32 [n]; all if there are none; None for a site outside the layers.

    Raises:
      ValueError: Layers are named for a site that has none; there are none, some do not exist, or one is named twice.
    """
    if site in OUTSIDE_LAYERS:
        if layers is not None:
            raise ValueError(f"{named} names layers, and {site!r} stands outside of them: leave layers away.")
        return None
    if isinstance(layers, jax.core.Tracer):
        return layers.astype(jnp.int32)
    try:
        numbers = [operator.index(one) for one in (range(config.num_layers) if layers is None else layers)]
    except TypeError as error:
        raise ValueError(f"{named} has layers={layers!r}: give their numbers, as in layers=[0, 1].") from error
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= one < config.num_layers for one in numbers):
        raise ValueError(
            f"{named} has layers={numbers}: name at least one, from 0 to {config.num_layers - 1}, and each once."
        )
    return jnp.asarray(numbers, jnp.int32)


def shape_of(axes: str, config: GrokConfig, num_rows: int, length: int) -> tuple[int, ...]:
    """The sizes of the axes of a site, as `SITES` names them, in a call of so many rows and tokens."""
    sizes = {
        "P": num_rows,
        "T": length,
        "D": config.model_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "X": config.experts_per_token,
    }
    return tuple(sizes[letter] for letter in axes)
