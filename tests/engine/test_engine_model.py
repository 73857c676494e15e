"""The engine on a real model in float32: each request alone, whatever its company, and no compilation after warm-up."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY_DENSE, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from grokjax import ByteTokenizer, GrokConfig, SampleSettings, TextGenerator, forward, generate, make_mesh
from grokjax.engine import Engine, Handle
from grokjax.request import Request

CONFIG = TINY_DENSE.replace(max_seq_len=48)
# For the tests of company: experts are where the tokens of rows meet.
EXPERTS = CONFIG.replace(num_experts=4, experts_per_token=2)
LONGEST, NEW = 30, 6
COMPILED: list[str] = []


def note_compilation(name: str, _: float, **__: object) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(name)


jax.monitoring.register_event_duration_secs_listener(note_compilation)


@functools.cache
def model(mesh: tuple[int, int] = (1, 1), config: GrokConfig = CONFIG):
    return random_model(config, dtype=jnp.float32, mesh=make_mesh(mesh))


def new_engine(mesh: tuple[int, int] = (1, 1), config: GrokConfig = CONFIG, **options) -> Engine:
    """Engines of the same sizes, so that they are compiled once."""
    sizes = {"slots": 4, "prefill_buckets": (8,), "prefill_rows": 2, "max_logprobs": 3}
    return Engine(model(mesh, config), **{**sizes, **options})


@functools.cache
def engine(mesh: tuple[int, int] = (1, 1), config: GrokConfig = CONFIG) -> Engine:
    """One engine for most tests of a mesh: what earlier requests left in it must not matter either."""
    return new_engine(mesh, config)


@functools.cache
def texts() -> np.ndarray:
    """Prompts [6, LONGEST]; the last three share their first 12 tokens with the first."""
    made = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (6, LONGEST))
    made[3:, :12] = made[0, :12]
    return made


@functools.cache
def alone(text: int, length: int, seed: int, temperature: float, config: GrokConfig = CONFIG) -> list[int]:
    """The tokens that `generate` gives for one prompt, [NEW]."""
    drawn = generate(
        model(config=config),
        np.pad(texts()[text, :length], (0, LONGEST - length))[None],
        np.array([length]),
        max_new_tokens=NEW,
        settings=SampleSettings.create(1, temperature=temperature, top_p=0.95 if temperature else 1.0),
        keys=jax.random.key(seed)[None],
    )
    return np.asarray(drawn.tokens)[0].tolist()


@st.composite
def one_request(draw: st.DrawFn) -> tuple[tuple[int, int, int, float], int, int, int]:
    """What `alone` takes, tokens asked for, steps made before it is submitted, and until it is cancelled (0: never)."""
    text, length, seed = draw(st.integers(0, 5)), draw(st.integers(1, LONGEST)), draw(st.integers(0, 2**32 - 1))
    what = (text, length, seed, draw(st.sampled_from([0.0, 0.8])))
    return what, draw(st.integers(1, NEW)), draw(st.integers(0, 4)), draw(st.sampled_from([0, 0, 0, 1, 4]))


def submit(engine: Engine, what: tuple[int, int, int, float], count: int) -> Handle:
    text, length, seed, temperature = what
    options = {"max_new_tokens": count, "temperature": temperature, "top_p": 0.95 if temperature else 1.0}
    return engine.submit(Request(texts()[text, :length].tolist(), seed=seed, ignore_eos=True, **options))


@settings(max_examples=12)
@given(requests=st.lists(one_request(), min_size=1, max_size=7))
def test_any_company_gives_each_request_its_own_tokens(requests: list) -> None:
    busy, handles = engine((2, 4), EXPERTS), []
    for what, count, before, cancelled_after in requests:
        for _ in range(before):
            busy.step()
        handles.append(submit(busy, what, count))
        if cancelled_after:
            for _ in range(cancelled_after):
                busy.step()
            busy.cancel(handles[-1])
    busy.run()
    for (what, count, _, _), handle in zip(requests, handles, strict=True):
        done = handle.completion
        expected = alone(*what, EXPERTS)[: len(done.token_ids) if done.finish_reason == "cancelled" else count]
        assert list(done.token_ids) == expected


def test_a_reused_prefix_changes_nothing() -> None:
    """Rows are reused that run, and rows that ended."""
    fresh = new_engine()
    what = [(0, 20, 1, 0.8), (3, 25, 2, 0.8), (4, 14, 3, 0.0), (0, 20, 4, 0.8), (5, 30, 5, 0.8)]
    first = submit(fresh, what[0], NEW)
    for _ in range(5):
        fresh.step()
    handles = [first, *(submit(fresh, one, NEW) for one in what[1:])]
    fresh.run()
    assert [list(handle.completion.token_ids) for handle in handles] == [alone(*one) for one in what]
    metrics = fresh.metrics()
    assert metrics.prefix_hits == 4
    assert metrics.reused_tokens >= 4 * 12


def test_samples_share_a_prefill_and_draw_each_for_itself() -> None:
    fresh = new_engine(reuse_prefixes=False)
    prompt = texts()[1, :17].tolist()
    done = fresh.generate([prompt], n=4, seed=7, temperature=0.8, top_p=0.95, max_new_tokens=NEW, ignore_eos=True)
    assert [list(sample.token_ids) for sample in done] == [alone(1, 17, 7 + i, 0.8) for i in range(4)]
    assert fresh.metrics().reused_tokens == 3 * 17


def test_bfloat16_gives_the_same_from_the_same_programs() -> None:
    """With one row a prefill and no reuse, every request goes through the same programs in any company."""
    half = random_model(CONFIG, dtype=jnp.bfloat16)
    options = {"slots": 3, "prefill_buckets": (8,), "prefill_rows": 1, "reuse_prefixes": False}
    what = [(0, 20, 1, 0.8), (1, 9, 2, 0.8), (3, 3, 3, 0.8), (2, 30, 4, 0.8), (5, 8, 5, 0.0)]
    together = Engine(half, **options)
    handles = [submit(together, one, NEW) for one in what]
    together.run()
    for one, handle in zip(what, handles, strict=True):
        single = Engine(half, **options)
        by_itself = submit(single, one, NEW)
        single.run()
        assert by_itself.completion.token_ids == handle.completion.token_ids


def test_logprobs_are_the_models() -> None:
    prompt = texts()[2, :13].tolist()
    allowed = np.zeros(CONFIG.vocab_size, bool)
    allowed[100:110] = True
    options = {"max_new_tokens": NEW, "temperature": 0.7, "seed": 3, "ignore_eos": True, "logprobs": 3}
    for extra in ({}, {"allowed_tokens": allowed}):
        [done] = engine().generate([prompt], prompt_logprobs=True, **options, **extra)
        text = [*prompt, *done.token_ids]
        by_model = np.asarray(jax.nn.log_softmax(forward(model(), np.array([text]))[0]))
        expected = [by_model[i, token] for i, token in enumerate(text[1:])]
        first, *scores = done.prompt_logprobs
        assert first is None
        assert [score.token_id for score in scores] == prompt[1:]
        np.testing.assert_allclose([score.logprob for score in scores], expected[: len(prompt) - 1], atol=1e-4)
        for score, found in zip(scores, by_model[:-1], strict=False):
            assert score.rank == (found > found[score.token_id]).sum()
            assert score.top_id == found.argmax()
            best = np.argsort(-found)[:3]
            assert [token for token, _ in score.top] == best.tolist()
            np.testing.assert_allclose([logprob for _, logprob in score.top], found[best], atol=1e-4)
            np.testing.assert_allclose(score.entropy, -(np.exp(found) * found).sum(), atol=1e-4)
        np.testing.assert_allclose([e.logprob for e in done.logprobs], expected[len(prompt) - 1 :], atol=1e-4)
        for i, entry in enumerate(done.logprobs):
            best = np.argsort(-by_model[len(prompt) - 1 + i])[:3]
            assert [token for token, _ in entry.top] == best.tolist()
            np.testing.assert_allclose([p for _, p in entry.top], by_model[len(prompt) - 1 + i, best], atol=1e-4)
        if extra:
            assert all(100 <= token < 110 for token in done.token_ids)


def test_a_mask_draws_as_in_generate() -> None:
    prompt, allowed = texts()[1, :9], np.arange(CONFIG.vocab_size) % 7 == 3
    drawing = SampleSettings.create(1, temperature=0.9, top_k=20, min_p=0.01, mask=allowed)
    padded = np.pad(prompt, (0, LONGEST - len(prompt)))
    drawn = generate(
        model(), padded[None], np.array([9]), max_new_tokens=NEW, settings=drawing, keys=jax.random.key(5)[None]
    )
    options = {"temperature": 0.9, "top_k": 20, "min_p": 0.01, "seed": 5, "ignore_eos": True, "max_new_tokens": NEW}
    [done] = engine().generate([prompt.tolist()], allowed_tokens=allowed, **options)
    assert list(done.token_ids) == np.asarray(drawn.tokens)[0].tolist()
    bias = {int(token): -np.inf for token in np.flatnonzero(~allowed)}
    [biased] = engine().generate([prompt.tolist()], logit_bias=bias, **options)
    assert biased.token_ids == done.token_ids


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_a_padded_vocabulary_draws_as_in_generate(temperature: float) -> None:
    """With a mask of what the tokenizer knows; without, two of five tokens would be others."""
    tokenizer, known = ByteTokenizer(300), np.arange(CONFIG.vocab_size) < 300
    drawing = SampleSettings.create(1, temperature=temperature, mask=known)
    prompt = np.pad(tokenizer.encode("hello"), (0, LONGEST - 5))[None]
    options = {"max_new_tokens": NEW, "temperature": temperature, "ignore_eos": True}
    for sample in new_engine(tokenizer=tokenizer).generate(["hello"], n=3, **options):
        key = jax.random.key(sample.sample)[None]
        drawn = generate(model(), prompt, np.array([5]), max_new_tokens=NEW, settings=drawing, keys=key)
        assert list(sample.token_ids) == np.asarray(drawn.tokens)[0].tolist()
        assert max(sample.token_ids) < 300


def test_an_int8_cache_gives_what_generate_gives() -> None:
    """Rows that are prefilled together, in chunks, and from a shared prefix; a float32 cache is off by 2e-3 or more."""
    prompts = [texts()[text, :length] for text, length in ((0, 20), (1, 7), (3, 20), (4, 14))]
    options = {"max_new_tokens": NEW, "temperature": 0, "logprobs": 0}
    made = new_engine(cache_dtype="int8").generate([prompt.tolist() for prompt in prompts], **options)
    for prompt, done in zip(prompts, made, strict=True):
        padded, length = np.pad(prompt, (0, LONGEST - len(prompt))), np.array([len(prompt)])
        alone = generate(model(), padded[None], length, max_new_tokens=NEW, cache_dtype="int8", eos_id=CONFIG.eos_id)
        count = len(done.token_ids)
        assert list(done.token_ids) == np.asarray(alone.tokens)[0, :count].tolist()
        logprobs = [entry.logprob for entry in done.logprobs]
        np.testing.assert_allclose(logprobs, np.asarray(alone.logprobs)[0, :count], atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1e10, 1e30, 3e38])
def test_no_temperature_draws_what_is_not_allowed(temperature: float) -> None:
    options = {"temperature": temperature, "ignore_eos": True, "max_new_tokens": NEW}
    [masked] = engine().generate([[5, 6]], allowed_tokens=np.arange(CONFIG.vocab_size) < 2, **options)
    [biased] = engine().generate([[5, 6]], logit_bias=dict.fromkeys(range(2, CONFIG.vocab_size), -np.inf), **options)
    assert {*masked.token_ids, *biased.token_ids} == {0, 1}


@pytest.mark.parametrize(
    ("mesh", "slots", "buckets", "options"),
    [
        ((1, 1), 3, (8,), {}),  # sizes that no other engine here has: what is compiled is compiled for it
        pytest.param(
            (2, 4), 3, (4, 8), {"prefill_rows": 4, "cache_dtype": "int8"}, marks=pytest.mark.thorough, id="(2, 4)"
        ),
    ],
)
def test_nothing_compiles_after_warm_up(
    mesh: tuple[int, int], slots: int, buckets: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Every kind of request in random order, on one device and on a mesh that does not divide the slots."""
    tokenizer = ByteTokenizer(CONFIG.vocab_size)
    warm = new_engine(mesh, tokenizer=tokenizer, slots=slots, prefill_buckets=buckets, **options)
    before = len(COMPILED)
    steps = warm.warm_up()
    assert len(COMPILED) - before >= len(steps)
    names = [(step.name, step.shape) for step in steps]
    prompts = {
        (name, (rows, bucket, *most))
        for name, rows, *most in (("score", 1), ("score", 1, 3), ("prefill", 1), ("prefill", 2))
        for bucket in buckets
    }
    assert {("begin", (slots,)), ("decode", (slots,))} | prompts < set(names)
    assert len(names) == len(set(names)) == 4 + len(prompts)
    assert all(step.seconds > 0 for step in steps)

    random, before = np.random.default_rng(1), len(COMPILED)
    handles = []
    for number in range(60):
        length = int(random.integers(1, LONGEST))
        request = Request(
            texts()[random.integers(0, 6), :length].tolist(),
            max_new_tokens=int(random.integers(0, 9)),
            temperature=float(random.choice([0.0, 0.9])),
            top_p=float(random.choice([0.5, 1.0])),
            top_k=int(random.integers(0, 9)),
            seed=number,
            stop=random.choice(["a", "bc"]),
            n=int(random.integers(1, 4)),
            logprobs=int(random.integers(0, 4)),
            prompt_logprobs=bool(random.integers(0, 2)),
            logit_bias={5: -1.0} if random.integers(0, 2) else None,
            priority=int(random.integers(-1, 2)),
        )
        handles.append(warm.submit(request))
        for _ in range(random.integers(0, 4)):
            warm.step()
        if number % 7 == 0:
            warm.cancel(handles[-1])
    warm.run()
    assert len(COMPILED) == before
    assert all(handle.is_done and handle.completion.error is None for handle in handles)
    assert warm.metrics().prefix_hits > 0


def test_warm_up_needs_an_idle_engine() -> None:
    busy = new_engine()
    submit(busy, (0, 10, 1, 0.0), 2)
    with pytest.raises(ValueError, match="requests are running: warm the engine up before the first"):
        busy.warm_up()


@pytest.mark.thorough  # of a command everybody sees it
def test_a_second_process_compiles_nothing_that_the_cache_has(tmp_path: Path) -> None:
    """Nor does a setting of JAX stay changed."""
    script = """
import json, sys
import jax, jax.numpy as jnp
from grokjax import GrokConfig, init
from grokjax.engine import Engine
misses = []
jax.monitoring.register_event_listener(lambda name, **_: misses.append(name == "/jax/compilation_cache/cache_misses"))
config = GrokConfig.tiny().replace(num_layers=1, max_seq_len=32, num_experts=1, experts_per_token=1)
engine = Engine(init(config, dtype=jnp.float32), slots=2, prefill_buckets=(4,), prefill_rows=1)
before, misses[:] = jax.config.jax_compilation_cache_dir, []
steps = engine.warm_up(sys.argv[1], prompt_len=3)
assert jax.config.jax_compilation_cache_dir == before
print(json.dumps([len(steps), sum(misses)]))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path) for _ in range(2)]
    (steps, first), (_, second) = (json.loads(run.stdout) for run in runs)
    assert first == steps, "one is compiled twice, or not kept"
    assert second == 0


def test_texts_are_those_of_the_generator_of_one_prompt() -> None:
    tokenizer = ByteTokenizer(CONFIG.vocab_size)
    texts_alone = TextGenerator(model(), tokenizer)
    prompts = ["hello", "é is a letter", "x" * 20]
    together = new_engine(tokenizer=tokenizer)
    handles = [together.submit(Request(p, max_new_tokens=20, seed=i)) for i, p in enumerate(prompts)]
    for seed, (prompt, handle) in enumerate(zip(prompts, handles, strict=True)):
        streamed = "".join(piece.text for piece in together.stream(handle))
        expected = texts_alone.generate(prompt, max_new_tokens=20, seed=seed)
        assert streamed == handle.completion.text == expected.text
        assert handle.completion.token_ids == expected.token_ids
        assert handle.completion.finish_reason == expected.finish_reason
