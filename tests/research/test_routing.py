"""The router's statistics are a count of what the reference's router does, padding left out."""

import numpy as np
import pytest
from builders import EXPERT, TENSOR, label, or_thorough
from looked_into import CONFIG, IS_REAL, LENGTHS, TOKENS, expected, make

from grokjax import GrokConfig, ShardingRules
from grokjax.research import RouterStats, count_tokens, observe_routing

MESHES = [((1, 1), TENSOR), ((2, 4), EXPERT)]


@pytest.mark.parametrize(("mesh", "rules"), or_thorough(MESHES, MESHES[1:]), ids=label)
def test_statistics_are_a_count_and_add(mesh: tuple[int, int], rules: ShardingRules) -> None:
    model = make(mesh, rules)
    batches = [(TOKENS, LENGTHS)] * 2
    found = sum((observe_routing(model, tokens, lengths) for tokens, lengths in batches), RouterStats.zero(CONFIG))
    logits = expected()["router.logits"][:, IS_REAL]  # [L, tokens, E]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    is_chosen = np.argsort(np.argsort(-probabilities, axis=-1), axis=-1) < CONFIG.experts_per_token
    ranked = -np.sort(-probabilities, axis=-1)
    margin = ranked[..., CONFIG.experts_per_token - 1] - ranked[..., CONFIG.experts_per_token]
    assert sum([found, found]).tokens.tolist() == (2 * found.tokens).tolist()  # without a start
    assert found.tokens.tolist() == [2 * LENGTHS.sum()] * CONFIG.num_layers
    np.testing.assert_array_equal(found.load, 2 * is_chosen.sum(axis=1))
    np.testing.assert_array_equal(found.together, 2 * np.einsum("lte,ltf->lef", *[is_chosen.astype(int)] * 2))
    np.testing.assert_allclose(found.mass, 2 * probabilities.sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(found.entropy, -2 * (probabilities * np.log(probabilities)).sum(axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found.margin, 2 * margin.sum(axis=1), rtol=1e-3)
    wanted = [np.histogram(one, bins=found.margins.shape[1], range=(0, 1))[0] for one in margin]
    np.testing.assert_array_equal(found.margins, 2 * np.array(wanted))


def test_tokens_are_counted_for_the_experts_that_they_choose() -> None:
    experts = expected()["router.experts"]
    wanted = np.zeros((CONFIG.num_layers, CONFIG.num_experts, CONFIG.vocab_size), int)
    for layer in range(CONFIG.num_layers):
        for token, chosen in zip(TOKENS[IS_REAL], experts[layer][IS_REAL], strict=True):
            wanted[layer, chosen, token] += 1
    np.testing.assert_array_equal(count_tokens(make(), TOKENS, LENGTHS, experts), wanted)
    with pytest.raises(ValueError, match=r"experts of shape \(2, 9, 2\) are not those of tokens .* \[n, 2, 9, X\]"):
        count_tokens(make(), TOKENS, LENGTHS, experts[0])


def test_statistics_of_grok_1_are_small_and_only_those_of_one_model_add() -> None:
    zero = RouterStats.zero(GrokConfig.grok_1())
    assert sum(part.nbytes for part in vars(zero).values()) < 25_000
    assert repr(zero).startswith("RouterStats(tokens=int32[64], load=int32[64,8]")
    with pytest.raises(
        ValueError, match=r"load=int32\[64,8\].* and RouterStats.* do not add: take those of models of one size"
    ):
        zero + RouterStats.zero(CONFIG)
