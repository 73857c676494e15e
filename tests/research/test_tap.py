"""What taps read is what the float64 reference has, on every mesh, in every kind of call."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import EXPERT, FULLY, ROOT, TENSOR, label, or_thorough, random_model
from looked_into import COMPILED, CONFIG, LENGTHS, TOKENS, dense, expected, make, real

from grokjax import KVCache, ShardingRules, forward, make_mesh, prefill
from grokjax.model import abstract_model
from grokjax.planning import read_program
from grokjax.research import SITES, At, Tap, observe, observe_step
from grokjax.sharding import Partitioner

EVERY = {site: Tap(site) for site in SITES}
CASES = [
    ((1, 1), TENSOR, False),
    ((1, 1), TENSOR, True),
    ((1, 8), EXPERT, False),
    ((1, 8), FULLY, True),
    ((2, 4), TENSOR, False),
    ((2, 4), EXPERT, True),
]
CHOSEN = [((1, 1), TENSOR, False), ((2, 4), EXPERT, True)]


def check(seen: dict[str, Any], wanted: dict[str, np.ndarray]) -> None:
    for site, values in wanted.items():
        np.testing.assert_allclose(
            real(site, seen[site]), values, rtol=0, atol=2e-5 * np.abs(values).max(), err_msg=site
        )


@pytest.mark.parametrize(("mesh", "rules", "quantized"), or_thorough(CASES, CHOSEN), ids=label)
def test_every_site_is_the_reference_s(mesh: tuple[int, int], rules: ShardingRules, quantized: bool) -> None:
    model = make(mesh, rules, quantized=quantized)
    logits, seen = observe(model, TOKENS, LENGTHS, EVERY)
    assert set(seen) == set(SITES)
    check(seen, expected(quantized=quantized))
    wanted = np.asarray(forward(model, TOKENS))[[0, 1], LENGTHS - 1]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("mesh", "rules"),
    or_thorough([((1, 1), TENSOR), ((2, 4), TENSOR), ((2, 4), EXPERT)], [((1, 1), TENSOR)]),
    ids=label,
)
def test_every_site_is_the_reference_s_by_pieces_and_in_decode_steps(
    mesh: tuple[int, int], rules: ShardingRules
) -> None:
    """Rows 2 and 0 of a cache of four take a piece of four tokens, then the rest one by one."""
    model, pieces = make(mesh, rules), []
    cache, rows = model.new_cache(4, 16), [2, 0]
    for start, size in [(0, 4), *((i, 1) for i in range(4, 9))]:
        counts = np.clip(LENGTHS - start, 0, size)
        logits, seen, cache = observe_step(model, TOKENS[:, start : start + size], counts, cache, EVERY, rows=rows)
        pieces.append({site: np.asarray(values) for site, values in seen.items()})
    axes = {site: 1 if site in ("embedding", "final") else 2 for site in SITES}
    check({site: np.concatenate([one[site] for one in pieces], axis=axes[site]) for site in SITES}, expected())
    wanted = np.asarray(forward(model, TOKENS))[0, -1]
    np.testing.assert_allclose(logits[0], wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    assert cache.lengths.tolist() == [5, 0, 9, 0]


def largest(x: jax.Array, at: At) -> dict[str, jax.Array]:
    """A reduction of a value [..., D] and of where it stands."""
    return {"value": x.max(axis=-1), "position": at.positions, "is_real": at.valid}


def test_layers_positions_and_reductions_are_those_that_a_tap_names() -> None:
    wanted = expected()["stream.out"]
    taps = {
        "turned": Tap("stream.out", layers=[1, 0]),
        "last": Tap("stream.out", layers=[1], at="last"),
        "some": Tap("stream.out", at=[4, 7]),
        "each": Tap("stream.out", at=[[8], [2]]),
        "reduced": Tap("stream.out", at=[4, 7], via=largest),
        "final": Tap("final", at="last", via=largest),
        "folded": Tap("stream.out", layers=[1, 0], fold=jnp.maximum),
        "norms": Tap("attention.out", via=largest, at="last"),
    }
    _, seen = observe(make(), TOKENS, LENGTHS, taps)
    close = {"rtol": 0, "atol": 2e-5 * np.abs(wanted).max()}
    np.testing.assert_allclose(real("stream.out", seen["turned"]), wanted[::-1], **close)
    np.testing.assert_allclose(seen["last"], wanted[1:, [0, 1], LENGTHS - 1], **close)
    np.testing.assert_allclose(seen["some"], wanted[:, :, [4, 7]], **close)  # the second text has no position 7
    np.testing.assert_allclose(seen["each"], wanted[:, [0, 1], [8, 2]][:, :, None], **close)
    np.testing.assert_allclose(seen["reduced"]["value"], wanted[:, :, [4, 7]].max(axis=-1), **close)
    assert seen["reduced"]["position"].tolist() == [[[4, 7], [4, 0]]] * 2
    assert seen["reduced"]["is_real"].tolist() == [[[True, True], [True, False]]] * 2
    assert seen["final"]["position"].tolist() == [8, 4]
    np.testing.assert_allclose(real("final", seen["folded"]), np.maximum(*wanted), **close)
    assert seen["norms"]["value"].shape == (2, 2)


def test_other_layers_and_positions_compile_nothing() -> None:
    model, seen = make(), []
    for i, layer in enumerate([0, 1, 1]):
        before = len(COMPILED)
        tap = Tap("stream.out", layers=np.array([layer]), at=np.array([i, i + 2]))
        seen.append(np.asarray(observe(model, TOKENS, LENGTHS, {"x": tap})[1]["x"]))
        assert i == 0 or len(COMPILED) == before
    np.testing.assert_allclose(seen[1][0, 0], expected()["stream.out"][1, 0, [1, 3]], rtol=0, atol=1e-4)


def test_what_is_seen_stays_in_its_shards() -> None:
    _, seen = observe(make((2, 4), EXPERT, quantized=True), TOKENS, LENGTHS, EVERY)
    assert seen["attention.heads"].sharding.shard_shape(seen["attention.heads"].shape) == (2, 1, 9, 2, 8)
    assert seen["stream.out"].sharding.shard_shape(seen["stream.out"].shape) == (2, 1, 9, 32)


@pytest.mark.thorough
@pytest.mark.parametrize(("mesh", "rules"), [((2, 4), TENSOR), ((1, 8), EXPERT)], ids=label)
def test_a_tap_adds_no_exchange_between_devices(mesh: tuple[int, int], rules: ShardingRules) -> None:
    model = make(mesh, rules)

    def exchanges(taps: dict[str, Tap]) -> list[str]:
        program = jax.jit(lambda *texts: observe(model, *texts, taps)).lower(TOKENS, LENGTHS).compile().as_text()
        return re.findall(
            r" (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", program
        )

    wanted = {site: EVERY[site] for site in ("stream.out", "attention.out", "router.experts", "attention.heads")}
    assert exchanges(wanted) == exchanges({})


@pytest.mark.thorough
def test_taps_read_the_same_under_a_mesh_that_the_caller_has_set() -> None:
    taps = {"x": Tap("stream.out"), "least": Tap("final", via=least)}
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"))):  # whose axes are Explicit
        _, seen = observe(make((2, 4)), TOKENS, LENGTHS, taps)
        check({"stream.out": seen["x"]}, {"stream.out": expected()["stream.out"]})
        assert seen["least"].ndim == 0


def least(x: jax.Array, at: At) -> jax.Array:
    return x.min()


def test_a_tap_changes_no_bit_of_the_logits() -> None:
    model = random_model(CONFIG, mesh=make_mesh((1, 1)))  # bfloat16 and int8, as Grok-1 is run
    plain, _ = observe(model, TOKENS, LENGTHS, {})
    tapped, _ = observe(model, TOKENS, LENGTHS, {site: EVERY[site] for site in ("stream.mid", "router.experts")})
    assert plain.tobytes() == tapped.tobytes()


def test_a_stream_is_the_sum_of_what_was_added_to_it() -> None:
    _, seen = observe(make(), TOKENS, LENGTHS, EVERY)
    added = seen["attention.out"].sum(axis=0) + seen["feed_forward.out"].sum(axis=0)
    np.testing.assert_allclose(seen["embedding"] + added, seen["stream.out"][-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (Tap("stream.in", layers=[2]), r"layers=\[2\]: name at least one, from 0 to 1, and each once"),
        (Tap("stream.in", layers=[0, 0]), "each once"),
        (Tap("stream.in", layers=[]), "at least one"),
        (Tap("stream.in", layers=1), r"layers=1: give their numbers, as in layers=\[0, 1\]"),
        (Tap("final", layers=[0]), "'final' stands outside of them: leave layers away"),
        (Tap("final", fold=jnp.maximum), "leave fold away"),
        (Tap("stream.in", at="first"), r"is at 'first': give \"last\", or positions as integers \[k\], or \[2, k\]"),
        (Tap("stream.in", at=[[1], [2], [3]]), r"or \[2, k\] for 2 rows"),
        (Tap("stream.in", at=[-1]), "tap 'x': positions count from 0"),
        (Tap("stream.in", at=[4, 9]), r"up to 8, and these were given: \[4 9\]\. Or give \"last\""),
    ],
)
def test_a_tap_that_reads_nothing_is_refused(tap: Tap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        observe(make(), TOKENS, LENGTHS, {"x": tap})


def test_a_site_that_no_model_has_is_refused_where_it_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"'blocks\.3\.hook_resid_post' is no site: name one of embedding, .* layers=\[3\]"
    ):
        Tap("blocks.3.hook_resid_post")


def test_a_dense_model_has_no_router_to_read() -> None:
    with pytest.raises(ValueError, match="this model is dense: it has no router"):
        observe(dense(), TOKENS, LENGTHS, {"x": Tap("router.logits")})


def test_taps_have_names() -> None:
    with pytest.raises(ValueError, match="taps must be a dict of Taps by names of your choice"):
        observe(make(), TOKENS, LENGTHS, [Tap("final")])
    with pytest.raises(ValueError, match="40 tokens exceed max_seq_len=32"):
        observe(make(), np.full((1, 40), 5), [40], {})


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| \[(.+?)\] \|", (ROOT / "docs" / "research.md").read_text(), re.MULTILINE)
    assert {site: shape.replace(", ", "") for site, shape in rows} == dict(SITES)


@pytest.mark.usefixtures("compiled_afresh")
def test_a_tap_writes_nothing_large_and_exchanges_nothing() -> None:
    """Its program is that of a prefill, which writes as many arrays of the stream's size, and what the tap keeps."""
    partitioner = Partitioner.create(CONFIG, make_mesh((2, 4)))
    model = abstract_model(CONFIG, partitioner, dtype=jnp.bfloat16, quantized=True)
    tokens, lengths = jax.ShapeDtypeStruct((2, 32), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = KVCache.abstract(CONFIG, 2, 32, mesh=partitioner.mesh)
    step = functools.partial(observe_step, taps={"x": Tap("stream.out", at="last")})
    plain, tapped = (
        read_program(jax.jit(run, donate_argnames="cache").lower(model, tokens, lengths, cache).compile())
        for run in (prefill, step)
    )
    assert tapped.collectives == plain.collectives
    assert tapped.temporary_bytes < plain.temporary_bytes + 8192
    stream = 32 * CONFIG.model_dim * 2  # bytes of a device's row
    sizes = [[value.num_bytes for value in program.values if value.num_bytes >= stream] for program in (plain, tapped)]
    assert sizes[0] == sizes[1]
