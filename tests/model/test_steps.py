"""The public steps: what they refuse, what they leave untouched, and that all ways through a text agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY_DENSE, random_model

from grokjax import (
    KVCache,
    SampleSettings,
    decode,
    decode_and_sample,
    forward,
    generate,
    make_mesh,
    prefill,
)
from grokjax.model import Grok, abstract_model
from grokjax.sampling import row_keys, sample_token
from grokjax.sharding import Partitioner

CONFIG = TINY_DENSE.replace(max_seq_len=32)
TOKENS = np.random.default_rng(0).integers(3, 500, (3, 8))
LENGTHS = np.array([8, 5, 1])


@functools.cache
def model():
    return random_model(CONFIG, dtype=jnp.float32)


NEW = 6  # tokens that `generate` makes: one number, so that it compiles once
OVERFULL = jnp.array([16, 10, 1])


def empty(batch_size: int = 3, max_len: int = 16) -> KVCache:
    return KVCache.create(CONFIG, batch_size, max_len)


def full_rows() -> KVCache:
    """Rows that hold 16, 5 and 1 of 16 entries."""
    return dataclasses.replace(prefill(model(), TOKENS, LENGTHS, empty())[1], lengths=jnp.array([16, 5, 1]))


class TestRefusals:
    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            ([[512]], "tokens must be between 0 and 511, and one is 512"),
            ([[3, -1]], "tokens must be between 0 and 511, and one is -1"),
            ([[2**32]], "tokens must be between 0 and 511"),
            ([3], r"tokens must have shape \[batch, length\] and not be empty; these have shape \(1,\)"),
            ([[]], "must be integers, not float64"),
            (np.zeros((1, 0), int), "not be empty"),
            ([[0.5]], "must be integers, not float64"),
            ([[3] * 33], "33 tokens exceed max_seq_len=32"),
            ("hello", r"tokens must be integers, not text: encode it first, as in \[tokenizer.encode\("),
            (["hello"], "tokens must be integers, not text"),
            ([[3, 4], [5]], "tokens must have rows of one length: pad the shorter ones on the right"),
            ([[3, "x"]], "tokens must be integers, not text"),
            ([[object()]], "tokens must be integers, not list"),
        ],
    )
    def test_forward_refuses_what_are_no_tokens(self, tokens, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            forward(model(), tokens)

    @pytest.mark.parametrize(
        ("tokens", "lengths", "message"),
        [
            (TOKENS + 600, LENGTHS, "tokens must be between"),
            (TOKENS[0], LENGTHS, r"must have shape \[batch, length\]"),
            (TOKENS, [8, 5], r"lengths has shape \(2,\) and tokens \(3, 8\)"),
            (TOKENS, [9, 5, 1], "lengths must be between 0 and 8, and one is 9"),
            (TOKENS, [-1, 5, 1], "lengths must be between 0 and 8"),
            (TOKENS[:2], LENGTHS[:2], "this call needs .*and with batch_size=2"),
            (np.full((3, 17), 3), LENGTHS, "17 tokens a row exceed the cache's max_len=16: create a longer cache"),
        ],
    )
    def test_prefill_refuses_what_does_not_fit(self, tokens, lengths, message: str) -> None:
        cache = empty()
        with pytest.raises(ValueError, match=message):
            prefill(model(), tokens, lengths, cache)
        assert not cache.keys.is_deleted()  # a refused call donates nothing

    def test_prefill_refuses_rows_without_room(self) -> None:
        cache = full_rows()
        with pytest.raises(ValueError, match="row 0 holds 16 tokens of at most 16 and has no room for 2 more"):
            prefill(model(), TOKENS, [2, 0, 0], cache)
        assert not cache.keys.is_deleted()
        prefill(model(), TOKENS, [0, 8, 8], cache)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([0, 1], r"rows has shape \(2,\) and tokens \(3, 8\): name one of the cache for each"),
            ([0, 1, 4], "rows must be between 0 and 3, and one is 4"),
            ([1, 3, 1], r"rows \[1, 3, 1\] names one twice: prefill its parts one after the other"),
            ([1.0, 2.0, 3.0], "must be integers, not float64"),
        ],
    )
    def test_prefill_refuses_rows_that_are_not_there(self, rows, message: str) -> None:
        cache = empty(4)
        with pytest.raises(ValueError, match=message):
            prefill(model(), TOKENS, LENGTHS, cache, rows=rows)
        assert not cache.keys.is_deleted()

    def test_prefill_refuses_a_named_row_without_room(self) -> None:
        with pytest.raises(ValueError, match="row 0 holds 16 tokens of at most 16 and has no room for 5 more"):
            prefill(model(), TOKENS[:2], LENGTHS[:2], full_rows(), rows=[2, 0])

    def test_decode_refuses_what_does_not_fit(self) -> None:
        cache = full_rows()
        with pytest.raises(ValueError, match="row 0 holds 16 tokens of at most 16 and has no room for 1 more"):
            decode(model(), [3, 4, 5], cache)
        with pytest.raises(ValueError, match=r"active has shape \(2,\) and tokens \(3,\)"):
            decode(model(), [3, 4, 5], cache, active=[True, True])
        with pytest.raises(ValueError, match=r"tokens must have shape \[batch\] and not be empty"):
            decode(model(), [[3, 4, 5]], cache)
        with pytest.raises(ValueError, match="tokens must be between"):
            decode(model(), [3, 4, 512], cache)
        with pytest.raises(ValueError, match="this call needs"):
            decode(model(), [3, 4], cache)
        assert not cache.keys.is_deleted()
        decode(model(), [3, 4, 5], cache, active=[False, True, True])

    @pytest.mark.parametrize(
        ("tokens", "lengths", "max_new_tokens", "message"),
        [
            (
                TOKENS,
                LENGTHS,
                25,
                "max_new_tokens=25 must be an integer from 1 to 24, which 8 prompt tokens leave of max_seq_len=32",
            ),
            (TOKENS, LENGTHS, 0, "max_new_tokens=0"),
            (TOKENS, [8, 0, 1], 4, "lengths must be between 1 and 8, and one is 0"),
            (TOKENS, [8.0, 5.0, 1.0], 4, "lengths must be integers, not float64"),
            (TOKENS, [8], 4, r"lengths has shape \(1,\) and tokens \(3, 8\)"),
            (TOKENS[0], LENGTHS, 4, r"must have shape \[batch, length\]"),
            (TOKENS + 600, LENGTHS, 4, "tokens must be between 0 and 511"),
        ],
    )
    def test_generate_refuses_what_does_not_fit(self, tokens, lengths, max_new_tokens: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(model(), tokens, lengths, max_new_tokens=max_new_tokens)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": 4.5}, r"max_new_tokens=4\.5 must be an integer from 1 to"),
            ({"max_new_tokens": "4"}, "max_new_tokens='4' must be an integer from 1 to"),
            ({"eos_id": "</s>"}, "eos_id='</s>' is outside the vocabulary of 512 tokens"),
            ({"keys": 0}, r"keys has shape \(\) for 3 rows"),
            ({"settings": 0.8}, r"settings must be made by SampleSettings\.create\(3, \.\.\.\), not a float"),
            ({"cache_dtype": "int7"}, "the cache's dtype 'int7' must be float32, bfloat16 or int8"),
            ({"eos_id": 512}, "eos_id=512 is outside the vocabulary of 512 tokens"),
            ({"eos_id": -1}, "eos_id=-1 is outside the vocabulary"),
            ({"keys": jax.random.key(0)}, r"keys has shape \(\) for 3 rows: pass one key for each"),
            ({"keys": jax.random.split(jax.random.key(0), 2)}, r"keys has shape \(2,\) for 3 rows"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
    )
    def test_generate_refuses_impossible_options(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(model(), TOKENS, LENGTHS, **{"max_new_tokens": NEW, **options})

    def test_generate_refuses_settings_of_another_batch(self) -> None:
        with pytest.raises(ValueError, match="one key and one setting per row"):
            generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW, settings=SampleSettings.create(2))

    def test_decode_refuses_a_cache_of_another_mesh(self) -> None:
        place = Partitioner.create(CONFIG, make_mesh((1, 8)))  # 4 kv heads on 8 devices
        wide = abstract_model(CONFIG, place, dtype=jnp.float32, quantized=True)
        with pytest.raises(ValueError, match="create it with the model's configuration, mesh and rules"):
            decode(wide, [3, 4, 5], empty())


class TestWhatIsPassedInPlaceOfAnother:
    """Each argument taken for another one, as happens: a sentence says what is wanted."""

    @pytest.mark.parametrize("step", [forward, decode], ids=["forward", "decode"])
    def test_no_model(self, step) -> None:
        with pytest.raises(ValueError, match="the model must be one that init or load makes, not a GrokConfig"):
            step(CONFIG, TOKENS, *([empty()] if step is decode else []))

    def test_no_cache(self) -> None:
        message = r"the cache must be a KVCache, such as model\.new_cache\(3, max_len\) makes, not a "
        with pytest.raises(ValueError, match=message + "ndarray"):
            prefill(model(), TOKENS, LENGTHS, LENGTHS)
        with pytest.raises(ValueError, match=message + "NoneType"):
            decode(model(), [3, 4, 5], None)
        settings, keys = SampleSettings.create(3), jax.random.split(jax.random.key(0), 3)
        with pytest.raises(ValueError, match=message + "NoneType"):
            decode_and_sample(model(), jnp.array([3, 4, 5]), None, settings, keys)
        with pytest.raises(ValueError, match="lengths must be integers, not KVCache"):
            prefill(model(), TOKENS, empty(), LENGTHS)

    def test_no_tokens(self) -> None:
        with pytest.raises(ValueError, match="tokens must be integers, not text"):
            decode(model(), "abc", empty())
        settings, keys = SampleSettings.create(3), jax.random.split(jax.random.key(0), 3)
        with pytest.raises(ValueError, match="tokens must be integers, not float32"):
            decode_and_sample(model(), jnp.ones(3), empty(), settings, keys)
        with pytest.raises(ValueError, match=r"tokens must have shape \[batch\] and not be empty"):
            decode_and_sample(model(), jnp.ones((3, 1), jnp.int32), empty(), settings, keys)

    @pytest.mark.parametrize("embeddings", [[[[0.5] * 64]], np.ones((1, 2, 64), np.int32)], ids=["list", "integers"])
    def test_no_embeddings(self, embeddings) -> None:
        with pytest.raises(ValueError, match=r"embeddings must be an array of floats.*, not (list|int32)"):
            forward(model(), embeddings=embeddings)

    def test_embeddings_of_another_size(self) -> None:
        with pytest.raises(ValueError, match=r"embeddings must have shape \[batch, length, 64\] .* \(1, 2, 63\)"):
            forward(model(), embeddings=np.ones((1, 2, 63), np.float32))

    def test_tokens_and_embeddings(self) -> None:
        lengths, embeddings = jnp.ones(1, jnp.int32), jnp.ones((1, 1, 64))
        for tokens, given in ((None, None), (jnp.array([[3]]), embeddings)):
            with pytest.raises(ValueError, match="tokens and embeddings stand for each other: give one of them"):
                model()(tokens, lengths, None, embeddings=given)


DONATED = "this cache was donated to a step, which returned another one in its memory: go on with that"


def test_a_cache_that_a_step_has_taken_is_refused_by_whatever_takes_a_cache() -> None:
    taken = empty()
    assert not taken.is_donated
    _, cache = decode(model(), [3, 4, 5], taken)
    assert taken.is_donated
    settings, keys = SampleSettings.create(3), jax.random.split(jax.random.key(0), 3)
    uses = [
        lambda: prefill(model(), TOKENS, LENGTHS, taken),
        lambda: decode(model(), [3, 4, 5], taken),
        lambda: decode_and_sample(model(), jnp.array([3, 4, 5]), taken, settings, keys),
        lambda: model()(jnp.array([[3], [4], [5]]), jnp.ones(3, jnp.int32), taken),
        lambda: taken.reset(0),
        lambda: taken.insert(empty(1), 0),
        lambda: cache.insert(taken, 0),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=DONATED):
            use()
    assert "lengths=donated to a step, which returned another cache" in repr(taken)
    kept = jax.tree.map(jnp.copy, cache)  # as the message says
    decode(model(), [3, 4, 5], kept)
    decode(model(), [3, 4, 5], cache)


def test_generate_fills_the_longest_sequence() -> None:
    room = CONFIG.max_seq_len - TOKENS.shape[1]
    np.testing.assert_array_equal(generate(model(), TOKENS, LENGTHS, max_new_tokens=room).lengths, [room] * 3)


def test_generate_draws_with_seed_0_and_the_row_s_number_by_default() -> None:
    keys = jnp.stack([jax.random.fold_in(jax.random.key(0), row) for row in range(3)])
    options = {"max_new_tokens": NEW, "settings": SampleSettings.create(3, temperature=1.0)}
    expected = generate(model(), TOKENS, LENGTHS, **options, keys=keys)
    np.testing.assert_array_equal(generate(model(), TOKENS, LENGTHS, **options).tokens, expected.tokens)


def test_inactive_rows_stay_as_they_are() -> None:
    _, cache = prefill(model(), TOKENS, LENGTHS, empty())
    before = jax.device_get(cache)
    _, after = decode(model(), [3, 4, 5], cache, active=[True, False, True])
    np.testing.assert_array_equal(after.lengths, [9, 5, 2])
    for half in ("keys", "values"):
        old, new = getattr(before, half), np.asarray(getattr(after, half))
        np.testing.assert_array_equal(new[:, 1], old[:, 1])
        assert (new[:, 0, :, 8] != old[:, 0, :, 8]).any()
        np.testing.assert_array_equal(new[:, 0, :, :8], old[:, 0, :, :8])


def test_prefill_leaves_rows_of_nothing_as_they_are() -> None:
    _, cache = prefill(model(), TOKENS, LENGTHS, empty())
    before = jax.device_get(cache)
    _, after = prefill(model(), TOKENS, [0, 3, 0], cache)
    np.testing.assert_array_equal(after.lengths, [8, 8, 1])
    for half in ("keys", "values"):
        np.testing.assert_array_equal(np.asarray(getattr(after, half))[:, [0, 2]], getattr(before, half)[:, [0, 2]])


@pytest.mark.parametrize(("mesh", "cache_dtype"), [((1, 1), "int8"), ((2, 4), "float32")], ids=str)
def test_prefill_into_some_rows_leaves_the_others(mesh: tuple[int, int], cache_dtype: str) -> None:
    """In two chunks, wherever the rows lie; what the others hold stays."""
    grok = random_model(CONFIG, dtype=jnp.float32, mesh=make_mesh(mesh))
    small, cache = (grok.new_cache(batch_size, 16, dtype=cache_dtype) for batch_size in (2, 8))
    cache = dataclasses.replace(cache, lengths=cache.lengths.at[5].set(7))
    before = jax.device_get(cache)
    for tokens, lengths in ((TOKENS[:2, :4], [3, 2]), (TOKENS[:2, 4:], [4, 1])):
        expected, small = prefill(grok, tokens, lengths, small)
        logits, cache = prefill(grok, tokens, lengths, cache, rows=[6, 1])
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [0, 3, 0, 0, 0, 7, 7, 0])
    others = [0, 2, 3, 4, 5, 7]
    for new, old, alone in zip(*map(jax.tree.leaves, (cache, before, small)), strict=True):
        if new.ndim == 1:
            continue
        new, old, alone = (np.asarray(leaf, np.float32) for leaf in (new, old, alone))
        np.testing.assert_array_equal(new[:, others], old[:, others])
        np.testing.assert_allclose(new[:, [6, 1]], alone, atol=1.0 if cache_dtype == "int8" and new.ndim == 5 else 1e-5)


def test_full_row_stays_as_it_is_under_a_callers_jit() -> None:
    """There is nobody to raise an error to: the row stays, its logits are NaN, the others go on."""
    cache = full_rows()
    before = jax.device_get(cache)
    logits, after = jax.jit(decode)(model(), jnp.array([3, 4, 5]), cache)
    np.testing.assert_array_equal(np.isnan(logits).all(axis=1), [True, False, False])
    np.testing.assert_array_equal(after.lengths, [16, 6, 2])
    np.testing.assert_array_equal(np.asarray(after.keys)[:, 0], before.keys[:, 0])


def test_every_step_works_under_a_callers_jit() -> None:
    @jax.jit
    def all_steps(model, tokens, lengths, cache):
        logits, cache = prefill(model, tokens, lengths, cache)
        result = generate(model, tokens, lengths, max_new_tokens=NEW)
        return forward(model, tokens), decode(model, logits.argmax(-1), cache), result

    everywhere, (following, cache), result = all_steps(model(), TOKENS, LENGTHS, empty())
    logits, expected_cache = prefill(model(), TOKENS, LENGTHS, empty())
    expected, expected_cache = decode(model(), logits.argmax(-1), expected_cache)
    np.testing.assert_allclose(everywhere, forward(model(), TOKENS), atol=1e-5)
    np.testing.assert_allclose(following, expected, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(expected_cache), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(result.tokens, generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW).tokens)


def test_prefill_drops_what_is_beyond_the_end_under_a_callers_jit() -> None:
    """What does not fit is dropped, and what the row held before is not."""
    cache = full_rows()
    before = jax.device_get(cache)
    _, after = jax.jit(prefill)(model(), TOKENS, jnp.array([8, 8, 8]), dataclasses.replace(cache, lengths=OVERFULL))
    np.testing.assert_array_equal(after.lengths, [16, 16, 9])
    np.testing.assert_array_equal(np.asarray(after.keys)[:, 0], before.keys[:, 0])
    np.testing.assert_array_equal(np.asarray(after.keys)[:, 1, :, :10], before.keys[:, 1, :, :10])
    fresh = np.asarray(after.keys)[:, 1, :, 10:]
    assert (np.abs(fresh).max(axis=(0, 1, 3)) > 0).all()


def test_the_cache_is_donated() -> None:
    cache = empty()
    logits, after = prefill(model(), TOKENS, LENGTHS, cache)
    assert cache.keys.is_deleted()
    decode(model(), logits.argmax(-1), after)
    assert after.keys.is_deleted()


@pytest.mark.parametrize("chunks", [[8], [3, 3, 2], [1] * 8, [7, 1]], ids=str)
def test_a_prompt_gives_the_same_logits_whole_in_chunks_or_token_by_token(chunks: list[int]) -> None:
    expected = np.asarray(forward(model(), TOKENS))
    cache, done = empty(), 0
    for size in chunks:
        chunk = TOKENS[:, done : done + size]
        if size == 1:
            logits, cache = decode(model(), chunk[:, 0], cache)
        else:
            logits, cache = prefill(model(), np.pad(chunk, ((0, 0), (0, 8 - size))), np.full(3, size), cache)
        done += size
        np.testing.assert_allclose(logits, expected[:, done - 1], atol=2e-5)


class TestGenerate:
    def test_greedy_by_default(self) -> None:
        result = generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW)
        logits, cache = prefill(model(), TOKENS, LENGTHS, empty())
        for step in range(NEW):
            token = np.asarray(logits).argmax(-1)
            np.testing.assert_array_equal(result.tokens[:, step], token)
            expected = jax.nn.log_softmax(logits)[np.arange(3), token]
            np.testing.assert_allclose(result.logprobs[:, step], expected, atol=1e-4)
            logits, cache = decode(model(), token, cache)
        np.testing.assert_array_equal(result.lengths, [NEW] * 3)

    def test_a_row_draws_with_its_settings_and_the_key_of_each_position(self) -> None:
        settings = SampleSettings.create(3, temperature=[0.7, 1.0, 1.3], top_p=0.9, top_k=50)
        keys = jax.random.split(jax.random.key(1), 3)
        result = generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW, settings=settings, keys=keys)
        assert (result.tokens != generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW).tokens).any()
        draw = jax.jit(lambda logits, positions: sample_token(row_keys(keys, positions), logits, settings))
        logits, cache = prefill(model(), TOKENS, LENGTHS, empty())
        drawn = fused = draw(logits, cache.lengths)
        fused_cache = jax.tree.map(jnp.copy, cache)
        for step in range(NEW):
            for made in (drawn, fused):
                np.testing.assert_array_equal(result.tokens[:, step], made.token_id)
                np.testing.assert_allclose(result.logprobs[:, step], made.logprob, atol=1e-5)
            logits, cache = decode(model(), drawn.token_id, cache)
            drawn = draw(logits, cache.lengths)
            fused, fused_cache = decode_and_sample(model(), fused.token_id, fused_cache, settings, keys)

    def test_stops_row_by_row_and_as_soon_as_all_have_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        free = np.asarray(generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW).tokens)
        eos, calls = int(free[0, 2]), []

        def counted(*args):
            jax.debug.callback(lambda: calls.append(1))
            return logits(*args)

        logits = Grok.logits
        monkeypatch.setattr(Grok, "logits", counted)  # read while this end of sequence is compiled
        result = generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW, eos_id=eos)
        for row in range(3):
            at = np.flatnonzero(free[row] == eos)
            length = int(at[0]) + 1 if at.size else NEW
            assert result.lengths[row] == length
            np.testing.assert_array_equal(result.tokens[row, :length], free[row, :length])
            np.testing.assert_array_equal(result.tokens[row, length:], CONFIG.pad_id)
            np.testing.assert_array_equal(result.logprobs[row, length:], 0)
        assert result.lengths[0] <= 3
        jax.effects_barrier()
        assert len(calls) == result.lengths.max()  # once after the prefill, then in each step

        # Alone, the row that ends early ends the loop; the others are not even begun.
        calls.clear()
        only_first = SampleSettings.create(3, temperature=0.0, active=[True, False, False])
        result = generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW, eos_id=eos, settings=only_first)
        jax.effects_barrier()
        assert len(calls) == result.lengths[0] < NEW
        np.testing.assert_array_equal(result.lengths[1:], [0, 0])

    def test_inactive_rows_make_nothing(self) -> None:
        settings = SampleSettings.create(3, temperature=0.0, active=[True, False, True])
        result = generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW, settings=settings)
        np.testing.assert_array_equal(result.lengths, [NEW, 0, NEW])
        np.testing.assert_array_equal(result.tokens[1], CONFIG.pad_id)
        everyone = generate(model(), TOKENS, LENGTHS, max_new_tokens=NEW)
        np.testing.assert_array_equal(result.tokens[::2], everyone.tokens[::2])
