"""What a comparison of two models counts is what the float64 reference has of both, padding left out."""

import numpy as np
import pytest
from builders import EXPERT, TENSOR, label, or_thorough
from looked_into import CONFIG, IS_REAL, LENGTHS, TOKENS, dense, expected, make

from grokjax import Grok, ShardingRules, make_mesh, reference
from grokjax.model import abstract_model, named_parameters, with_values
from grokjax.research import Comparison, compare, drop_experts, edit
from grokjax.sharding import Partitioner

MANY = np.tile(TOKENS, (32, 1)), np.tile(LENGTHS, 32)  # so many that their logits are compared in several chunks
MESHES = [((1, 1), TENSOR), ((2, 4), EXPERT)]


def expected_of(model: Grok) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the reference has of all real tokens: the routers' logits and experts, and the logits."""
    weights = reference.unpack_weights(model)
    rows = [reference.forward(weights, CONFIG, TOKENS[i, :length]) for i, length in enumerate(LENGTHS)]
    routers = (
        np.concatenate([row.captures[name] for row in rows], axis=1) for name in ("router_logits", "router_index")
    )
    return *routers, np.concatenate([row.logits for row in rows])


def divergence(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    p, q = (np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True) for logits in (one, two))
    return (p * np.log(p / q)).sum(axis=-1)


@pytest.mark.parametrize(("mesh", "rules"), or_thorough(MESHES, MESHES[:1]), ids=label)
def test_a_comparison_is_a_count_and_adds(mesh: tuple[int, int], rules: ShardingRules) -> None:
    """A model agrees with itself, and with one of another router and last norm as far as the reference does."""
    model, random = make(mesh, rules), np.random.default_rng(4)
    changed = {
        name: param.get_value() + random.normal(0, 0.2, param.shape).astype(np.float32)
        for name, param in named_parameters(model).items()
        if name in ("layers.feed_forward.router", "final_norm.scale")
    }
    other, batches = with_values(model, changed), [MANY] * 2
    found = sum((compare(model, other, *batch) for batch in batches), Comparison.zero(CONFIG))
    (routers, experts, logits), (other_routers, other_experts, other_logits) = expected_of(model), expected_of(other)
    assert found.tokens == 64 * LENGTHS.sum()
    np.testing.assert_array_equal(found.same_first, 64 * (experts[..., 0] == other_experts[..., 0]).sum(axis=1))
    is_same = (np.sort(experts, axis=-1) == np.sort(other_experts, axis=-1)).all(axis=-1)
    assert 0 < is_same.sum() < is_same.size
    np.testing.assert_array_equal(found.same_experts, 64 * is_same.sum(axis=1))
    np.testing.assert_allclose(found.router_divergence, 64 * divergence(routers, other_routers).sum(axis=1), rtol=1e-4)
    assert found.same_token == 64 * (logits.argmax(axis=-1) == other_logits.argmax(axis=-1)).sum()
    np.testing.assert_allclose(found.divergence, 64 * divergence(logits, other_logits).sum(), rtol=1e-3)
    check_that_all_agree(compare(model, model, *MANY), num_tokens=32 * LENGTHS.sum())


@pytest.mark.thorough
def test_a_dense_model_agrees_with_itself() -> None:
    check_that_all_agree(compare(dense(), dense(), TOKENS, LENGTHS), num_tokens=LENGTHS.sum())


def check_that_all_agree(found: Comparison, *, num_tokens: int) -> None:
    assert found.tokens == found.same_token == num_tokens
    assert (found.same_first == found.tokens).all()
    assert (found.same_experts == found.tokens).all()
    np.testing.assert_allclose(found.router_divergence, 0, atol=1e-4)
    np.testing.assert_allclose(found.divergence, 0, atol=1e-4)


@pytest.mark.thorough
def test_an_edited_model_differs_from_its_edit_on() -> None:
    """An expert that the second model rules out is one that the first expected."""
    model, chosen = make(), expected()["router.experts"][1][IS_REAL]
    dropped = chosen[0, 0].item()
    found = compare(model, edit(model, drop_experts({1: [dropped]})), TOKENS, LENGTHS)
    was_chosen = (chosen == dropped).any(axis=-1)
    assert found.same_experts.tolist() == [LENGTHS.sum(), (~was_chosen).sum()]
    assert found.router_divergence.tolist() == [pytest.approx(0, abs=1e-6), np.inf]
    assert 0 < found.divergence < np.inf


def test_models_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="the models have num_layers=2 and num_layers=1: compare two of the same"):
        compare(make(), dense(), TOKENS, LENGTHS)
    elsewhere = Partitioner(make_mesh((2, 4)), TENSOR)
    with pytest.raises(ValueError, match=r"on meshes of \{'data': 1, 'model': 1\} and \{'data': 2, 'model': 4\}"):
        compare(make(), abstract_model(CONFIG, elsewhere, dtype=np.float32, quantized=False), TOKENS, LENGTHS)
    with pytest.raises(ValueError, match="ones that init or load makes, and one is a ndarray"):
        compare(make(), TOKENS, LENGTHS, LENGTHS)
    with pytest.raises(ValueError, match="lengths"):
        compare(make(), make(), TOKENS, [10, 5])
