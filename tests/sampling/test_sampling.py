"""The sampler against the release's recorded results, against a NumPy definition, and at its edges."""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_pure
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grokjax.sampling import (
    SampleOutput,
    SampleSettings,
    filters,
    log_probs_of,
    min_p_filter,
    row_keys,
    sample_token,
    top_k_filter,
    top_p_filter,
)

EXCLUDED = np.float32(-1e10)
sample = jax.jit(sample_token, static_argnames="num_top")
TOP_P_CASES = [case for case in load_pure().tables["top_p"] if case["dtype"] == "float32"]
SAMPLE_CASES = [case for case in load_pure().tables["sample"] if case["dtype"] == "float32"]
LARGE_CASES = [case for case in load_pure().tables["top_p_131072"] if case["dtype"] == "float32"]


def normal(*shape: int, scale: float = 2.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def keys_of(batch_size: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), batch_size)


def draw_many(logits: np.ndarray, draws: int, **controls: object) -> SampleOutput:
    """`draws` independent draws from one row of logits [V]."""
    batch = jnp.broadcast_to(logits, (draws, len(logits)))
    return sample(keys_of(draws), batch, SampleSettings.create(draws, **controls))


@contextlib.contextmanager
def threefry_partitionable(enabled: bool) -> Iterator[None]:
    before = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_threefry_partitionable", before)


def defined_top_p(logits: np.ndarray, top_p: float) -> np.ndarray:
    """The definition in float64 for one row: which tokens survive [V] bool."""
    ascending = np.sort(logits.astype(np.float64))
    mass = np.cumsum(softmax(ascending))
    reached = np.flatnonzero(mass >= 1 - top_p) if top_p > 0 else []
    return logits >= ascending[reached[0] if len(reached) else -1]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# ---- the release's results -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TOP_P_CASES, ids=lambda case: case["note"])
def test_top_p_filter_gives_the_release_s_results(case: dict) -> None:
    arrays = load_pure().arrays
    logits, top_p, expected = (arrays[f"topp{case['i']}_{name}"] for name in ("logits", "p", "jit"))
    result = np.asarray(jax.jit(top_p_filter)(logits, top_p[..., 0]))
    # Where the release filters nothing (its sum never reaches 1 - p), ours keeps the top token: see the next test.
    sound = (top_p[..., 0] > 0) | (expected == EXCLUDED).any(axis=-1)
    np.testing.assert_array_equal(result[sound], expected[sound])
    assert sound.sum() >= sound.size - 2


@pytest.mark.parametrize("case", TOP_P_CASES, ids=lambda case: case["note"])
def test_top_p_of_zero_or_less_keeps_only_the_top_token_and_its_ties(case: dict) -> None:
    arrays = load_pure().arrays
    logits, top_p = arrays[f"topp{case['i']}_logits"], arrays[f"topp{case['i']}_p"][..., 0]
    kept = np.asarray(jax.jit(top_p_filter)(logits, top_p)) != EXCLUDED
    at_most_zero = top_p <= 0
    np.testing.assert_array_equal(kept[at_most_zero], (logits == logits.max(axis=-1, keepdims=True))[at_most_zero])


@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: f"{case['recipe'][22:26]}-{case['p']}")
def test_top_p_keeps_the_exact_count_at_the_full_vocabulary(case: dict) -> None:
    seed, scale = re.search(r"default_rng\((\d+)\).*\*([\d.]+) cast", case["recipe"]).groups()
    logits = np.random.default_rng(int(seed)).standard_normal((1, 131072), dtype=np.float32) * np.float32(scale)
    kept = np.asarray(top_p_filter(logits, case["p"])) != EXCLUDED
    assert kept.sum() == case["exact_float64_kept"] == case["kept_jit"]


@pytest.mark.parametrize("typed", [False, True], ids=["raw_keys", "typed_keys"])
@pytest.mark.parametrize("case", SAMPLE_CASES, ids=lambda case: f"{case['i']}-{case['rng']}")
def test_sample_token_gives_the_release_s_tokens_for_its_keys(case: dict, typed: bool) -> None:
    arrays, name = load_pure().arrays, case["i"]
    temperature, top_p, mask = (arrays[f"{name}_{field}"] for field in ("temperature", "nucleus_p", "mask"))
    keys = jnp.asarray(arrays[f"{name}_keys"])
    with threefry_partitionable(case["rng"] == "part"):
        output = sample(
            jax.random.wrap_key_data(keys) if typed else keys,
            arrays[f"{name}_logits"][:, 0],
            SampleSettings.create(case["B"], temperature=temperature, top_p=top_p, mask=mask),
            num_top=8,
        )
    for kind in ("jit", "eager"):
        np.testing.assert_array_equal(output.token_id, arrays[f"{name}_{kind}_token_id"][:, 0])
        np.testing.assert_allclose(output.prob, arrays[f"{name}_{kind}_prob"][:, 0], rtol=2e-6)
        probs, token_ids = (arrays[f"{name}_{kind}_top_k_{field}"] for field in ("probs", "token_ids"))
        np.testing.assert_allclose(output.top_k_probs, probs, rtol=5e-6, atol=1e-12)
        fillers = probs == 0
        np.testing.assert_array_equal(np.asarray(output.top_k_token_ids)[~fillers], token_ids[~fillers])


def test_the_release_s_degenerate_settings_give_its_intended_token() -> None:
    logits = load_pure().arrays["degenerate_logits"][:, 0]
    cases = [case for case in load_pure().tables["sample_degenerate"] if case["temperature"] >= 0]
    for case in cases:
        settings = SampleSettings.create(1, temperature=case["temperature"], top_p=case["nucleus_p"])
        output = sample(keys_of(1), logits, settings, num_top=8)
        assert output.token_id.item() == case["argmax"]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))
    assert len(cases) == 10


@pytest.mark.parametrize(("partitionable", "name"), [(False, "legacy"), (True, "part")])
def test_the_release_s_keys_and_noise_can_be_reproduced(partitionable: bool, name: str) -> None:
    recorded = {field: load_pure().arrays[f"rng_{name}_{field}"] for field in ("prefill_rng_", "chain_B3", "use_B3")}
    with threefry_partitionable(partitionable):
        first_use = jax.random.split(jax.random.PRNGKey(42))[1]
        noise = jax.random.gumbel(first_use, (1, 64))
        halves = jax.vmap(jax.vmap(jax.random.split))(jnp.asarray(recorded["chain_B3"][:-1]))  # [steps, B, 2, 2]
    np.testing.assert_array_equal(first_use, recorded["prefill_rng_"])
    np.testing.assert_array_equal(noise, load_pure().arrays[f"rng_{name}_gumbel_float32"])
    np.testing.assert_array_equal(halves[:, :, 0], recorded["chain_B3"][1:])
    np.testing.assert_array_equal(halves[:, :, 1], recorded["use_B3"])


# ---- the filters against their definitions ---------------------------------------------------------------------------

# A few lengths only, each of which compiles once; eighths, so that ties happen.
rows_of_logits = st.sampled_from([1, 5, 40]).flatmap(
    lambda size: st.lists(st.integers(-60, 60), min_size=size, max_size=size).map(
        lambda eighths: np.asarray(eighths, np.float32) / 8
    )
)
fractions = st.integers(0, 64).map(lambda n: n / 64)


@given(logits=rows_of_logits, top_p=fractions)
def test_top_p_is_its_definition(logits: np.ndarray, top_p: float) -> None:
    kept = np.asarray(top_p_filter(logits, top_p)) != EXCLUDED
    low, high = (defined_top_p(logits, top_p + error) for error in (-1e-6, 1e-6))
    exact = defined_top_p(logits, top_p)
    # Within float32 rounding of a boundary either neighbour is right, except at the ends, which are exact.
    accepted = [exact] if top_p in (0.0, 1.0) else [low, exact, high]
    assert any(np.array_equal(kept, candidate) for candidate in accepted)


@given(logits=rows_of_logits, top_k=st.integers(0, 45))
def test_top_k_is_its_definition(logits: np.ndarray, top_k: int) -> None:
    kept = np.asarray(top_k_filter(logits, top_k)) != EXCLUDED
    larger = (logits[None, :] > logits[:, None]).sum(axis=1)
    np.testing.assert_array_equal(kept, larger < (top_k or len(logits)))


@given(logits=rows_of_logits, min_p=fractions)
def test_min_p_is_its_definition(logits: np.ndarray, min_p: float) -> None:
    kept = np.asarray(min_p_filter(logits, min_p)) != EXCLUDED
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    clear = (np.abs(ratio - min_p) > 1e-5) | (ratio == 1)
    np.testing.assert_array_equal(kept[clear], (ratio >= min_p)[clear])


@given(
    logits=rows_of_logits,
    temperature=st.sampled_from([0.0, 1e-40, 1e-30, 1e-6, 0.3, 1.0, 50.0, 1e38]),
    top_p=fractions,
    top_k=st.integers(0, 45),
    min_p=fractions,
    seed=st.integers(0, 2**31 - 1),
)
def test_any_settings_draw_a_token_with_a_probability(logits: np.ndarray, seed: int, **controls: float) -> None:
    output = sample(keys_of(1, seed), logits[None], SampleSettings.create(1, **controls), num_top=len(logits))
    assert 0 <= output.token_id.item() < len(logits)
    assert 0 < output.prob.item() <= 1
    np.testing.assert_allclose(output.top_k_probs.sum(), 1, rtol=1e-5)
    assert (np.diff(output.top_k_probs[0]) <= 0).all()


def test_filters_take_bfloat16_and_leading_axes() -> None:
    logits = jnp.asarray(normal(3, 2, 32), jnp.bfloat16)
    for filter_, value in ((top_p_filter, 0.5), (top_k_filter, 4), (min_p_filter, 0.1)):
        one = filter_(logits, value)
        per_row = filter_(logits, np.full((3, 2), value, np.asarray(value).dtype))
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one.astype(jnp.float32), per_row.astype(jnp.float32))
        exact = np.asarray(filter_(logits.astype(jnp.float32), value)) != EXCLUDED
        np.testing.assert_array_equal(np.asarray(one.astype(jnp.float32)) > -1e9, exact)


# ---- sample_token ----------------------------------------------------------------------------------------------------


def test_temperature_zero_is_greedy_whatever_the_key() -> None:
    logits = normal(6, 40)
    greedy = SampleSettings.create(6, temperature=0.0)
    for seed in range(3):
        output = sample(keys_of(6, seed), logits, greedy, num_top=3)
        np.testing.assert_array_equal(output.token_id, logits.argmax(axis=-1))
        np.testing.assert_allclose(output.prob, softmax(logits).max(axis=-1), rtol=1e-5)
        np.testing.assert_array_equal(output.top_k_token_ids, np.argsort(-logits, axis=-1)[:, :3])


def test_greedy_ties_go_to_the_lowest_token() -> None:
    output = sample(keys_of(1), np.zeros((1, 5), np.float32), SampleSettings.create(1, temperature=0.0))
    assert output.token_id.item() == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-37, 1e-38, 1e-45])
def test_a_tiny_temperature_is_greedy_in_effect_without_nan(temperature: float) -> None:
    logits = normal(4, 64, scale=20.0)
    mask = np.ones_like(logits, bool)
    mask[np.arange(4), logits.argmax(axis=-1)] = False
    output = sample(keys_of(4), logits, SampleSettings.create(4, temperature=temperature, mask=mask), num_top=2)
    np.testing.assert_array_equal(output.token_id, np.where(mask, logits, -np.inf).argmax(axis=-1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))


@pytest.mark.parametrize("temperature", [0.0, 1e-12, 1.0, 1e30])
def test_a_masked_token_is_never_drawn(temperature: float) -> None:
    logits = np.full(32, 50.0, np.float32)
    allowed = np.zeros(32, bool)
    allowed[[3, 17]] = True
    logits[allowed] = [-40.0, -40.5]  # far below every masked logit
    output = draw_many(logits, 64, temperature=temperature, mask=allowed)
    assert set(np.asarray(output.token_id).tolist()) <= {3, 17}
    assert (np.asarray(output.prob) > 0.1).all()


def test_draws_follow_the_filtered_distribution() -> None:
    logits, draws = normal(12, seed=3), 4000
    output = draw_many(logits, draws, temperature=0.8, top_p=0.9, top_k=9, min_p=0.01)
    scaled = logits / np.float32(0.8)
    filtered = np.where(np.asarray(top_k_filter(scaled, 9)) > -1e9, scaled, EXCLUDED)
    filtered = np.asarray(top_p_filter(min_p_filter(filtered, 0.01), 0.9))
    expected = softmax(filtered)
    counts = np.bincount(output.token_id, minlength=12)
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    chi_squared = ((counts - draws * expected)[likely] ** 2 / (draws * expected[likely])).sum()
    assert chi_squared < 30  # 99.9% quantile of 8 degrees of freedom is 26
    np.testing.assert_allclose(output.prob, expected[np.asarray(output.token_id)], rtol=1e-5)


def test_ranks_of_draws_are_uniform_over_the_cumulative_distribution() -> None:
    logits, draws = normal(200, seed=4), 4000
    tokens = np.asarray(draw_many(logits, draws).token_id)
    probs = softmax(logits)
    below = np.cumsum(probs) - probs
    noise = np.random.default_rng(0).uniform(size=draws)
    uniform = np.sort(below[tokens] + noise * probs[tokens])
    kolmogorov_smirnov = np.abs(uniform - (np.arange(draws) + 0.5) / draws).max()
    assert kolmogorov_smirnov < 1.95 / np.sqrt(draws)  # 99.9%


def test_rare_tokens_of_a_bfloat16_model_are_reached() -> None:
    # In bfloat16 the noise has 128 values and one near-certain token would hide 256 rare ones, or drown in them.
    logits = jnp.concatenate([jnp.full((1,), 8.0), jnp.zeros((256,))]).astype(jnp.bfloat16)
    tokens = np.asarray(draw_many(logits, 2000).token_id)
    expected = 256 / (256 + np.exp(8.0))
    assert abs((tokens > 0).mean() - expected) < 4 * np.sqrt(expected / 2000)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits, keys = normal(4, 64), keys_of(4)
    controls = {
        "temperature": np.array([0.0, 0.7, 1.0, 1.3]),
        "top_p": np.array([1.0, 0.9, 1.0, 0.5]),
        "top_k": np.array([0, 5, 0, 0]),
        "min_p": np.array([0.0, 0.0, 0.05, 0.0]),
    }
    together = sample(keys, logits, SampleSettings.create(4, **controls), num_top=4)
    for row in range(4):
        own = SampleSettings.create(1, **{name: values[row] for name, values in controls.items()})
        alone = sample(keys[row : row + 1], logits[row : row + 1], own, num_top=4)
        jax.tree.map(lambda whole, part, row=row: np.testing.assert_array_equal(whole[row], part[0]), together, alone)


def test_an_inactive_row_is_all_zeros_and_changes_nothing_else() -> None:
    logits, keys = normal(3, 64), keys_of(3)
    full = sample(keys, logits, SampleSettings.create(3), num_top=2)
    some = SampleSettings.create(3, active=np.array([True, False, True]), top_k=np.array([0, 7, 0]))
    output = sample(keys, logits, some, num_top=2)
    for name in ("token_id", "prob", "logprob", "top_k_token_ids", "top_k_probs"):
        np.testing.assert_array_equal(getattr(output, name)[1], 0)
        np.testing.assert_array_equal(getattr(output, name)[::2], getattr(full, name)[::2])


def test_logprob_is_the_model_s_own_and_top_k_is_only_made_when_asked() -> None:
    logits = normal(3, 64)
    output = sample(keys_of(3), logits, SampleSettings.create(3, temperature=0.5, top_k=2))
    expected = np.log(softmax(logits))[np.arange(3), np.asarray(output.token_id)]
    np.testing.assert_allclose(output.logprob, expected, rtol=1e-5)
    assert output.top_k_token_ids is None
    assert output.top_k_probs is None


def test_log_probs_of_scores_a_text() -> None:
    logits, token_ids = normal(2, 5, 16), np.arange(10).reshape(2, 5)
    expected = np.take_along_axis(np.log(softmax(logits)), token_ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_probs_of(jnp.asarray(logits), jnp.asarray(token_ids)), expected, rtol=1e-5)


def test_output_has_the_documented_dtypes_and_shapes() -> None:
    output = sample(keys_of(2), jnp.zeros((2, 9), jnp.bfloat16), SampleSettings.create(2), num_top=3)
    described = jax.tree.map(lambda leaf: (leaf.dtype.name, leaf.shape), vars(output))
    assert described == {
        "token_id": ("int32", (2,)),
        "prob": ("float32", (2,)),
        "logprob": ("float32", (2,)),
        "top_k_token_ids": ("int32", (2, 3)),
        "top_k_probs": ("float32", (2, 3)),
    }


def test_of_equal_logits_the_first_is_best_and_what_is_not_finite_gives_a_token() -> None:
    logits = np.array([[0, 2, 2, 1], [np.nan, 0, 1, np.nan], [-np.inf, -np.inf, np.inf, 0], [np.nan] * 4], np.float32)
    token_ids = sample(keys_of(4), logits, SampleSettings.create(4, temperature=0)).token_id
    assert token_ids[0] == 1
    assert token_ids.min() >= 0
    assert token_ids.max() < 4


def unconditional_primitives(jaxpr: Any) -> set[str]:
    """Names of the operations that run whatever the values are: those not inside a `cond`."""
    outside = [eqn for eqn in jaxpr.eqns if eqn.primitive.name != "cond"]
    inner = [getattr(value, "jaxpr", value) for eqn in outside for value in eqn.params.values()]
    nested = (unconditional_primitives(value) for value in inner if hasattr(value, "eqns"))
    return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*nested)


def test_ranks_and_random_numbers_only_inside_a_condition_and_nothing_is_sorted() -> None:
    traced = jax.make_jaxpr(sample_token)(keys_of(2), normal(2, 32), SampleSettings.create(2))
    assert "reduce_max" in unconditional_primitives(traced.jaxpr)  # as of what the temperature divides
    assert not {"scan", "while", "random_bits"} & unconditional_primitives(traced.jaxpr)
    assert " = random_bits[" in str(traced)
    assert " = scan[" in str(traced)
    assert " = sort[" not in str(traced)


@pytest.mark.parametrize(
    ("settings", "searches"),
    [
        ({}, 0),
        ({"min_p": 0.1}, 0),
        ({"top_k": [0, 5]}, 1),
        ({"top_p": [1.0, 0.5]}, 1),
        ({"top_k": 5, "top_p": 0.5}, 2),
        ({"top_k": 5, "top_p": 0.5, "active": [False, False]}, 0),
    ],
)
def test_ranks_are_looked_for_only_if_an_active_row_asks(
    settings: dict[str, Any], searches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_threshold, calls = filters.find_threshold, []

    def count(*arrays: jax.Array) -> jax.Array:
        calls.append(None)
        return find_threshold(*arrays)

    monkeypatch.setattr(filters, "find_threshold", count)
    with jax.disable_jit():  # so that each search is a call
        sample_token(keys_of(2), normal(2, 32), SampleSettings.create(2, **settings))
    assert len(calls) == searches


@pytest.mark.parametrize("spec", [("rows", None), (None, "vocab"), ("rows", "vocab")])
def test_sharded_logits_give_the_same_tokens(spec: tuple[str | None, str | None]) -> None:
    logits, keys = normal(4, 64), keys_of(4)
    controls = SampleSettings.create(4, top_p=0.9, top_k=20, mask=np.arange(64) > 3)
    expected = sample(keys, logits, controls, num_top=4)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("rows", "vocab"))
    sharded = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(*spec)))
    output = sample(keys, sharded, controls, num_top=4)
    np.testing.assert_array_equal(output.token_id, expected.token_id)
    np.testing.assert_array_equal(output.top_k_token_ids, expected.top_k_token_ids)
    np.testing.assert_allclose(output.prob, expected.prob, rtol=1e-5)


@pytest.mark.parametrize("rows", ["rows", None])
def test_each_device_draws_for_its_part_of_the_vocabulary_as_one_does_for_all(rows: str | None) -> None:
    """A greedy row, one drawn from all, and two with filters."""
    logits, keys = normal(4, 64), keys_of(4)
    controls = SampleSettings.create(4, temperature=[0, 1, 1, 2], top_k=[0, 0, 5, 0], top_p=[1, 1, 0.8, 0.9])
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("rows", "vocab"))
    divided, whole = (NamedSharding(mesh, PartitionSpec(rows, vocab)) for vocab in ("vocab", None))
    on_parts = jax.jit(functools.partial(sample_token, num_top=4, divided=divided, whole=whole))
    for settings in (SampleSettings.create(4), controls):
        expected = sample(keys, logits, settings, num_top=4)
        found = on_parts(keys, jax.device_put(logits, divided), settings)
        np.testing.assert_array_equal(found.token_id, expected.token_id)
        np.testing.assert_array_equal(found.top_k_token_ids, expected.top_k_token_ids)
        np.testing.assert_allclose(found.prob, expected.prob, rtol=1e-5)


def test_row_keys_fold_the_position_into_the_request_s_key() -> None:
    positions = jnp.array([7, 0, 7], jnp.int32)
    typed = jnp.stack([jax.random.key(1), jax.random.key(1), jax.random.key(2)])
    expected = jnp.stack([jax.random.fold_in(typed[row], [7, 0, 7][row]) for row in range(3)])
    raw = row_keys(jax.random.key_data(typed), positions)
    np.testing.assert_array_equal(jax.random.key_data(row_keys(typed, positions)), jax.random.key_data(expected))
    np.testing.assert_array_equal(raw, jax.random.key_data(expected))
