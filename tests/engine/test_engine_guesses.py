"""The engine on a real model in float32: what is guessed changes no token of any request."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY_DENSE, random_model
from fake_steps import prompt_logprobs

from grokjax import ByteTokenizer, GrokConfig, make_mesh
from grokjax.engine import Engine, Handle
from grokjax.request import Request

CONFIG = GrokConfig.tiny().replace(num_layers=1, max_seq_len=96)
NEW = 40


@functools.cache
def engine(config: GrokConfig, mesh: tuple[int, int], cache_dtype: str | None, max_guesses: int) -> Engine:
    """Engines that are compiled once, in which earlier requests leave what they held.

    Their clock says that all steps take the same time, so that they guess whatever this machine says to it.
    """
    model = random_model(config, dtype=jnp.float32, mesh=make_mesh(mesh))
    sizes = {"slots": 4, "prefill_buckets": (8,), "prefill_rows": 1, "max_logprobs": 2}
    options = {**sizes, "cache_dtype": cache_dtype, "max_guesses": max_guesses}
    return Engine(model, ByteTokenizer(config.vocab_size), clock=functools.partial(next, itertools.count()), **options)


def one_request(random: np.random.Generator) -> Request:
    """Any request: a prompt that repeats itself or not, or begins as others do; drawn greedily or not."""
    texts = ([60, 61, 62, 63] * 8, [70, 71] * 3 + [80, 81, 82] * 10, random.integers(3, CONFIG.vocab_size, 40).tolist())
    prompt = texts[random.integers(3)][: random.integers(1, 40)] + random.integers(60, 80, random.integers(3)).tolist()
    allowed = random.random(CONFIG.vocab_size) < 0.02
    allowed[60] = True
    return Request(
        prompt,
        max_new_tokens=int(random.integers(0, NEW)),
        temperature=float(random.choice([0, 0, 0.3, 0.8])),
        top_p=float(random.choice([0.9, 1])),
        top_k=int(random.choice([0, 4])),
        seed=int(random.integers(2**32)),
        n=int(random.choice([1, 1, 1, 2, 3])),
        stop=[bytes(random.integers(60, 100, 1).tolist()).decode()] if random.random() < 0.3 else [],
        ignore_eos=bool(random.random() < 0.5),
        logprobs=int(random.integers(3)) if random.random() < 0.3 else None,
        prompt_logprobs=bool(random.random() < 0.1),
        allowed_tokens=allowed if random.random() < 0.3 else None,
        logit_bias={int(random.integers(60, 80)): 2.0} if random.random() < 0.2 else None,
        guesses=int(random.integers(5)) if random.random() < 0.2 else None,
    )


def serve(engine: Engine, seed: int, count: int) -> tuple[list[Handle], set[int]]:
    """Serves random requests, of which some are cancelled; gives them, and which those are."""
    random = np.random.default_rng(seed)
    handles, cancelled = [], set()
    for number in range(count):
        handles.append(engine.submit(one_request(random)))
        steps, is_cancelled = int(random.integers(4)), random.random() < 0.1
        for _ in range(steps):
            engine.step()
        if is_cancelled:
            engine.cancel(handles[-1])
            cancelled.add(number)
    engine.run()
    return handles, cancelled


def check(
    config: GrokConfig, mesh: tuple[int, int], cache_dtype: str | None, max_guesses: int, *, seed: int, count: int
) -> None:
    """Serves the same requests with and without guesses, and compares what came of them."""
    plain, cancelled = serve(engine(config, (1, 1), cache_dtype, 0), seed, count)
    guessing = engine(config, mesh, cache_dtype, max_guesses)
    accepted = guessing.metrics().accepted_tokens
    guessed, _ = serve(guessing, seed, count)
    assert guessing.metrics().accepted_tokens > accepted + 2 * count
    for number, (one, other) in enumerate(zip(plain, guessed, strict=True)):
        assert len(one.samples) == len(other.samples) == one.request.n
        for expected, found in zip(one.samples, other.samples, strict=True):
            assert expected.error is found.error is None
            if number in cancelled:
                both = min(len(expected.token_ids), len(found.token_ids))
                assert expected.token_ids[:both] == found.token_ids[:both]
                continue
            assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
            assert found.finish_reason == expected.finish_reason
            tokens = zip(expected.logprobs or (), found.logprobs or (), strict=True)
            numbers = [
                (e.logprob - f.logprob, *(a[1] - b[1] for a, b in zip(e.top, f.top, strict=True))) for e, f in tokens
            ]
            np.testing.assert_allclose(np.array(numbers), 0, atol=1e-3 if cache_dtype == "int8" else 1e-4)
            if one.request.prompt_logprobs:
                scores = prompt_logprobs(found)[1:], prompt_logprobs(expected)[1:]
                np.testing.assert_allclose(*scores, atol=1e-3)


def test_guesses_change_nothing_of_any_request() -> None:
    check(TINY_DENSE.replace(max_seq_len=96), (1, 1), "int8", 3, seed=0, count=40)


@pytest.mark.thorough
def test_guesses_change_nothing_of_requests_on_a_mesh() -> None:
    check(CONFIG, (2, 4), None, 7, seed=1, count=60)
