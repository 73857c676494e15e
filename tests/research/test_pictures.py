"""Pictures show the values that they are given, and say what is missing where they cannot be drawn."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from looked_into import CONFIG

from grokjax.research import (
    RouterStats,
    TopTokens,
    colour_text,
    draw_experts,
    draw_lens,
    draw_load,
    draw_pattern,
)

RANDOM, LABELS = np.random.default_rng(0), ["a", "$\n", "<c>"]
TOP = TopTokens(jnp.arange(8).reshape(2, 4, 1), -jnp.ones((2, 4, 1)))
EXPERTS = RANDOM.integers(0, 8, (2, 4, 2))


def image(figure, panel: int = 0) -> np.ndarray:
    figure.canvas.draw()  # whatever cannot be drawn is found here
    (drawn,) = figure.axes[panel].images
    return np.asarray(drawn.get_array())


def test_each_picture_shows_what_it_was_given() -> None:
    zero = RouterStats.zero(CONFIG)
    load = RANDOM.integers(1, 9, zero.load.shape)
    stats = RouterStats(**{**vars(zero), "load": load, "tokens": np.full(2, 9)})
    np.testing.assert_allclose(image(draw_load(stats)), load / 9)
    np.testing.assert_array_equal(image(draw_experts(EXPERTS, LABELS, choice=1)), EXPERTS[:, :3, 1])
    lens = draw_lens(TOP, LABELS, decode="token {}".format)
    np.testing.assert_allclose(image(lens), np.full((2, 3), np.exp(-1)), rtol=1e-6)
    assert [text.get_text() for text in lens.axes[0].texts] == [f"token {i}" for i in (0, 1, 2, 4, 5, 6)]
    assert [text.get_text() for text in lens.axes[0].get_xticklabels()] == ["a", "$\\n", "<c>"]
    pattern = RANDOM.uniform(size=(3, 4, 4))
    figure = draw_pattern(pattern, LABELS)
    for head in range(3):
        np.testing.assert_array_equal(image(figure, head), pattern[head, :3, :3])


def test_a_text_is_coloured_by_surprise_and_escaped() -> None:
    source = colour_text(["<b>", "&", "x"], [np.nan, -0.7, -9])._repr_html_()
    assert source.endswith(
        '<span style="background: rgba(214, 39, 40, 0.00)" title="the model said nothing of it">&lt;b&gt;</span>'
        '<span style="background: rgba(214, 39, 40, 0.10)" title="0.70 nats">&amp;</span>'
        '<span style="background: rgba(214, 39, 40, 1.00)" title="9.00 nats">x</span></div>'
    )
    with pytest.raises(ValueError, match=r"2 pieces of text and log-probabilities of shape \(3,\): give as many"):
        colour_text(["a", "b"], [0, 0, 0])
    assert 'title="&quot;&lt;"' in colour_text(["a"], [-1.0], ['"<']).source
    with pytest.raises(ValueError, match="1 pieces of text and 2 notes: give as many"):
        colour_text(["a"], [-1.0], ["b", "c"])


def test_a_picture_that_cannot_be_drawn_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the statistics are of no token"):
        draw_load(RouterStats.zero(CONFIG))
    with pytest.raises(
        ValueError, match=r"experts has shape \(2, 4\), with 3 labels: give those of one text, \[L, T, X\]"
    ):
        draw_experts(EXPERTS[..., 0], LABELS)
    with pytest.raises(ValueError, match="a token has 2 experts here, from 0"):
        draw_experts(EXPERTS, LABELS, choice=2)
    with pytest.raises(ValueError, match="at most T"):
        draw_lens(TOP, "abcde")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="a picture needs matplotlib, the extra `plot`: run pip install"):
        draw_lens(TOP, LABELS)
