"""An edited model computes what its edits say, wherever it goes; and an edit that changes nothing changes no bit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import EXPERT, TENSOR, label, or_thorough
from looked_into import COMPILED, CONFIG, IS_REAL, LENGTHS, TOKENS, dense, expected, make

from grokjax import (
    ByteTokenizer,
    Engine,
    ShardingRules,
    forward,
    generate,
    save,
)
from grokjax.research import (
    SITES,
    At,
    Edit,
    Tap,
    bias_router,
    drop_experts,
    edit,
    edits_of,
    force_experts,
    limit_experts,
    mask_heads,
    observe,
    patch,
    project_out,
    replace,
    scale_experts,
    scale_heads,
    steer,
    unedited,
)

VECTOR = np.random.default_rng(2).standard_normal(CONFIG.model_dim).astype(np.float32)
OTHERS = np.random.default_rng(3).integers(3, CONFIG.vocab_size, TOKENS.shape)
EVERY = {site: Tap(site) for site in SITES}
MESHES = [((1, 1), TENSOR), ((2, 4), EXPERT)]


def same(x: jax.Array, value: None, at: At) -> jax.Array:
    return x


@pytest.mark.parametrize("mesh", [(1, 1), pytest.param((2, 4), marks=pytest.mark.thorough)], ids=label)
def test_edits_that_change_nothing_change_no_bit(mesh: tuple[int, int]) -> None:
    """Each alone would do too; in bfloat16 XLA leaves out a rounding that is there at `stream.mid`."""
    model = make(mesh, quantized=True)
    edited = edit(model, *(Edit(site, same) for site in SITES))
    assert forward(edited, TOKENS).tobytes() == forward(model, TOKENS).tobytes()


@pytest.mark.parametrize(("mesh", "rules"), or_thorough(MESHES, MESHES[:1]), ids=label)
def test_a_patch_of_all_that_another_run_saw_gives_its_logits(mesh: tuple[int, int], rules: ShardingRules) -> None:
    """Of what stands before the layers and of all that each of them adds, at all positions."""
    model = make(mesh, rules)
    clean, seen = observe(model, TOKENS, LENGTHS, EVERY)
    added = [patch(site, None, seen[site]) for site in ("attention.out", "feed_forward.out")]
    patched, _ = observe(edit(model, patch("embedding", None, seen["embedding"]), *added), OTHERS, LENGTHS, {})
    np.testing.assert_allclose(patched, clean, rtol=0, atol=1e-5)


def test_patches_of_each_layer_compile_once() -> None:
    """What follows from a layer's stream is as it was in the clean run; so is what follows from one position of it."""
    model = make()
    clean, seen = observe(model, TOKENS, LENGTHS, {"x": Tap("stream.out")})
    for layer in range(CONFIG.num_layers):
        before = len(COMPILED)
        whole = edit(model, patch("stream.out", [layer], np.asarray(seen["x"])[layer]))
        patched, after = observe(whole, OTHERS, LENGTHS, {"x": Tap("stream.out")})
        np.testing.assert_allclose(patched, clean, rtol=0, atol=1e-5)
        assert layer == 0 or len(COMPILED) == before
        np.testing.assert_array_equal(after["x"][layer], seen["x"][layer])
    some = edit(model, patch("stream.out", [1], np.asarray(seen["x"])[1][:, [2, 4]], [2, 4]))
    _, after = observe(some, OTHERS, LENGTHS, {"x": Tap("stream.out", layers=[1])})
    is_clean = (np.asarray(after["x"][0]) == np.asarray(seen["x"][1])).all(axis=-1)
    assert is_clean[0].tolist() == [i in (2, 4) for i in range(9)]


@pytest.mark.parametrize("mesh", [(1, 1), pytest.param((2, 4), marks=pytest.mark.thorough)], ids=label)
def test_patches_of_each_head_compile_once_and_leave_the_other_heads(mesh: tuple[int, int]) -> None:
    """Whatever these have become by an edit that acts before, such as one that halves them all."""
    model, site = make(mesh), "attention.heads"
    _, seen = observe(model, TOKENS, LENGTHS, {"x": Tap(site)})
    clean, halved = np.asarray(seen["x"]), edit(model, scale_heads(np.full(CONFIG.num_heads, 0.5)))
    for i, (layer, head) in enumerate([(1, 5), (0, 2), (1, 0)]):
        before, taps = len(COMPILED), {"x": Tap(site, layers=[layer])}
        one = patch(site, [layer], clean[layer][:, [2, 4]][:, :, [head]], [2, 4], heads=[head])
        _, after = observe(edit(halved, one), OTHERS, LENGTHS, taps)
        assert i == 0 or len(COMPILED) == before
        _, wanted = observe(halved, OTHERS, LENGTHS, taps)
        wanted = np.array(wanted["x"][0])
        wanted[:, [2, 4], head] = clean[layer][:, [2, 4], head]
        np.testing.assert_allclose(after["x"][0], wanted, rtol=0, atol=1e-5)


def test_each_row_has_a_head_of_its_own_patched() -> None:
    """At a site of kv heads, of which the second text gets two in another order; one value is for both rows."""
    site, value = "attention.value", np.random.default_rng(4).standard_normal((1, 9, 2, 8)).astype(np.float32)
    one = patch(site, [1], value, heads=[[0, 1], [3, 2]])
    _, before = observe(make(), TOKENS, LENGTHS, {"x": Tap(site, [1])})
    _, after = observe(edit(make(), one), TOKENS, LENGTHS, {"x": Tap(site, [1])})
    wanted = np.array(before["x"][0])
    wanted[0, :, [0, 1]], wanted[1, :, [3, 2]] = value[0].swapaxes(0, 1), value[0].swapaxes(0, 1)
    np.testing.assert_allclose(after["x"][0], wanted, rtol=0, atol=1e-5)


def test_a_patch_without_positions_is_of_whole_texts() -> None:
    """A value of fewer tokens than the call has is refused where it is used; in steps that follow it does nothing."""
    value = np.tile(VECTOR, (1, 9, 1))
    whole, named = (edit(dense(), patch("stream.out", [0], value, *positions)) for positions in ((), (np.arange(9),)))
    made = [np.asarray(generate(one, TOKENS, LENGTHS, max_new_tokens=3).tokens).tolist() for one in (whole, named)]
    assert made[0] == made[1]
    message = (
        r"values are of 1 positions, and this call has 9 tokens, .* name the positions, as in patch\(\.\.\., positions"
    )
    with pytest.raises(ValueError, match=message):
        observe(edit(dense(), patch("stream.out", [0], value[:, :1])), TOKENS, LENGTHS, {})


def test_forcing_the_experts_that_were_chosen_changes_no_bit() -> None:
    model = make()
    plain, seen = observe(model, TOKENS, LENGTHS, {"chosen": Tap("router.experts")})
    forced, _ = observe(edit(model, force_experts(seen["chosen"])), TOKENS, LENGTHS, {})
    assert forced.tobytes() == plain.tobytes()


def test_ready_made_edits_do_what_they_say() -> None:
    """Each alone, to values that the model has at its site in layer 1."""
    model, shape = make(), TOKENS.shape
    before = {site: values[1] for site, values in expected().items() if site not in ("embedding", "final")}
    at = At(
        layer=jnp.int32(1),
        positions=jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], shape),
        valid=jnp.asarray(IS_REAL),
        router_logits=jnp.asarray(before["router.logits"], jnp.float32),
        experts=jnp.asarray(before["router.experts"], jnp.int32),
    )

    def check(one: Edit, wanted: np.ndarray) -> np.ndarray:
        x = jnp.asarray(before[one.site], jnp.int32 if one.site == "router.experts" else jnp.float32)
        (bound,) = edits_of(edit(model, one))
        found = np.asarray(bound.apply(x, at))
        np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), rtol=0, atol=1e-4)
        np.testing.assert_array_equal(bound.apply(x, dataclasses.replace(at, layer=jnp.int32(0))), x)
        return found

    stream, heads, shares = before["stream.out"], before["attention.heads"], before["router.probabilities"]
    late = (np.arange(9) >= 3)[None, :, None]
    check(steer(VECTOR, [1], scale=2, start=3), stream + late * 2 * VECTOR)
    check(replace("stream.mid", [1], 0), np.zeros(CONFIG.model_dim))
    check(replace("stream.mid", [1], VECTOR), VECTOR)
    check(replace("stream.mid", [1], VECTOR, start=3), np.where(late, VECTOR, before["stream.mid"]))
    some = heads.copy()
    some[:, 3:, [6, 1]] = VECTOR[:16].reshape(2, 8)
    check(replace("attention.heads", [1], VECTOR[:16].reshape(2, 8), start=3, heads=[6, 1]), some)
    check(replace("attention.heads", [1], 0, heads=2), heads * (np.arange(CONFIG.num_heads) != 2)[:, None])
    unit = VECTOR / np.linalg.norm(VECTOR)
    check(project_out(3 * VECTOR, [1]), stream - (stream @ unit)[..., None] * unit)
    scales = np.linspace(0, 1, CONFIG.num_heads)
    check(scale_heads(scales, [1]), heads * scales[:, None])
    check(mask_heads(np.stack([scales < 2, scales > 0.5])[1:], [1]), heads * (scales > 0.5)[:, None])
    bias = np.arange(8)
    check(bias_router(bias, [1]), before["router.logits"] + bias)
    check(drop_experts({1: [2, 6]}), np.where(np.isin(bias, [2, 6]), -np.inf, before["router.logits"]))
    chosen = before["router.experts"]
    check(scale_experts({1: {2: 0.5, 4: 0}}), shares * np.where(chosen == 2, 0.5, chosen != 4))
    check(limit_experts(1, [1]), shares * [1, 0])
    check(force_experts([7, 0], [1]), np.array([7, 0]))


def test_edits_of_the_router_act_before_experts_are_chosen() -> None:
    """What each layer has is given to the edits by layer: the first is forced, the second biased, less one expert."""
    bias = np.stack([np.zeros(8), 100 * (np.arange(8) == 5)])
    edits = force_experts([7, 0], [0]), bias_router(bias), drop_experts({1: [6]})
    sites = {site: Tap(site) for site in SITES if site.startswith("router.")}
    _, seen = observe(edit(make(), *edits), TOKENS, LENGTHS, sites)
    logits, experts, shares = (np.asarray(seen[site], np.float64) for site in sites)
    assert (experts[0] == [7, 0]).all()
    assert (experts[1, ..., 0] == 5).all()
    assert (experts[1] != 6).all()
    softmax = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(shares, np.take_along_axis(softmax, experts.astype(int), axis=-1), atol=1e-5)


def test_edits_act_in_the_order_in_which_they_were_given() -> None:
    model, mid = dense(), {"x": Tap("stream.mid", layers=[0])}
    zero, add = replace("stream.mid", [0], 0), steer(VECTOR, [0], site="stream.mid")
    once = edit(edit(model, zero), add)
    for edited in (once, edit(model, zero, add)):
        np.testing.assert_array_equal(observe(edited, TOKENS, LENGTHS, mid)[1]["x"][0, 0, 0], VECTOR)
    assert not observe(edit(model, add, zero), TOKENS, LENGTHS, mid)[1]["x"].any()
    assert [repr(one) for one in edits_of(once)] == [
        "replace at stream.mid in layers 0",
        "steer at stream.mid in layers 0",
    ]
    assert "edits=(replace at stream.mid in layers 0, steer at stream.mid in layers 0)" in repr(once)
    assert edits_of(model) == edits_of(unedited(once)) == ()
    assert "edits" not in repr(unedited(once))


@pytest.mark.parametrize(("mesh", "rules"), or_thorough(MESHES, MESHES[:1]), ids=label)
def test_a_steered_model_gives_the_same_tokens_everywhere(mesh: tuple[int, int], rules: ShardingRules) -> None:
    """In an engine, which cuts the prompt and has other requests, in `generate`, and without a cache."""
    model, other = (
        edit(make(mesh, rules), steer(VECTOR, [0], scale=scale, start=2), drop_experts({1: [0, 3]}))
        for scale in (0.5, -0.5)
    )
    prompt = TOKENS[0].tolist()
    made = np.asarray(generate(model, TOKENS, LENGTHS, max_new_tokens=5).tokens)
    tokens = list(prompt)
    for _ in range(5):
        padded = np.zeros((2, 16), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(forward(model, padded)[0, len(tokens) - 1].argmax()))
    assert tokens[len(prompt) :] == made[0].tolist()
    assert made.tolist() != np.asarray(generate(other, TOKENS, LENGTHS, max_new_tokens=5).tokens).tolist()
    sizes = {"slots": 4, "max_len": 16, "prefill_buckets": (4,), "prefill_rows": 1}
    with Engine(model, ByteTokenizer(CONFIG.vocab_size), **sizes) as engine:
        others = [TOKENS[1, :5].tolist(), [*prompt[:6], 9], prompt]
        done = engine.generate([prompt, *others], max_new_tokens=5, temperature=0, ignore_eos=True)
    assert [list(one.token_ids) for one in done[:2]] == made.tolist()
    assert list(done[3].token_ids) == made[0].tolist()


def positions_of(x: jax.Array, at: At) -> jax.Array:
    return at.positions


def test_derivatives_go_from_a_tap_to_the_value_of_an_edit() -> None:
    """Beside a tap of integers, which have none; compared with a small step."""
    taps = {"x": Tap("stream.out", at="last"), "positions": Tap("stream.out", via=positions_of)}

    def of_vector(vector: jax.Array) -> jax.Array:
        return jnp.sum(
            jnp.square(observe(edit(dense(), steer(vector, site="stream.in")), TOKENS, LENGTHS, taps)[1]["x"])
        )

    both = jax.jit(jax.value_and_grad(of_vector))
    found = both(jnp.zeros(CONFIG.model_dim))[1]
    change = (both(1e-2 * VECTOR)[0] - both(-1e-2 * VECTOR)[0]) / 2e-2
    np.testing.assert_allclose(np.vdot(found, VECTOR), change, rtol=1e-2)


def narrower(x: jax.Array, value: None, at: At) -> jax.Array:
    return x[..., :1]


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (
            steer(VECTOR, [5]),
            r"the edit steer at stream\.out in layers 5 has layers=\[5\]: name at least one, from 0 to 1",
        ),
        (steer(VECTOR, []), "at least one"),
        (steer(VECTOR[:5]), r"steer at stream\.out in layers 0 to 1 does not fit x of shape \(1, 1, 32\) \(P, T, D\)"),
        (
            steer(np.stack([VECTOR] * 3)),
            r"is in 2 layer\(s\), and its value is for 3: give it 2 for a first axis",
        ),
        (replace("final", [0], 0), "'final' stands outside of them"),
        (patch("stream.out", [0], np.zeros((2, 3, 5))), r"\(2, 3, 5\) are no values of 3 positions"),
        (patch("stream.out", [0], np.zeros((2, 3, 32)), [1, 2]), "no values of 2 positions"),
        (patch("stream.out", [0], VECTOR[None, None], [-1]), r"positions count from 0 .* up to 31, .* \[\[-1\]\]"),
        (patch("stream.out", [0], VECTOR[None, None], [32]), r"up to 31, and these were given: \[\[32\]\]"),
        (patch("stream.out", [0], VECTOR[None, None], [0.5]), r"were given: \[\[0\.5\]\]"),
        (patch("stream.out", [0], VECTOR[None, None], []), r"were given: \[\]"),
        (
            patch("attention.heads", [0], np.zeros((1, 2, 8, 8)), heads=[5]),
            r"\(1, 2, 8, 8\) are no values of 2 positions and 1 heads: give \[P, 2, 1, 8\]",
        ),
        (
            patch("attention.heads", [0], np.zeros((1, 2, 1, 8)), heads=[8]),
            r"names the heads \[\[8\]\]: name at least one, from 0 to 7, and each once",
        ),
        (patch("attention.key", [0], np.zeros((1, 2, 1, 8)), heads=4), "from 0 to 3"),
        (patch("attention.heads", [0], np.zeros((1, 2, 2, 8)), heads=[3, 3]), "each once"),
        (patch("attention.heads", [0], np.zeros((1, 2, 0, 8)), heads=[]), "name at least one"),
        (
            replace("attention.heads", [0], np.zeros((2, 8)), heads=[3]),
            r"value has the shape \(2, 8\), and the heads \(1, 1\): .* a number, \[8\] or \[m, 8\]",
        ),
        (replace("attention.heads", [0], 0, heads=[[3], [4]]), r"the heads \(2, 1\): name m heads, \[m\]"),
        (replace("stream.out", [0], 0, start=32), "positions count from 0"),
        (steer(VECTOR, start=-1), r"edit steer at stream\.out: positions count from 0 .* were given: -1"),
        (steer(np.stack([VECTOR] * 2), start=2**32), "positions count from 0"),
        (force_experts(np.tile([0, 1], (1, 33, 1))), "up to 31"),
        (limit_experts(3), "it leaves 3 experts: leave 0 to 2"),
        (
            mask_heads([True]),
            r"edit mask_heads at .*: its value has the shape \(1,\), and the model has 8 heads .* \[8\]",
        ),
        (scale_heads(np.ones((2, 5))), r"edit scale_heads at .* shape \(2, 5\), .* or \[n, 8\] for n layers"),
        (
            patch("stream.out", [0], np.zeros((3, 1, 32)), [[1], [2]]),
            "it has rows: 3 of values, 2 of positions; and this call has 3",
        ),
        (project_out(np.zeros(32)), "direction has the length 0"),
        (project_out(np.ones(5)), "the direction has 5 numbers"),
        (drop_experts({0: [8]}), "name at least one expert in each layer, from 0 to 7"),
        (drop_experts({0: []}), "name at least one expert in each layer"),
        (drop_experts({0: range(8)}), "loses all its 8 experts"),
        (force_experts([1, 1]), "from 0 to 7, and none twice for a token"),
        (force_experts([1, 8]), "from 0 to 7, and none twice"),
        (force_experts([1]), "give the numbers of 2 experts"),
        (
            Edit("stream.out", narrower),
            r"narrower .* makes \(1, 1, 1\) of x of shape \(1, 1, 32\): .* must keep the shape",
        ),
    ],
)
def test_an_edit_that_reaches_nothing_is_refused(one: Edit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit(make(), one)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad])
@pytest.mark.parametrize("which", [0, 1])
def test_positions_that_no_text_has_are_refused_under_jit_and_in_derivatives(which: int, transform: Any) -> None:
    """Where values are traced, and what was given as numbers is known."""

    def of_value(value: jax.Array) -> jax.Array:
        edits = patch("stream.out", [0], value, [-1]), steer(np.stack([VECTOR] * 2), start=-1)
        return observe(edit(make(), edits[which]), TOKENS, LENGTHS, {})[0].sum()

    with pytest.raises(ValueError, match="positions count from 0"):
        transform(of_value)(jnp.ones((1, 1, CONFIG.model_dim)))


def test_what_is_traced_is_not_looked_at() -> None:
    """The value of an edit that is made within `jit` is not known; its shape is."""
    model, tokens = make(), np.array([[3, 4, 5]])

    @jax.jit
    def forced(experts: jax.Array) -> jax.Array:
        return forward(edit(model, force_experts(experts)), tokens)

    chosen = np.array([5, 2])
    np.testing.assert_array_equal(forced(chosen), jax.jit(forward)(edit(model, force_experts(chosen)), tokens))


def test_one_value_is_put_at_another_position_of_each_row() -> None:
    one = patch("stream.out", [1], VECTOR[None, None], [[8], [2]])
    _, seen = observe(edit(make(), one), TOKENS, LENGTHS, {"x": Tap("stream.out", [1])})
    is_put = (np.asarray(seen["x"][0]) == VECTOR).all(axis=-1)
    assert np.argwhere(is_put).tolist() == [[0, 8], [1, 2]]


def test_what_is_no_edit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes a model and one edit or more, such as steer"):
        edit(make())
    with pytest.raises(ValueError, match=r"experts are numbered from 0, and these were named: \[\[-1\]\]"):
        drop_experts({0: [-1]})
    with pytest.raises(ValueError, match="this model is dense: it has no router"):
        edit(dense(), bias_router(np.zeros(8)))


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (
            lambda: steer(VECTOR, site="hook_resid_post"),
            "'hook_resid_post' is no site: name one of embedding, stream.in",
        ),
        (lambda: Edit(["stream.in"], same), r"\['stream\.in'\] is no site"),
        (lambda: patch("stream", None, 0), "'stream' is no site"),
        (
            lambda: patch("attention.heads", [1], np.zeros((1, 9, 8))),
            r"shape \(1, 9, 8\) is none of 'attention\.heads': give \[P, k, N, H\] of k positions, or "
            r"\[n, P, k, N, H\] of n layers\. A tap at=\"last\" .* at=\[5\], .* Of some heads, give \[P, k, m, H\]",
        ),
        (lambda: patch("stream.out", [1], VECTOR), r"shape \(32,\) is none of 'stream\.out': give \[P, k, D\]"),
        (
            lambda: patch("stream.out", [1], VECTOR[None, None], "last"),
            r"positions='last': give their numbers, \[k\] or \[P, k\]\. .* np\.array\(lengths\)\[:, None\] - 1",
        ),
        (lambda: patch("stream.out", [1], VECTOR[None, None], [[[1]]]), r"positions have the shape \(1, 1, 1\): give"),
        (
            lambda: patch("stream.out", [1], VECTOR[None, None], heads=[1]),
            r"heads=\[1\] are named at 'stream\.out', which has none: name them at attention\.query, attention\.key",
        ),
        (
            lambda: scale_heads({1: {5: 2.0}}),
            r"scales is {1: {5: 2\.0}}: give an array \[N\], or .* as in layers=\[3\]",
        ),
        (lambda: mask_heads({1: [5]}), r"mask is {1: \[5\]}: give an array \[N\]"),
        (lambda: bias_router({1: {5: 2.0}}), r"bias is .*: give an array \[E\]"),
        (lambda: force_experts({1: [5]}), r"experts is .*: give an array \[X\] or \[P, T, X\]"),
        (lambda: drop_experts({1: 5}), r"{1: 5} was given: give layer -> the experts that it loses, as in {12: \[3\]}"),
        (
            lambda: scale_experts({1: 0.5}),
            r"{1: 0\.5} was given: give layer -> expert -> factor, as in {12: {3: 0\.5}}",
        ),
    ],
)
def test_an_edit_of_no_form_is_refused_where_it_is_made(make_one: Callable[[], Edit], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_one()


def test_values_of_other_rows_are_refused_where_they_are_used() -> None:
    edited = edit(make(), patch("stream.out", [0], np.zeros((3, 2, 32)), [0, 1]))
    message = (
        r"patch at stream\.out does not fit x of shape \(2, 9, 32\) .* it has rows: 3 of values, "
        "1 of positions; and this call has 2: .* or one row for all, as an engine needs"
    )
    with pytest.raises(ValueError, match=message):
        forward(edited, TOKENS)


def test_an_edited_model_is_not_saved(tmp_path: Path) -> None:
    edited = edit(make(), steer(VECTOR, [1]))
    with pytest.raises(ValueError, match=r"edited.*\n  steer at stream\.out in layers 1\nSave .*unedited\(model\)"):
        save(edited, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
