"""How probable the tokens of texts are, against the logits of `forward` and NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import EXPERT, FULLY, SMALL, TENSOR, label, or_thorough, random_model

from grokjax import Grok, GrokConfig, KVCache, Scores, ShardingRules, forward, make_mesh, prefill, score
from grokjax.model import abstract_model, with_values
from grokjax.planning import read_program
from grokjax.sharding import Partitioner

CONFIG = SMALL.replace(vocab_size=1304)  # three blocks of the vocabulary, the last of which overlaps
LENGTHS = np.array([32, 5])
EQUAL = [9, 700, 1300]
TOKENS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 32))


@functools.cache
def make(mesh: tuple[int, int] = (1, 1), rules: ShardingRules = TENSOR, *, quantized_table: bool = False) -> Grok:
    """A float32 model in whose table the tokens of `EQUAL` have one row, and whose logits differ more."""
    model = random_model(
        CONFIG, mesh=make_mesh(mesh), rules=rules, dtype=jnp.float32, quantized=False, quantized_table=quantized_table
    )
    if quantized_table:
        return model
    table = model.embedding.table.get_value()
    rows = np.array(table) * 4
    rows[EQUAL] = rows[EQUAL[0]]
    return with_values(model, {"embedding.table": jax.device_put(rows, table.sharding)})


def by_hand(logits: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> Scores[np.ndarray]:
    """The scores from logits [B, T, V] by float64."""
    wide = logits.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide - wide.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True))
    logprobs -= wide.max(axis=-1, keepdims=True)
    found = Scores(np.zeros(tokens.shape), np.full(tokens.shape, -1), np.zeros(tokens.shape), np.full(tokens.shape, -1))
    for row, length in enumerate(lengths):
        for t in range(1, length):
            before, token = logprobs[row, t - 1], tokens[row, t]
            found.logprob[row, t] = before[token]
            found.rank[row, t] = (logits[row, t - 1] > logits[row, t - 1, token]).sum()
            found.entropy[row, t] = -(np.exp(before) * before).sum()
            found.top_id[row, t] = logits[row, t - 1].argmax()
    return found


def check(model: Grok, tokens: np.ndarray = TOKENS, lengths: np.ndarray = LENGTHS) -> None:
    found = jax.device_get(score(model, tokens, lengths))
    expected = by_hand(np.asarray(forward(model, tokens)), tokens, lengths)
    for name in ("logprob", "entropy"):
        assert getattr(found, name).dtype == np.float32
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)
    for name in ("rank", "top_id"):
        assert getattr(found, name).dtype == np.int32
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


MESHES = [((1, 1), TENSOR), ((1, 8), EXPERT), ((2, 4), FULLY)]


@pytest.mark.parametrize(("mesh", "rules"), or_thorough(MESHES, [((1, 1), TENSOR), ((2, 4), FULLY)]), ids=label)
def test_scores_are_those_of_all_logits(mesh: tuple[int, int], rules: ShardingRules) -> None:
    check(make(mesh, rules))


@pytest.mark.parametrize("mesh", or_thorough([((1, 1),), ((2, 4),)], [((1, 1),)]), ids=str)
def test_scores_with_an_int8_table_are_those_of_all_logits(mesh: tuple[int, int]) -> None:
    check(make(mesh, quantized_table=True))


@pytest.mark.parametrize(
    ("mesh", "rules"), or_thorough([((1, 1), TENSOR), ((1, 8), EXPERT)], [((1, 1), TENSOR)]), ids=label
)
def test_tokens_that_are_as_probable_have_one_rank_and_the_lowest_is_named(
    mesh: tuple[int, int], rules: ShardingRules
) -> None:
    model, texts = make(mesh, rules), TOKENS[[0, 0]]
    texts[:, 31] = 9, 1300
    found = jax.device_get(score(model, texts, [32, 32]))
    assert len(set(found.rank[:, 31].tolist())) == len(set(found.logprob[:, 31].tolist())) == 1
    table = model.embedding.table.get_value()
    alike = with_values(model, {"embedding.table": jnp.ones_like(table, device=table.sharding)})
    found = jax.device_get(score(alike, texts, [32, 32]))
    assert (found.rank[:, 1:] == 0).all()
    assert (found.top_id[:, 1:] == 0).all()
    np.testing.assert_allclose(found.entropy[:, 1:], np.log(CONFIG.vocab_size), rtol=1e-6)
    np.testing.assert_allclose(found.logprob[:, 1:], -np.log(CONFIG.vocab_size), rtol=1e-6)


EVERY_TOP = [((1, 1), TENSOR, 600), ((2, 4), FULLY, 600)]


@pytest.mark.parametrize(("mesh", "rules", "num_top"), or_thorough(EVERY_TOP, EVERY_TOP[:1]), ids=label)
def test_the_most_probable_tokens_are_those_of_all_logits(
    mesh: tuple[int, int], rules: ShardingRules, num_top: int
) -> None:
    """More of them, too, than a block or a device has tokens of the vocabulary; of equal ones the lowest is first."""
    model = make(mesh, rules)
    found = jax.device_get(score(model, TOKENS, LENGTHS, num_top=num_top))
    logprobs = np.asarray(jax.nn.log_softmax(forward(model, TOKENS)))
    for row, length in enumerate(LENGTHS):
        for t in range(1, length):
            ids, before = found.top_ids[row, t], logprobs[row, t - 1]
            np.testing.assert_allclose(found.top_logprobs[row, t], np.sort(before)[::-1][:num_top], atol=1e-5)
            np.testing.assert_allclose(found.top_logprobs[row, t], before[ids], atol=1e-5)
            assert len(set(ids.tolist())) == num_top
            assert [token for token in ids.tolist() if token in EQUAL] in (EQUAL, EQUAL[:2], EQUAL[:1], [])
        without = np.r_[0, length:32]
        assert (found.top_ids[row, without] == -1).all()
        assert (found.top_logprobs[row, without] == 0).all()
    for name in ("logprob", "rank", "entropy", "top_id"):
        np.testing.assert_array_equal(getattr(found, name), getattr(score(model, TOKENS, LENGTHS), name))


def test_nothing_is_said_of_first_tokens_and_padding() -> None:
    found = jax.device_get(score(make(), TOKENS, LENGTHS))
    for row, length in enumerate(LENGTHS):
        without = np.r_[0, length:32]
        for name, nothing in {"logprob": 0, "rank": -1, "entropy": 0, "top_id": -1}.items():
            assert (getattr(found, name)[row, without] == nothing).all()
    padded = TOKENS.copy()
    padded[1, 5:] = 7  # changes nothing
    for name, field in vars(jax.device_get(score(make(), padded, LENGTHS))).items():
        np.testing.assert_array_equal(field, getattr(found, name))


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("num_top", or_thorough([(0,), (8,)], [(0,)]))
def test_scores_take_no_more_memory_than_a_prefill_and_8_mib(num_top: int) -> None:
    """Of a bfloat16 model whose logits have 64 MiB, and whose table would have 8 in float32."""
    config = GrokConfig.tiny().replace(num_layers=1, vocab_size=32768, max_seq_len=512)
    partitioner = Partitioner.create(config, make_mesh())
    model = abstract_model(config, partitioner, dtype=jnp.bfloat16, quantized=False)
    tokens, lengths = jax.ShapeDtypeStruct((1, 512), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    cache = KVCache.abstract(config, 1, 512, mesh=partitioner.mesh)
    prefilled = jax.jit(prefill, donate_argnames="cache").lower(model, tokens, lengths, cache).compile()
    step = jax.jit(functools.partial(score, num_top=num_top))
    program = read_program(step.lower(model, tokens, lengths).compile())
    assert program.temporary_bytes < read_program(prefilled).temporary_bytes + (8 << 20)
    assert max(value.num_bytes for value in program.values) <= 4 << 20
