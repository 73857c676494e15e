"""Pictures of what was read, each by one call that gives a figure of matplotlib or a page of HTML.

A figure is saved by `figure.savefig("picture.png")`, and shown by a notebook that has said `%matplotlib inline`.
"""

import dataclasses
import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike

from grokjax.research.lens import TopTokens
from grokjax.research.routing import RouterStats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Nats at which a token of a text has the strongest colour: one of a thousand that were equally probable.
_STRONGEST = 7.0


def draw_load(stats: RouterStats) -> "Figure":
    """The load of each expert in each layer.

    How to read it: a row is a layer, a column an expert. White experts evaluate as many tokens as they would if all had
    the same; blue ones fewer, red ones more, and the darkest twice as many or more than that.

    Raises:
      ValueError: The statistics are of no token, or matplotlib is not installed.
    """
    load, tokens = _on_host(stats.load), _on_host(stats.tokens)
    if not tokens.all():
        raise ValueError("the statistics are of no token: add those of some texts, which observe_routing gives.")
    shares = load / tokens[:, None]  # [L, E]
    even = float(shares.mean())
    figure = _new_figure(shares.shape[1] * 0.5 + 2, shares.shape[0] * 0.15 + 1.5)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="RdBu_r", vmin=0, vmax=2 * even, aspect="auto", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer", title="share of the tokens", xticks=range(shares.shape[1]))
    figure.colorbar(image, ax=axes, extend="max")
    return figure


def draw_experts(experts: ArrayLike, labels: Sequence[str], *, choice: int = 0) -> "Figure":
    """Which expert each token of a text chose in each layer.

    How to read it: a column is a token, a row a layer, a colour an expert. A column of one colour is a token that stays
    with the experts of one number, and a row of one colour a layer that sends the whole text to one expert.

    Args:
      experts: integers [L, T, X] of one text, as a tap of `router.experts` gives for each.
      labels: what to write under each of the first tokens; the others are left out, such as padding.
      choice: which of a token's experts, 0 for the best.

    Raises:
      ValueError: Shapes do not fit, there is no such choice, or matplotlib is not installed.
    """
    numbers = _of_rank("experts", experts, "LTX", labels)
    if not 0 <= choice < numbers.shape[2]:
        raise ValueError(f"choice={choice!r}: a token has {numbers.shape[2]} experts here, from 0.")
    chosen = numbers[:, : len(labels), choice]
    figure = _new_figure(len(labels) * 0.3 + 2, len(chosen) * 0.15 + 1.5)
    axes = figure.subplots()
    colours = "tab10" if chosen.max() < 10 else "tab20" if chosen.max() < 20 else "turbo"
    most = {"tab10": 9, "tab20": 19, "turbo": chosen.max()}[colours]
    image = axes.imshow(chosen, cmap=colours, vmin=-0.5, vmax=most + 0.5, aspect="auto", interpolation="nearest")
    axes.set(ylabel="layer", title=f"expert of choice {choice}")
    _label(axes, "x", labels)
    figure.colorbar(image, ax=axes, ticks=range(int(chosen.max()) + 1), boundaries=np.arange(chosen.max() + 2) - 0.5)
    return figure


def draw_lens(top: TopTokens, labels: Sequence[str], decode: Callable[[int], str] = str) -> "Figure":
    """The logit lens: which token the model would go on with if it ended after a layer.

    How to read it: a column is a token of the text, a row a layer, and a cell says what comes next, as far as that
    layer knows; the darker it is, the surer. The first row with the answer of the last is where it was found.

    Args:
      top: of one text, `ids` [L, T, k], as a tap of `stream.out` with `via=top_tokens(model, 1)` gives for each.
      labels: what to write under each of the first tokens; the others are left out, such as padding.
      decode: from a token's id to what is written, such as `lambda id: tokenizer.decode([id])`; the id by default.

    Raises:
      ValueError: Shapes do not fit, or matplotlib is not installed.
    """
    ids = _of_rank("ids", top.ids, "LTk", labels)[:, : len(labels), 0]
    chances = np.exp(_on_host(top.logprobs)[:, : len(labels), 0])
    figure = _new_figure(len(labels) * 0.7 + 2, len(ids) * 0.25 + 1.5)
    axes = figure.subplots()
    image = axes.imshow(chances, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for (layer, place), token in np.ndenumerate(ids):
        colour = "white" if chances[layer, place] > 0.5 else "black"
        text = _visible(decode(int(token)))
        axes.text(place, layer, text, ha="center", va="center", color=colour, fontsize="x-small", parse_math=False)
    axes.set(ylabel="after layer", title="the most probable next token")
    _label(axes, "x", labels)
    figure.colorbar(image, ax=axes, label="probability")
    return figure


def draw_pattern(pattern: ArrayLike, labels: Sequence[str]) -> "Figure":
    """What each head of a layer attends to.

    How to read it: a square is a head. A row is a token that looks, a column one that is looked at, and the darker a
    cell, the more of what the head passes on comes from there. A dark diagonal looks at the token itself, one below it
    at the token before, and a dark first column at nothing in particular.

    Args:
      pattern: floats [N, T, T] of one text, as `attention_pattern` gives for each.
      labels: what to write beside each of the first tokens; the others are left out, such as padding.

    Raises:
      ValueError: Shapes do not fit, or matplotlib is not installed.
    """
    length, shares = len(labels), _of_rank("pattern", pattern, "NTT", labels)
    columns = int(np.ceil(len(shares) ** 0.5))
    rows = -(-len(shares) // columns)
    figure = _new_figure(columns * (length * 0.12 + 1), rows * (length * 0.12 + 1))
    for head in range(len(shares)):
        axes = figure.add_subplot(rows, columns, head + 1)
        axes.imshow(shares[head, :length, :length], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"head {head}", fontsize="small")
        _label(axes, "x", labels)
        _label(axes, "y", labels)
    return figure


@dataclasses.dataclass(frozen=True)
class HtmlPicture:
    """A piece of HTML, which a notebook shows as it is.

    Attributes:
      source: the text of it, all that came from a model or a file escaped.
    """

    source: str

    def _repr_html_(self) -> str:
        return self.source


def colour_text(pieces: Sequence[str], logprobs: ArrayLike, notes: Sequence[str] | None = None) -> HtmlPicture:
    """A text, coloured by how much each of its tokens surprised the model.

    How to read it: the redder a token, the less the model expected it after what stands before; white ones it knew. The
    strongest red is 7 nats or more, a chance of one in a thousand. Pointing at a token tells its note.

    Args:
      pieces: the text of each token.
      logprobs: floats [T], the natural log-probability that the model gave each after those before it; NaN for one
        that it gave none, such as the first, which has no colour.
      notes: what to tell of each token; by default its nats.

    Raises:
      ValueError: There are not as many of all.
    """
    surprise = -_on_host(logprobs).astype(np.float64)
    if surprise.shape != (len(pieces),):
        raise ValueError(f"{len(pieces)} pieces of text and log-probabilities of shape {surprise.shape}: give as many.")
    if notes is None:
        notes = ["the model said nothing of it" if np.isnan(nats) else f"{nats:.2f} nats" for nats in surprise]
    if len(notes) != len(pieces):
        raise ValueError(f"{len(pieces)} pieces of text and {len(notes)} notes: give as many.")
    spans = [_span(*token) for token in zip(pieces, surprise, notes, strict=True)]
    style = "white-space: pre-wrap; font-family: monospace; background: white; color: black"
    return HtmlPicture(f'<div style="{style}">{"".join(spans)}</div>')


def _span(piece: str, nats: float, note: str) -> str:
    strength = 0 if np.isnan(nats) else min(max(nats, 0) / _STRONGEST, 1)
    style = f"background: rgba(214, 39, 40, {strength:.2f})"
    return f'<span style="{style}" title="{html.escape(note)}">{html.escape(piece)}</span>'


def _new_figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError(
            "a picture needs matplotlib, the extra `plot`: run pip install '.[plot]' in the checkout."
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


@jax.transfer_guard("allow")
def _on_host(values: ArrayLike) -> "np.ndarray[Any, np.dtype[Any]]":
    return np.asarray(values)


def _of_rank(name: str, values: ArrayLike, axes: str, labels: Sequence[str]) -> "np.ndarray[Any, np.dtype[Any]]":
    """The values on the host, of one text with at least as many tokens as there are labels."""
    known = _on_host(values)
    if known.ndim != len(axes) or not 0 < len(labels) <= known.shape[1]:
        raise ValueError(
            f"{name} has shape {known.shape}, with {len(labels)} labels: give those of one text, [{', '.join(axes)}], "
            "with at least one label and at most T."
        )
    return known


def _label(axes: Any, axis: str, labels: Sequence[str]) -> None:
    ticks = {"ticks": range(len(labels)), "labels": list(map(_visible, labels)), "fontsize": "x-small"}
    set_ticks, turned = (axes.set_xticks, {"rotation": 90}) if axis == "x" else (axes.set_yticks, {})
    set_ticks(**ticks, **turned, parse_math=False)


def _visible(text: str) -> str:
    """A text in which line breaks and what else is not printed are written out."""
    return repr(text)[1:-1]
