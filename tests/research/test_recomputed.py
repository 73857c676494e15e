"""Attention patterns and single experts, computed on demand, are the float64 reference's."""

import numpy as np
import pytest
from builders import EXPERT, TENSOR, label, or_thorough
from looked_into import CONFIG, expected, make

from grokjax import ShardingRules, reference
from grokjax.research import attention_pattern, expert_outputs

CASES = [((1, 1), TENSOR, False), ((2, 4), TENSOR, True), ((2, 4), EXPERT, False)]


def test_an_attention_pattern_mixes_the_values_as_the_heads_do() -> None:
    """In all layers and texts at once; and from some tokens as from all."""
    seen = {site: values[:, :1].astype(np.float32) for site, values in expected().items() if "attention" in site}
    pattern = np.asarray(attention_pattern(make(), seen["attention.query"], seen["attention.key"]))  # [L, 1, N, T, T]
    values = np.repeat(seen["attention.value"], CONFIG.num_heads // CONFIG.num_kv_heads, axis=3)
    mixed = np.einsum("lbnqt,lbtnh->lbqnh", pattern, values)
    np.testing.assert_allclose(mixed, seen["attention.heads"], rtol=0, atol=1e-4)
    assert not np.triu(pattern, k=1).any()
    some = seen["attention.query"][:, :, [4, 8]]
    found = attention_pattern(make(), some, seen["attention.key"], positions=[4, 8])
    np.testing.assert_allclose(found, pattern[..., [4, 8], :], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"keys of shape \(1, 9, 4, 8\) .* do not fit: give \[\.\.\., k, 8, 8\]"):
        attention_pattern(make(), some, seen["attention.key"][0], positions=[4, 8])
    with pytest.raises(ValueError, match=r"queries of shape \(2, 1, 8, 8\), .*\"last\" leaves .* away: read at=\[5\]"):
        attention_pattern(make(), seen["attention.query"][:, :, -1], seen["attention.key"])
    with pytest.raises(ValueError, match=r"positions of shape \(1,\) do not fit"):
        attention_pattern(make(), some, seen["attention.key"], positions=[4])


@pytest.mark.parametrize(("mesh", "rules", "quantized"), or_thorough(CASES, CASES[2:]), ids=label)
def test_experts_by_themselves_are_the_reference_s(
    mesh: tuple[int, int], rules: ShardingRules, quantized: bool
) -> None:
    """And their sum, weighted by their shares, is what the layer's last norm is given."""
    model, layer = make(mesh, rules, quantized=quantized), 1
    weights = reference.unpack_weights(model)
    seen = {site: values[layer][:, :3] for site, values in expected(quantized=quantized).items() if values.ndim == 4}
    stream, experts = seen["stream.mid"], seen["router.experts"]
    found = expert_outputs(model, stream.astype(np.float32), experts, layer)
    assert repr(found).startswith("ExpertOutputs(hidden=float32[2")
    x = normed(stream, weights[f"layers.{layer}.pre_feed_forward_norm.scale"])
    gate, up, down = (weights[f"layers.{layer}.feed_forward.{name}"] for name in ("gate", "up", "down"))
    for place in np.ndindex(experts.shape):
        own, expert = x[place[:2]], int(experts[place])
        inputs = own @ gate[expert]
        hidden = 0.5 * inputs * (1 + np.tanh(np.sqrt(2 / np.pi) * (inputs + 0.044715 * inputs**3))) * (own @ up[expert])
        np.testing.assert_allclose(found.hidden[place], hidden, rtol=0, atol=2e-4)
        np.testing.assert_allclose(found.output[place], hidden @ down[expert], rtol=0, atol=2e-4)
    mixed = (np.asarray(found.output) * seen["router.probabilities"][..., None]).sum(axis=2)
    out = normed(mixed, weights[f"layers.{layer}.post_feed_forward_norm.scale"])
    np.testing.assert_allclose(out, seen["feed_forward.out"], rtol=0, atol=2e-3)


def normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + CONFIG.norm_eps) * scale


@pytest.mark.parametrize(
    ("shape", "experts", "layer", "message"),
    [
        ((1, 2, 32), [[[0], [8]]], 0, r"experts are from 0 to 7, and others were named: \[\[\[0\]"),
        ((1, 2, 32), [[[0], [1]]], 2, "layer=2: the model has layers 0 to 1"),
        ((1, 3, 32), [[[0], [1]]], 0, r"\(1, 3, 32\) and experts int64 \(1, 2, 1\) do not fit: give \[P, T, 32\]"),
    ],
)
def test_experts_that_are_not_there_are_refused(shape: tuple, experts: list, layer: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_outputs(make(), np.zeros(shape, np.float32), experts, layer)
