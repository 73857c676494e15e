"""Derivatives tell what patches do, and integrated gradients sum to what they explain."""

import jax.numpy as jnp
import numpy as np
import pytest
from looked_into import CONFIG, LENGTHS, TOKENS, dense, make

from grokjax.research import LogitDifference, Tap, edit, estimate_patches, integrate_gradients, observe, patch

METRIC = LogitDifference([7, 8], 9)
OTHERS = np.random.default_rng(3).integers(3, CONFIG.vocab_size, TOKENS.shape)


def test_an_estimated_patch_is_what_a_small_patch_does() -> None:
    """Of one head of one token; where the value is the model's own, nothing is to change."""
    model, place = make(), (0, 0, 4, 2)
    logits, seen = observe(model, TOKENS, LENGTHS, {"x": Tap("attention.heads")})
    changed = np.array(seen["x"])
    changed[place] += 1e-2 * np.random.default_rng(5).standard_normal(CONFIG.head_dim)
    estimated = estimate_patches(model, METRIC, TOKENS, LENGTHS, "attention.heads", changed)
    patched, _ = observe(edit(model, patch("attention.heads", [0], changed[0])), TOKENS, LENGTHS, {})
    assert estimated.shape == (2, *TOKENS.shape, CONFIG.num_heads)
    np.testing.assert_allclose(estimated[place], METRIC(patched) - METRIC(logits), rtol=2e-2)
    assert np.argwhere(np.abs(estimated) > 1e-6).tolist() == [list(place)]


@pytest.mark.thorough
@pytest.mark.parametrize(("site", "layer"), [("embedding", None), ("stream.mid", 0)])
def test_integrated_gradients_sum_to_the_difference_that_they_explain(site: str, layer: int | None) -> None:
    """Between the values of two texts; the difference is that of the run with the other's in all places.

    docs/experiments.md shows it for a mixture of experts.
    """
    model = dense()
    _, seen = observe(model, OTHERS, LENGTHS, {"x": Tap(site)})
    other = seen["x"] if layer is None else seen["x"][layer]
    found = integrate_gradients(model, METRIC, TOKENS, LENGTHS, site, other, layer)
    ends = [
        METRIC(observe(one, TOKENS, LENGTHS, {})[0])
        for one in (model, edit(model, patch(site, None if layer is None else [layer], other)))
    ]
    assert found.shape == TOKENS.shape
    np.testing.assert_allclose(found.sum(), ends[0] - ends[1], rtol=2e-2)
    assert not found[1, LENGTHS[1] :].any()  # padding gives nothing


def test_what_has_no_derivative_is_refused() -> None:
    texts = METRIC, TOKENS, LENGTHS
    with pytest.raises(ValueError, match=r"at 'router\.experts', which has integers: take router\.logits"):
        estimate_patches(make(), *texts, "router.experts", np.zeros((2, 2, 9, 2)))
    with pytest.raises(ValueError, match=r"value has shape \(2, 9, 32\), and 'stream\.in' has \(2, 2, 9, 32\)"):
        estimate_patches(make(), *texts, "stream.in", np.zeros((2, 9, 32)))
    with pytest.raises(ValueError, match=r"'stream\.in' is in 2 layers: name one, as in layer=0"):
        integrate_gradients(make(), *texts, "stream.in", 0)
    with pytest.raises(ValueError, match=r"baseline has shape \(3,\), and 'stream\.in' has \(2, 9, 32\)"):
        integrate_gradients(make(), *texts, "stream.in", jnp.zeros(3), 0)
    with pytest.raises(ValueError, match="steps=0 must be a whole number from 1"):
        integrate_gradients(make(), *texts, "stream.in", 0, 0, steps=0)
    with pytest.raises(ValueError, match="target is 300"):
        integrate_gradients(make(), LogitDifference(300), TOKENS, LENGTHS, "stream.in", 0, 0)
