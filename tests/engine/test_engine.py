"""The engine by hand, over a fake model: which tokens and which text come out."""

import itertools
import logging

import numpy as np
import pytest
from fake_steps import (
    EOS,
    VOCAB,
    FakeModel,
    Letters,
    continuation,
    expected,
    make_engine,
    prompt_logprobs,
    scripted,
)

from grokjax.config import GrokConfig
from grokjax.request import Request
from grokjax.tokenizer import SentencePieceTokenizer


class TestResults:
    def test_each_request_gets_its_tokens_and_why_they_ended(self) -> None:
        engine = make_engine()
        prompts = [[3, 4, 5], [6], list(range(3, 30)), [9, 9]]
        handles = [engine.submit(Request(p, max_new_tokens=40, seed=i)) for i, p in enumerate(prompts)]
        ended = engine.run()
        assert sorted(map(id, ended)) == sorted(map(id, handles))
        for seed, (prompt, handle) in enumerate(zip(prompts, handles, strict=True)):
            done = handle.completion
            limit = min(40, 64 - len(prompt))
            assert list(done.token_ids) == expected(prompt, limit=limit, seed=seed)
            assert done.finish_reason == ("stop" if done.token_ids[-1] == EOS else "length")
            assert list(done.prompt_ids) == prompt
            assert (done.text, done.error, done.logprobs, done.prompt_logprobs) == ("", None, None, None)
        assert not engine.has_work

    def test_stop_ids_end_a_text_and_an_ignored_end_does_not(self) -> None:
        free = continuation([7, 8], 30)
        assert EOS in free[:-1]
        stop = next(token for token in free if token != EOS)
        engine = make_engine()
        [ignoring] = engine.generate([[7, 8]], max_new_tokens=30, ignore_eos=True)
        assert list(ignoring.token_ids) == free
        [stopped] = engine.generate([[7, 8]], max_new_tokens=30, ignore_eos=True, stop_ids=[stop])
        assert list(stopped.token_ids) == free[: free.index(stop) + 1]
        assert stopped.finish_reason == "stop"

    def test_the_tokenizer_says_which_token_ends_a_text(self) -> None:
        free = continuation([7, 8], 30)
        end = next(token for token in free if token != EOS)
        tokenizer = Letters()
        tokenizer.eos_id = end
        [done] = make_engine(tokenizer).generate([[7, 8]], max_new_tokens=30)
        assert (list(done.token_ids), done.finish_reason) == (free[: free.index(end) + 1], "stop")

    def test_a_prefix_of_the_smallest_bucket_is_long_enough_to_be_reused(self) -> None:
        engine = make_engine(prefill_buckets=(4, 8))
        for prompt, hits in (([3, 4, 5, 6, 7, 8], 0), ([3, 4, 5, 9, 9, 9], 0), ([3, 4, 5, 6, 10, 10], 1)):
            engine.generate([prompt], max_new_tokens=2)
            assert engine.metrics().prefix_hits == hits

    def test_the_end_of_the_slot_ends_the_text(self) -> None:
        engine = make_engine(max_len=12)
        [done] = engine.generate([[5] * 11], max_new_tokens=9, ignore_eos=True)
        assert len(done.token_ids) == 1
        assert done.finish_reason == "length"

    def test_no_new_tokens_may_be_asked_for(self) -> None:
        engine = make_engine()
        [done] = engine.generate([[3, 4, 5]], max_new_tokens=0, prompt_logprobs=True)
        assert (done.token_ids, done.finish_reason) == ((), "length")
        assert prompt_logprobs(done) == [None, -4.0, -6.0]

    def test_a_prompt_that_fills_its_slot_is_scored_if_nothing_is_to_follow(self) -> None:
        engine, prompt = make_engine(slots=2, max_len=12), list(range(3, 15))
        for done in engine.generate([prompt] * 3, max_new_tokens=0, prompt_logprobs=True, n=2):
            assert (done.token_ids, done.finish_reason) == ((), "length")
            assert prompt_logprobs(done) == [None, *(-float(t + p) for p, t in enumerate(prompt[1:]))]
        [after] = engine.generate([prompt[:11]], max_new_tokens=1, ignore_eos=True)
        assert list(after.token_ids) == continuation(prompt[:11], 1)
        for options, problem in (({"max_new_tokens": 1}, "11 leave room"), ({"max_new_tokens": 0}, "slot holds 12")):
            [refused] = engine.generate([[*prompt, 3][: 12 + (not options["max_new_tokens"])]], **options)
            assert problem in str(refused.error)

    def test_samples_are_requests_with_the_next_seeds_and_one_prefill(self) -> None:
        prompt = list(range(3, 14))
        engine = make_engine(slots=2, reuse_prefixes=False)
        done = engine.generate([prompt], max_new_tokens=6, n=5, seed=2**32 - 2, ignore_eos=True)
        seeds = [(2**32 - 2 + i) % 2**32 for i in range(5)]
        assert [list(d.token_ids) for d in done] == [continuation(prompt, 6, seed=seed) for seed in seeds]
        assert [d.sample for d in done] == list(range(5))
        metrics = engine.metrics()
        assert metrics.prefix_hits == 4
        assert metrics.reused_tokens == 4 * len(prompt)

    def test_logprobs_are_those_of_the_drawn_tokens(self) -> None:
        engine = make_engine()
        [done] = engine.generate([[3, 4]], max_new_tokens=4, logprobs=2, ignore_eos=True)
        assert [entry.token_id for entry in done.logprobs] == list(done.token_ids)
        for entry in done.logprobs:
            token = entry.token_id
            assert entry.logprob == pytest.approx(-token / 8)
            assert entry.top == ((token, -token / 8), ((token + 1) % VOCAB, -((token + 1) % VOCAB) / 8))
        [done] = engine.generate([[3, 4]], max_new_tokens=2, logprobs=0)
        assert all(entry.top == () for entry in done.logprobs)

    def test_prompt_logprobs_join_over_chunks_and_are_every_samples(self) -> None:
        prompt = list(range(3, 24))
        engine = make_engine(model=(model := FakeModel()))
        engine.generate([prompt], max_new_tokens=1)  # a prefix that must not be reused
        done = engine.generate([prompt], max_new_tokens=2, prompt_logprobs=True, n=2)
        for sample in done:
            assert prompt_logprobs(sample) == [None, *(-float(t + p) for p, t in enumerate(prompt[1:]))]
        names = [entry[0] for entry in model.steps.log]
        assert names.count("score") == 3  # of both samples together

    def test_half_of_the_prompt_logprobs_are_none(self) -> None:
        engine = make_engine(model=(model := FakeModel()))
        handle = engine.submit(Request(list(range(3, 24)), prompt_logprobs=True))
        engine.step()
        engine.step()
        assert [entry[0] for entry in model.steps.log if entry[0] != "wait"] == ["score", "read"] * 2  # of three
        engine.cancel(handle)
        assert handle.completion.prompt_logprobs is None

    def test_masks_and_biases_belong_to_their_request(self) -> None:
        allowed = np.zeros(VOCAB, bool)
        allowed[[5, 9]] = True
        row = np.where(allowed, 0, -1e10)
        engine = make_engine(slots=1)
        for _ in range(2):
            [masked] = engine.generate([[3, 4]], max_new_tokens=8, allowed_tokens=allowed)
            assert list(masked.token_ids) == continuation([3, 4], 8, bias=row)
            [biased] = engine.generate([[3, 4]], max_new_tokens=8, logit_bias={EOS: -np.inf})
            assert list(biased.token_ids) == continuation([3, 4], 8, bias=np.where(np.arange(VOCAB) == EOS, -1e10, 0))
            [plain] = engine.generate([[3, 4]], max_new_tokens=8, ignore_eos=True)
            assert list(plain.token_ids) == continuation([3, 4], 8)

    def test_ids_that_the_tokenizer_has_not_are_never_drawn(self) -> None:
        """Of a model whose vocabulary is padded. A prompt may have them, and is scored with them."""

        class Fewer(Letters):
            vocab_size = 12

        engine, known = make_engine(Fewer()), np.where(np.arange(VOCAB) < 12, 0, -1e10)
        for sample in engine.generate(["abc", "b"], max_new_tokens=20, ignore_eos=True, n=2):
            assert list(sample.token_ids) == continuation(sample.prompt_ids, 20, seed=sample.sample, bias=known)
        [scored] = engine.generate([[3, 30]], max_new_tokens=5, ignore_eos=True, prompt_logprobs=True)
        assert scored.error is None
        assert prompt_logprobs(scored) == [None, -30]
        mask = np.arange(VOCAB) >= 12
        assert "leave no token" in str(engine.generate(["a"], allowed_tokens=mask)[0].error)

    def test_a_vocabulary_that_is_not_padded_needs_no_mask(self) -> None:
        engine = make_engine(Letters(), model=(model := FakeModel()))
        engine.generate(["abc", "b"], max_new_tokens=5)
        assert not any(entry[2].biased.any() for entry in model.steps.log if entry[0] in ("begin", "decode"))

    def test_timings_add_up(self) -> None:
        ticks = itertools.count()
        engine = make_engine(slots=1, clock=lambda: float(next(ticks)))
        first, second = (engine.submit(Request([3, 4 + i], max_new_tokens=3)) for i in range(2))
        engine.run()
        for handle in (first, second):
            times = handle.completion.timings
            assert times.first_token == times.queue + times.prefill
            assert times.total == times.first_token + times.decode
        assert second.completion.timings.queue > first.completion.timings.first_token


class TestPrefixes:
    PROMPT = (*range(3, 23),)

    def test_a_conversation_goes_on_from_its_row(self) -> None:
        """The second turn begins with the first turn's prompt and answer, which the row holds already."""
        engine = make_engine(slots=2)
        [first] = engine.generate([self.PROMPT], max_new_tokens=10, ignore_eos=True)
        turn = [*self.PROMPT, *first.token_ids, 4, 5]
        [second] = engine.generate([turn], max_new_tokens=5, ignore_eos=True)
        assert list(second.token_ids) == continuation(turn, 5)
        assert engine.metrics().reused_tokens >= len(self.PROMPT) + 7

    def test_a_prefix_is_shared_with_one_that_runs(self) -> None:
        engine = make_engine(slots=3)
        one = engine.submit(Request(self.PROMPT, max_new_tokens=30, ignore_eos=True))
        for _ in range(6):
            engine.step()
        others = [[*self.PROMPT[:12], 30, 31], list(self.PROMPT), [*self.PROMPT, 7]]
        handles = [engine.submit(Request(p, max_new_tokens=5, ignore_eos=True, seed=3)) for p in others]
        engine.run()
        for prompt, handle in zip(others, handles, strict=True):
            assert list(handle.completion.token_ids) == continuation(prompt, 5, seed=3)
        assert list(one.completion.token_ids) == continuation(self.PROMPT, 30)
        metrics = engine.metrics()
        assert metrics.prefix_hits == 3
        assert metrics.reused_tokens == 12 + 20 + 20
        assert metrics.prefix_hit_rate == 3 / 4


class TestText:
    def stream(self, tokens: list[int], **options) -> tuple[list[str], object]:
        engine = make_engine(Letters(), make_steps=scripted(tokens))
        handle = engine.submit(Request("a", max_new_tokens=len(tokens), **options))
        pieces = list(engine.stream(handle))
        assert "".join(piece.text for piece in pieces) == handle.completion.text
        assert [piece.token_id for piece in pieces] == [*handle.completion.token_ids, None]
        assert pieces[-1].finish_reason == handle.completion.finish_reason
        return [piece.text for piece in pieces], handle.completion

    def test_characters_are_whole(self) -> None:
        texts, done = self.stream([3, 30, 31, 4])
        assert texts == ["a", "", "é", "b", ""]
        assert done.text == "aéb"

    def test_an_unfinished_character_at_the_end_is_shown_as_such(self) -> None:
        assert self.stream([3, 30])[0] == ["a", "", "\ufffd"]

    def test_a_stop_string_over_several_tokens_is_not_shown(self) -> None:
        texts, done = self.stream([3, 4, 5, 6, 7, 8], stop="cde")
        assert texts == ["a", "b", "", "", "", ""]
        assert (done.text, done.finish_reason, len(done.token_ids)) == ("ab", "stop", 5)

    def test_what_was_no_stop_string_after_all_is_shown(self) -> None:
        texts, done = self.stream([3, 4, 5, 3, 4], stop=["bcd", "ax"])
        assert texts == ["", "a", "", "bc", "a", "b"]
        assert done.finish_reason == "length"

    def test_a_stop_string_ends_the_text_inside_a_split_character(self) -> None:
        texts, done = self.stream([3, 30, 31, 4], stop="é")
        assert texts == ["a", "", "", ""]
        assert (done.text, done.finish_reason, done.token_ids) == ("a", "stop", (3, 30, 31))

    def test_the_end_token_gives_no_text(self) -> None:
        texts, done = self.stream([3, 4, EOS, 5], stop=["bx"])
        assert texts == ["a", "", "", "b"]
        assert (done.text, done.token_ids) == ("ab", (3, 4, EOS))

    def test_a_first_word_has_its_space(self, trained_tokenizer: SentencePieceTokenizer) -> None:
        """Prompt and text together are what the model continued, and a stop string with the space is found."""
        the, word = trained_tokenizer.encode("the"), trained_tokenizer.encode("License")
        model = FakeModel(GrokConfig.tiny().replace(max_seq_len=256))
        engine = make_engine(trained_tokenizer, model=model, make_steps=scripted(word))
        for prompt in ("the", the):
            handle = engine.submit(Request(prompt, max_new_tokens=len(word)))
            assert "".join(piece.text for piece in engine.stream(handle)) == handle.completion.text == " License"
            [stopped] = engine.generate([prompt], max_new_tokens=len(word), stop=" Lic")
            assert (stopped.text, stopped.finish_reason) == ("", "stop")
        [alone] = engine.generate([[trained_tokenizer.bos_id]], max_new_tokens=len(word))
        assert alone.text == "License"

    def test_a_character_that_the_prompt_begins_is_of_the_text(self) -> None:
        engine = make_engine(Letters(), make_steps=scripted([31, 4]))
        assert engine.generate([[30]], max_new_tokens=2)[0].text == "éb"

    def test_the_beginning_of_sequence_comes_on_request(self) -> None:
        engine = make_engine(Letters(), add_bos=True)
        [text, ids] = engine.generate(["a", [3]], max_new_tokens=2)
        assert (text.prompt_ids, ids.prompt_ids) == ((1, 3), (3,))

    def test_streams_are_read_side_by_side(self) -> None:
        engine = make_engine()
        handles = [engine.submit(Request([3 + i], max_new_tokens=5, ignore_eos=True, n=2)) for i in range(2)]
        pieces = list(zip(*(engine.stream(handle) for handle in handles), strict=True))
        for i, handle in enumerate(handles):
            for sample in handle.samples:
                mine = [p[i].token_id for p in pieces if p[i].sample == sample.sample and p[i].token_id is not None]
                assert mine == list(sample.token_ids) == continuation([3 + i], 5, seed=sample.sample)


def test_the_end_may_complete_a_stop_string() -> None:
    engine = make_engine(Letters(), make_steps=scripted([3, 30]))
    handle = engine.submit(Request([5], max_new_tokens=2, stop="\ufffd"))
    engine.run()
    assert (handle.completion.text, handle.completion.finish_reason) == ("a", "stop")


def test_a_warm_up_forgets_what_the_rows_held() -> None:
    engine, prompt = make_engine(), list(range(3, 14))
    for _ in range(2):
        [done] = engine.generate([prompt], max_new_tokens=5, ignore_eos=True)
        assert list(done.token_ids) == continuation(prompt, 5)
        engine.warm_up()
    assert engine.metrics().reused_tokens == 0


def test_a_warm_up_for_one_prompt_compiles_only_what_that_prompt_needs() -> None:
    engine = make_engine(model=(model := FakeModel()))
    alone = ["begin", "decode", "prefill"]
    for length, buckets in ((3, [4]), (8, [8]), (11, [8, 4]), (63, [8])):
        steps = engine.warm_up(prompt_len=length)
        assert [step.shape for step in steps] == [(3,), (3,), *((1, bucket) for bucket in buckets)]
        assert model.steps.compiled[-len(steps) :] == [(step.name, step.shape) for step in steps]
        assert sorted({step.name for step in steps}) == alone
    guessing = make_engine(max_guesses=5)
    counts = [step.shape for step in guessing.warm_up(prompt_len=3) if step.name == "decode_guesses"]
    assert counts == [(3, 1), (3, 4), (3, 6)]
    whole = {(step.name, step.shape) for step in engine.warm_up()}
    assert {("score", (1, 4)), ("prefill", (2, 8)), ("share", ())} <= whole == set(model.steps.compiled[-len(whole) :])
    for length in (0, 64, 2.5):
        with pytest.raises(ValueError, match=r"prompt_len=.* must be an integer between 1 and 63"):
            engine.warm_up(prompt_len=length)


def test_a_warm_up_tells_each_step_to_a_callback_else_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    engine, told = make_engine(), list[tuple[str, int, int]]()
    with caplog.at_level(logging.INFO, logger="grokjax"):
        steps = engine.warm_up(progress=lambda step, done, total: told.append((step.name, done, total)))
        assert caplog.messages == []
        engine.warm_up()
    assert told == [(step.name, number, len(steps)) for number, step in enumerate(steps, start=1)]
    assert len(caplog.messages) == len(steps)
    assert caplog.messages[1].startswith(f"compiled 2 of {len(steps)} steps: decode 3 in ")
