"""Attention patterns and single experts, computed on demand, are the float64 reference's."""

import numpy as np
import pytest
from builders import EXPERT, TENSOR, label, or_thorough
from looked_into import CONFIG, IS_REAL, LENGTHS, TOKENS, dense, expected, make

from grokjax import ShardingRules, reference
from grokjax.research import attention_pattern, expert_outputs

CASES = [((1, 1), TENSOR, False), ((2, 4), TENSOR, True), ((2, 4), EXPERT, False)]


def test_an_attention_pattern_mixes_the_values_as_the_heads_do() -> None:
    pattern = np.asarray(attention_pattern(make(), TOKENS, LENGTHS, 1))  # [B, N, T, T]
    values = np.repeat(expected()["attention.value"][1], CONFIG.num_heads // CONFIG.num_kv_heads, axis=2)
    mixed = np.einsum("bnqt,btnh->bqnh", pattern, values)
    np.testing.assert_allclose(mixed, expected()["attention.heads"][1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(pattern.sum(axis=-1), np.broadcast_to(IS_REAL[:, None], pattern.shape[:3]), atol=1e-5)
    assert not np.triu(pattern, k=1).any()


@pytest.mark.thorough
def test_patterns_and_experts_of_some_positions_are_those_of_all() -> None:
    pattern = np.asarray(attention_pattern(make(), TOKENS, LENGTHS, 1))
    some = attention_pattern(make(), TOKENS, LENGTHS, 1, at=[4, 8])
    np.testing.assert_allclose(some, pattern[:, :, [4, 8]], rtol=0, atol=1e-5)
    last = attention_pattern(make(), TOKENS, LENGTHS, 1, at="last")
    np.testing.assert_allclose(last, pattern[[0, 1], :, LENGTHS - 1], rtol=0, atol=1e-5)
    outputs = expert_outputs(make(), TOKENS, LENGTHS, 1, at=[4, 8]).output
    of_last = expert_outputs(make(), TOKENS, LENGTHS, 1).output
    np.testing.assert_allclose(of_last, [outputs[0, 1], outputs[1, 0]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mesh", "rules", "quantized"), or_thorough(CASES, CASES[2:]), ids=label)
def test_experts_by_themselves_are_the_reference_s(
    mesh: tuple[int, int], rules: ShardingRules, quantized: bool
) -> None:
    """And their sum, weighted by their shares, is what the layer's last norm is given."""
    model, layer, positions = make(mesh, rules, quantized=quantized), 1, [1, 3]
    weights, seen = reference.unpack_weights(model), expected(quantized=quantized)
    found = expert_outputs(model, TOKENS, LENGTHS, layer, at=positions)
    assert repr(found).startswith("ExpertOutputs(experts=int32[2,2,2")
    np.testing.assert_array_equal(found.experts, seen["router.experts"][layer][:, positions])
    np.testing.assert_allclose(found.shares, seen["router.probabilities"][layer][:, positions], atol=1e-4)
    stream = seen["stream.mid"][layer][:, positions]
    x = normed(stream, weights[f"layers.{layer}.pre_feed_forward_norm.scale"])
    gate, up, down = (weights[f"layers.{layer}.feed_forward.{name}"] for name in ("gate", "up", "down"))
    for place in np.ndindex(found.experts.shape):
        expert = int(found.experts[place])
        inputs = x[place[:2]] @ gate[expert]
        activated = 0.5 * inputs * (1 + np.tanh(np.sqrt(2 / np.pi) * (inputs + 0.044715 * inputs**3)))
        hidden = activated * (x[place[:2]] @ up[expert])
        np.testing.assert_allclose(found.hidden[place], hidden, rtol=0, atol=2e-4)
        np.testing.assert_allclose(found.output[place], hidden @ down[expert], rtol=0, atol=2e-4)
    mixed = (np.asarray(found.output) * np.asarray(found.shares)[..., None]).sum(axis=2)
    out = normed(mixed, weights[f"layers.{layer}.post_feed_forward_norm.scale"])
    np.testing.assert_allclose(out, seen["feed_forward.out"][layer][:, positions], rtol=0, atol=2e-3)


def normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + CONFIG.norm_eps) * scale


def test_a_dense_model_has_no_experts_to_tell_apart() -> None:
    with pytest.raises(ValueError, match="this model is dense: it has no router"):
        expert_outputs(dense(), TOKENS, LENGTHS, 0)
