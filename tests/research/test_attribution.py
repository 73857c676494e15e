"""What each part adds to a logit is what the float64 reference has there, and the parts sum to the logit."""

import numpy as np
import pytest
from builders import EXPERT, TENSOR, label, or_thorough
from looked_into import CONFIG, LENGTHS, TOKENS, make

from grokjax import ShardingRules, reference
from grokjax.research import LogitDifference, attribute_logits

CASES = [((1, 1), TENSOR, False), ((2, 4), TENSOR, True), ((2, 4), EXPERT, False)]
TARGETS, OTHER = np.array([7, 200]), 9


@pytest.mark.parametrize(("mesh", "rules", "quantized"), or_thorough(CASES, CASES[:1]), ids=label)
def test_parts_of_a_logit_are_the_reference_s_and_sum_to_it(
    mesh: tuple[int, int], rules: ShardingRules, quantized: bool
) -> None:
    model = make(mesh, rules, quantized=quantized)
    found = attribute_logits(model, TOKENS, LENGTHS, LogitDifference(TARGETS, OTHER))
    weights = reference.unpack_weights(model)
    for row, (target, length) in enumerate(zip(TARGETS, LENGTHS, strict=True)):
        seen = reference.forward(weights, CONFIG, TOKENS[row, :length])
        stream = seen.captures["layer_out"][-1, -1]
        direction = weights["embedding.table"][target] - weights["embedding.table"][OTHER]
        direction *= CONFIG.output_multiplier * weights["final_norm.scale"] / size_of(stream)
        close = {"rtol": 0, "atol": 1e-4}
        np.testing.assert_allclose(found.embedding[row], seen.captures["embed"][-1] @ direction, **close)
        np.testing.assert_allclose(found.attention[:, row], seen.captures["norm1_out"][:, -1] @ direction, **close)
        np.testing.assert_allclose(found.feed_forward[:, row], seen.captures["norm3_out"][:, -1] @ direction, **close)
        np.testing.assert_allclose(found.total[row], seen.logits[-1, target] - seen.logits[-1, OTHER], **close)
        for layer in range(CONFIG.num_layers):
            heads = seen.captures["attn_heads"][layer, -1].reshape(CONFIG.num_heads, 1, -1)
            output = weights[f"layers.{layer}.attention.output"].reshape(CONFIG.num_heads, -1, CONFIG.model_dim)
            scale = weights[f"layers.{layer}.post_attention_norm.scale"] / size_of(seen.captures["attn_out"][layer, -1])
            np.testing.assert_allclose(found.heads[layer, row], (heads @ output)[:, 0] * scale @ direction, **close)
    parts = found.embedding + found.attention.sum(axis=0) + found.feed_forward.sum(axis=0)
    np.testing.assert_allclose(parts, found.total, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.heads.sum(axis=-1), found.attention, rtol=0, atol=1e-4)


def size_of(x: np.ndarray) -> np.floating:
    return np.sqrt((x**2).mean() + CONFIG.norm_eps)


def test_a_difference_is_of_one_token_or_of_each_row_s() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(2, 6) ** 2
    assert LogitDifference(5).by_row(logits).tolist() == [25, 121]
    assert LogitDifference([5, 0], 1).by_row(logits).tolist() == [24, -13]
    assert LogitDifference([5, 0], 1)(logits) == 11


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (LogitDifference(264), r"target is 264: ids of the vocabulary are from 0 to 263"),
        (LogitDifference(5, [1, 2, 3]), r"against is \[1, 2, 3\]: give one token's id, or one for each of 2 rows"),
        (LogitDifference(0.5), "target is 0.5: give one token's id"),
        (7, "7 was given: give a LogitDifference"),
    ],
)
def test_a_logit_that_is_not_there_is_refused(difference: LogitDifference, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_logits(make(), TOKENS, LENGTHS, difference)
