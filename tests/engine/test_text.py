"""Prompt in, text out: the release's own continuations, and the rules of streaming and stopping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY_DENSE, random_model
from goldens import load_e2e

from grokjax import ByteTokenizer, TextGenerator, generate, load, load_tokenizer, make_mesh
from grokjax.model import ModelSteps
from grokjax.sampling import SampleSettings

CONFIG = TINY_DENSE.replace(max_seq_len=64)


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return TextGenerator(random_model(CONFIG, dtype=jnp.float32), ByteTokenizer(CONFIG.vocab_size))


@pytest.mark.release_tokenizer
@pytest.mark.thorough  # of a command and of the release's script everybody sees one of them
def test_greedy_texts_of_the_release(release_tokenizer_path) -> None:
    golden = load_e2e()
    model = load(golden.checkpoint, golden.config, make_mesh((1, 2)), jnp.float32)
    generator = TextGenerator(model, load_tokenizer(release_tokenizer_path))
    # The release gives two tokens where one is asked for; ours gives what is asked for.
    requests = [r for r in golden.requests if r["temperature"] == 0.01 and r["strict_identical"] and r["max_len"] > 1]
    assert len(requests) >= 5
    for request in requests:
        result = generator.generate(
            request["prompt"],
            max_new_tokens=request["max_len"],
            temperature=0.01,
            top_p=request["nucleus_p"],
            seed=request["rng_seed"],
            ignore_eos=True,
        )
        assert list(result.prompt_ids) == request["prompt_ids"]
        assert list(result.token_ids) == request["token_ids"]
        assert generator.tokenizer.decode(result.token_ids) == request["text"]
        assert request["prompt"] + result.text == generator.tokenizer.decode(result.prompt_ids + result.token_ids)
        assert result.finish_reason == "length"


def test_pieces_join_to_the_text(generator: TextGenerator) -> None:
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    whole = generator.generate("hello", **options)
    pieces = list(generator.stream("hello", **options))
    assert "".join(pieces) == whole.text
    assert len(pieces) == len(whole.token_ids) + 1


def test_same_tokens_as_generate(generator: TextGenerator) -> None:
    """The host's loop and the device's loop draw the same tokens from the same key."""
    ids = np.array([generator.tokenizer.encode("hello")])
    settings = SampleSettings.create(1, temperature=0.8, top_p=0.9)
    keys = jax.random.key(5)[None]
    lengths = np.array([ids.shape[1]])
    on_device = generate(generator.model, ids, lengths, max_new_tokens=12, settings=settings, keys=keys)
    on_host = generator.generate("hello", max_new_tokens=12, temperature=0.8, top_p=0.9, seed=5, ignore_eos=True)
    np.testing.assert_array_equal(on_device.tokens[0], on_host.token_ids)


def test_stops_at_the_end_token(generator: TextGenerator) -> None:
    ids = generator.generate("hello", max_new_tokens=12, temperature=0, ignore_eos=True).token_ids
    tokenizer = generator.tokenizer
    first = next(i for i, token in enumerate(ids) if token not in ids[:i])
    stopping = TextGenerator(generator.model, _EndsAt(tokenizer, ids[first]))
    result = stopping.generate("hello", max_new_tokens=12, temperature=0)
    assert result.token_ids == ids[: first + 1]
    assert result.finish_reason == "stop"
    assert result.text == tokenizer.decode(ids[:first])
    assert "".join(stopping.stream("hello", max_new_tokens=12, temperature=0)) == result.text
    ignored = stopping.generate("hello", max_new_tokens=first + 1, temperature=0, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == (ids[: first + 1], "length")


def test_stop_strings_end_the_text(generator: TextGenerator) -> None:
    options = {"max_new_tokens": 20, "seed": 3, "ignore_eos": True}
    whole = generator.generate("hello", **options)
    stop = whole.text[4:6]
    stopped = generator.generate("hello", stop=stop, **options)
    assert stopped.text == whole.text[: whole.text.find(stop)]
    assert stopped.finish_reason == "stop"
    assert 0 < len(stopped.token_ids) < 20
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    pieces = list(generator.stream("hello", stop=["never there", stop], **options))
    assert "".join(pieces) == stopped.text
    assert len(pieces) == len(stopped.token_ids) + 1


def test_a_stop_string_that_does_not_come_whole(generator: TextGenerator) -> None:
    options = {"max_new_tokens": 20, "seed": 3, "ignore_eos": True}
    whole = generator.generate("hello", **options)
    held = generator.generate("hello", stop=whole.text[-2:] + "never there", **options)
    assert (held.text, held.finish_reason) == (whole.text, "length")


class _EndsAt:
    """A tokenizer with another end-of-sequence token."""

    def __init__(self, tokenizer, eos_id: int):
        self.tokenizer, self.eos_id = tokenizer, eos_id

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)


def test_long_prompts_are_taken_in_chunks(generator: TextGenerator) -> None:
    """A prompt of several buckets continues as the device's prefill of all of it does."""
    prompt = "abcdefghij" * 4
    short = TextGenerator(generator.model, generator.tokenizer)
    ids = np.array([generator.tokenizer.encode(prompt)])
    expected = generate(generator.model, ids, np.array([40]), max_new_tokens=4)
    result = short.generate(prompt, max_new_tokens=4, temperature=0, ignore_eos=True)
    np.testing.assert_array_equal(expected.tokens[0], result.token_ids)


def test_a_stream_that_is_left_or_interrupted_leaves_a_usable_generator(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": 6, "seed": 3, "ignore_eos": True}
    whole = generator.generate("hello", **options)
    left, beside = generator.stream("hello", **options), generator.stream("hello", **options)
    first = next(left)
    assert next(beside) == first
    left.close()
    assert first + "".join(beside) == whole.text

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ModelSteps, "decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generator.generate("hello", **options)
    assert generator.generate("hello", **options) == whole


def test_a_step_is_under_way_while_a_piece_is_shown(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next token is being computed while its reader has the last one; after the last of all nothing is.

    The first is shown before the step that makes the second, which may have to be compiled.
    """
    dispatched = []
    decode = ModelSteps.decode
    monkeypatch.setattr(ModelSteps, "decode", lambda *arguments: dispatched.append(1) or decode(*arguments))
    counts = [len(dispatched) for _ in generator.stream("hello", max_new_tokens=5, ignore_eos=True)]
    assert counts == [0, 2, 3, 4, 4, 4]


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = random_model(CONFIG, dtype=jnp.float32)
    model.final_norm.scale.set_value(model.final_norm.scale.get_value() * np.nan)
    broken = TextGenerator(model, ByteTokenizer(CONFIG.vocab_size))
    message = "the model's logits are not finite: look for NaN or infinite weights with grokjax verify --finite"
    with pytest.raises(ValueError, match=message):
        broken.generate("hello")
    pieces = broken.stream("hello")
    assert next(pieces) == ""
    with pytest.raises(ValueError, match=message):
        next(pieces)


def test_ends_where_the_cache_ends(generator: TextGenerator) -> None:
    short = TextGenerator(generator.model, generator.tokenizer, max_len=12)
    result = short.generate("hello", max_new_tokens=100, temperature=0, ignore_eos=True)
    assert len(result.token_ids) == 12 - len(result.prompt_ids)
    assert result.finish_reason == "length"


def test_a_padded_vocabulary_is_never_drawn_from(generator: TextGenerator) -> None:
    """Where the tokenizer knows fewer tokens than the model."""
    padded = TextGenerator(generator.model, ByteTokenizer(300))
    result = padded.generate("hello", max_new_tokens=30, temperature=5.0, ignore_eos=True)
    assert max(result.token_ids) < 300
    assert result.finish_reason == "length"


def test_beginning_of_sequence_on_request(generator: TextGenerator) -> None:
    with_bos = TextGenerator(generator.model, generator.tokenizer, add_bos=True)
    assert with_bos.encode("") == [generator.tokenizer.bos_id]
    assert with_bos.encode("a") == [generator.tokenizer.bos_id, *generator.encode("a")]


def test_errors_before_any_work(generator: TextGenerator) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        generator.stream("")
    with pytest.raises(ValueError, match="the prompt has 64 tokens and at most 63 leave room"):
        generator.stream("a" * 64)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be an integer, 1 or more"):
        generator.stream("a", max_new_tokens=0)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed={seed} must be an integer between 0 and 4294967295"):
            generator.stream("a", seed=seed)
    with pytest.raises(ValueError, match=r"stop=\[''\] must be strings of at least one character"):
        generator.stream("a", stop=[""])
    with pytest.raises(ValueError, match="temperature"):
        generator.stream("a", temperature=-1)
    with pytest.raises(ValueError, match="max_len=65 must be between 2 and max_seq_len=64"):
        TextGenerator(generator.model, generator.tokenizer, max_len=65)
    with pytest.raises(ValueError, match="the tokenizer has 600 tokens, the model 512"):
        TextGenerator(generator.model, ByteTokenizer(600))
