"""The engine by hand, over a fake model: what comes out, in which order, and what one request can do to another."""

import dataclasses
import gc
import itertools
import tracemalloc
import weakref

import numpy as np
import pytest
from builders import still_held
from fake_steps import EOS, VOCAB, FakeModel, FakePending, FakeSteps, Letters, continuation, entry_after

from grokjax.engine import Engine, QueueFullError
from grokjax.engine.metrics import Meter
from grokjax.request import Request


def make_engine(tokenizer=None, *, model: FakeModel | None = None, **options) -> Engine:
    defaults = {"slots": 3, "max_len": 64, "prefill_buckets": (4, 8), "make_steps": FakeSteps}
    return Engine(model or FakeModel(), tokenizer, **{**defaults, **options})


def expected(prompt: list[int], *, limit: int, seed: int = 0, stop_ids: tuple[int, ...] = (EOS,)) -> list[int]:
    tokens = continuation(prompt, limit, seed=seed)
    ends = [number for number, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def scripted(tokens: list[int]):
    """Steps that draw given tokens, whatever the prompt."""

    class Scripted(FakeSteps):
        def draw_rows(self, settings, ends, number):
            pending = super().draw_rows(settings, ends, number)
            for row, entries in enumerate(self.rows):
                at = len(entries) - 1  # prompts of one token
                pending.drawn.token_ids[row] = tokens[at] if 0 <= at < len(tokens) else 3
            return pending

    return Scripted


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
        assert done.prompt_logprobs == (None, -4.0, -6.0)

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
            assert sample.prompt_logprobs == (None, *(-float(t + p) for p, t in enumerate(prompt[1:])))
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


class TestSchedule:
    def test_priority_goes_before_arrival(self) -> None:
        engine = make_engine(slots=1)
        handles = [engine.submit(Request([3 + i], max_new_tokens=2, priority=p)) for i, p in enumerate((0, 0, 5))]
        assert engine.run() == [handles[2], handles[0], handles[1]]

    def test_the_next_step_is_dispatched_before_the_last_is_read(self) -> None:
        engine = make_engine(model=(model := FakeModel()))
        engine.submit(Request([3, 4], max_new_tokens=5, ignore_eos=True))
        engine.run()
        log = [entry[:2] for entry in model.steps.log]
        assert [name for name, _ in log[:3]] == ["prefill", "begin", "decode"]
        numbers = {name: [n for kind, n in log if kind == name] for name in ("begin", "decode", "read")}
        for before, after in itertools.pairwise(numbers["decode"]):
            assert log.index(("decode", after)) < log.index(("read", before))
        assert numbers["read"] == [*numbers["begin"], *numbers["decode"]]
        assert len(numbers["decode"]) == 4  # not one more than is returned

    def test_a_finished_slot_is_filled_at_the_next_step(self) -> None:
        engine = make_engine(model=(model := FakeModel()), slots=2, reuse_prefixes=False)
        engine.submit(Request([3], max_new_tokens=30, ignore_eos=True))
        engine.submit(Request([4], max_new_tokens=3, ignore_eos=True))
        late = engine.submit(Request([5], max_new_tokens=3, ignore_eos=True))
        while not late.is_done:
            engine.step()
        decodes = [int(entry[2].active.sum()) for entry in model.steps.log if entry[0] == "decode"]
        assert decodes == [2, 2, 2, 2, 1]  # two tokens after the first for each of the short ones, side by side

    @pytest.mark.parametrize("chunks", [1, 2, 3])
    def test_a_long_prompt_stalls_nobody_for_more_than_a_chunk(self, chunks: int) -> None:
        engine = make_engine(model=(model := FakeModel()), slots=3)
        running = engine.submit(Request([3], max_new_tokens=40, ignore_eos=True))
        engine.step()
        engine.submit(Request([5] * 50, max_new_tokens=2))
        for _ in range(chunks):
            engine.step()
        short = engine.submit(Request([7, 8], max_new_tokens=2, ignore_eos=True))
        before = len(running.pieces)
        engine.step()
        assert short.pieces
        engine.run()
        assert before == 2 + chunks  # its first, the one that was under way, and one beside each chunk
        names = [entry[0] for entry in model.steps.log]
        assert ("prefill", "prefill") not in itertools.pairwise(names)

    @pytest.mark.parametrize("is_decoding", [False, True])
    @pytest.mark.parametrize("max_new_tokens", [0, 2])
    def test_the_device_has_one_chunk_of_a_prompt_at_a_time(self, is_decoding: bool, max_new_tokens: int) -> None:
        """So that whoever comes next waits for no more than that: each is done before another is dispatched."""
        engine = make_engine(model=(model := FakeModel()), slots=4, reuse_prefixes=False)
        if is_decoding:
            engine.submit(Request([3], max_new_tokens=9, ignore_eos=True))
        for token in (4, 5):
            engine.submit(Request([token] * 21, max_new_tokens=max_new_tokens, ignore_eos=True))
        engine.run()
        names = [entry[0] for entry in model.steps.log if entry[0] in ("prefill", "wait")]
        assert len([name for name in names if name == "prefill"]) == 6 + is_decoding
        assert ("prefill", "prefill") not in itertools.pairwise(names)

    def test_a_chunk_of_a_long_prompt_goes_alone(self) -> None:
        """Beside a running request, which would else wait for the chunks of all of them."""
        engine = make_engine(model=(model := FakeModel()), slots=6)
        for token in range(3, 7):
            engine.submit(Request([token] * 21, max_new_tokens=2))
        engine.run()
        assert {entry[2] for entry in model.steps.log if entry[0] == "prefill"} == {(1, 8)}

    def test_prompts_of_a_bucket_go_together(self) -> None:
        engine = make_engine(model=(model := FakeModel()), slots=4)
        for i in range(4):
            engine.submit(Request([3 + i] * 3, max_new_tokens=2))
        engine.step()
        assert model.steps.log[0][2] == (4, 4)

    def test_a_full_queue_refuses_and_frees_up(self) -> None:
        engine = make_engine(slots=1, max_queue=2)
        handles = [engine.submit(Request([3 + i], max_new_tokens=2)) for i in range(2)]
        with pytest.raises(QueueFullError, match="2 samples are waiting and max_queue=2"):
            engine.submit(Request([9]))
        engine.step()
        handles.append(engine.submit(Request([9], max_new_tokens=2)))
        assert len(engine.run()) == 3
        assert all(handle.is_done for handle in handles)

    def test_as_completed_takes_what_the_queue_has_room_for(self) -> None:
        engine, taken = make_engine(slots=1, max_queue=2), []

        def requests():
            for i in range(9):
                taken.append(i)
                yield Request([3 + i], max_new_tokens=2, ignore_eos=True)

        done = engine.as_completed(requests())
        next(done)
        assert len(taken) <= 5
        assert len(list(done)) == 8

    def test_metrics_are_those_by_hand(self) -> None:
        engine = make_engine(slots=2)
        empty = engine.metrics()
        assert (empty.tokens_per_second, empty.first_token.p50, empty.prefix_hit_rate) == (0, None, 0)
        for i in range(3):
            engine.submit(Request([3 + i] * 8, max_new_tokens=4, ignore_eos=True))
        engine.step()
        engine.step()
        now = engine.metrics()
        assert (now.queue_length, now.active_slots) == (1, 2)
        assert now.cache_occupancy == (9 + 9) / (2 * 64)  # each prompt and the first of two tokens that were read
        engine.run()
        last = engine.metrics()
        assert (last.queue_length, last.active_slots, last.cache_occupancy) == (0, 0, 0)
        assert (last.new_tokens, last.prompt_tokens, last.finished) == (12, 24, {"length": 3})
        assert last.prefill_share + last.decode_share == pytest.approx(1)
        assert last.between_tokens.p50 <= last.between_tokens.p99
        assert last.tokens_per_second == pytest.approx(12 / last.busy_seconds)

    def test_waiting_times_are_those_by_hand(self) -> None:
        now = 1.0
        engine = make_engine(slots=1, clock=lambda: now)
        for token in (3, 4):
            engine.submit(Request([token], max_new_tokens=3, ignore_eos=True))
        for now in (2.0, 5.0, 10.0, 17.0):  # noqa: B007
            engine.step()
        last = engine.metrics()
        # At 2, 5 and 10 a token of the first request came, at 10 and 17 one of the second, which waited for the slot.
        assert dataclasses.astuple(last.first_token) == pytest.approx(np.percentile([1, 9], (50, 90, 99)))
        assert dataclasses.astuple(last.between_tokens) == pytest.approx(np.percentile([3, 5, 7], (50, 90, 99)))

    def test_shares_are_those_by_hand(self) -> None:
        meter = Meter()
        meter.note_prompt(10, 0)
        meter.note_prompt(10, 4)
        for seconds, prefilled, decoded in (
            (1.0, False, True),
            (2.0, True, False),
            (4.0, True, True),
            (1.0, False, False),
        ):
            meter.note_step(seconds, prefilled=prefilled, decoded=decoded)
        now = meter.snapshot(queue_length=0, active_slots=0, cache_occupancy=0)
        assert (now.prefix_hits, now.prefix_hit_rate, now.reused_tokens) == (1, 0.5, 4)
        assert now.prefill_share == (2 + 4 - 1) / 8  # of a step with both, what a decode step usually takes is not
        assert now.decode_share == pytest.approx(3 / 8)


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


class TestTrouble:
    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (Request([]), "the prompt is empty"),
            (Request([3] * 64), "the prompt has 64 tokens and at most 63 leave room"),
            (Request([3, 99]), "the prompt has the token id 99, outside the vocabulary of 32"),
            (Request([3.5]), "the prompt has 3.5: token ids are integers"),
            (Request(None), "the prompt must be text or a list of token ids, not None"),
            (Request("?"), "no such letter"),
            (Request([3], allowed_tokens=[True] * 31), "allowed_tokens has shape"),
            (Request([3], allowed_tokens=[False] * 32), "leave no token"),
            (Request([3], logit_bias={99: 1.0}), "logit_bias has the token id 99"),
            (Request([3], logit_bias={4: float("nan")}), "logit_bias of token 4 is nan"),
            (Request([3], stop_ids=[32]), "stop_ids has the token id 32"),
            (Request([3], logprobs=9), "logprobs=9 exceeds the engine's max_logprobs=8"),
        ],
        ids=str,
    )
    def test_a_bad_request_ends_alone(self, request_: Request, message: str) -> None:
        engine = make_engine(Letters())
        good = engine.submit(Request("abc", max_new_tokens=4, ignore_eos=True))
        bad = engine.submit(request_)
        assert bad.is_done
        assert bad.completion.finish_reason == "error"
        assert message in str(bad.completion.error)
        assert set(map(id, engine.run())) == {id(good), id(bad)}
        assert list(good.completion.token_ids) == continuation([3, 4, 5], 4)

    def test_a_generator_is_no_prompt(self) -> None:
        handle = make_engine().submit(Request(token for token in (3, 4)))
        assert "the prompt must be text or a list of token ids, not <generator" in str(handle.completion.error)

    def test_text_needs_a_tokenizer(self) -> None:
        engine = make_engine()
        for request, message in (("abc", "the engine has no tokenizer"), ([3], "stop strings need a tokenizer")):
            handle = engine.submit(Request(request, stop="x" if isinstance(request, list) else ()))
            assert message in str(handle.completion.error)

    def test_all_samples_end_with_the_error(self) -> None:
        handle = make_engine().submit(Request([], n=3))
        assert [sample.finish_reason for sample in handle.samples] == ["error"] * 3

    def test_a_tokenizer_that_fails_later_ends_its_request_alone(self) -> None:
        class Fragile(Letters):
            def decode(self, ids):
                if 9 in ids:
                    raise RuntimeError("9 is unlucky")
                return super().decode(ids)

        steps = scripted([4, 5, 9, 6])
        engine = make_engine(Fragile(), make_steps=steps, slots=1)
        after = [engine.submit(Request([3], max_new_tokens=4, ignore_eos=True)) for _ in range(2)]
        engine.run()
        for handle in after:
            assert handle.completion.finish_reason == "error"
            assert str(handle.completion.error) == "9 is unlucky"
            assert handle.completion.text == "bc"
        short = engine.generate(["a"], max_new_tokens=2, ignore_eos=True)
        assert short[0].finish_reason == "length"

    def test_logits_that_are_not_finite_end_their_request_alone(self) -> None:
        class Failing(FakeSteps):
            """From its third token on, the row of the prompt [4] has no finite logits."""

            def draw_rows(self, settings, ends, number):
                pending = super().draw_rows(settings, ends, number)
                for row, entries in enumerate(self.rows):
                    if entries[:1] == [entry_after(1, 4)] and len(entries) > 2:
                        pending.drawn.logprobs[row] = np.nan
                return pending

        engine = make_engine(make_steps=Failing, slots=2)
        good, bad = (engine.submit(Request([t], max_new_tokens=5, ignore_eos=True)) for t in (3, 4))
        engine.run()
        assert "logits are not finite" in str(bad.completion.error)
        assert list(bad.completion.token_ids) == continuation([4], 2)
        assert list(good.completion.token_ids) == continuation([3], 5)

    def test_a_step_that_fails_ends_the_engine_and_says_so(self) -> None:
        engine = make_engine(model=(model := FakeModel()), slots=1)
        handles = [engine.submit(Request([3 + i], max_new_tokens=9, n=2)) for i in range(3)]
        engine.step()
        model.steps.error = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
        assert all(sample.finish_reason == "error" for handle in handles for sample in handle.samples)
        assert all(handle.is_done for handle in handles)
        assert not engine.has_work
        for call in (engine.step, lambda: engine.submit(Request([3]))):
            with pytest.raises(ValueError, match=r"a step of this engine failed \(RuntimeError: out of memory\)"):
                call()

    @pytest.mark.parametrize("steps", range(9))
    def test_a_request_cancelled_at_any_moment_leaves_nothing_behind(self, steps: int) -> None:
        engine = make_engine(slots=2, max_queue=9)
        prompts = [list(range(3, 25)), [5, 6], [7], [8]]
        handles = [engine.submit(Request(p, max_new_tokens=6, n=2, ignore_eos=True)) for p in prompts]
        for _ in range(steps):
            engine.step()
        for handle in (handles[0], handles[2]):
            engine.cancel(handle)
            engine.cancel(handle)
            assert handle.is_done
        engine.run()
        for prompt, handle in zip(prompts, handles, strict=True):
            assert len(handle.samples) == 2
            for sample in handle.samples:
                by_hand = continuation(prompt, 6, seed=sample.sample)
                is_cancelled = sample.finish_reason == "cancelled"
                assert list(sample.token_ids) == (by_hand[: len(sample.token_ids)] if is_cancelled else by_hand)
        assert all(s.finish_reason == "length" for h in (handles[1], handles[3]) for s in h.samples)
        assert not engine.has_work
        metrics = engine.metrics()
        assert (metrics.active_slots, metrics.queue_length) == (0, 0)
        references = [weakref.ref(handle) for handle in handles]
        del handle, handles
        assert still_held(references) == 0

    def test_a_strangers_handle_is_refused(self) -> None:
        handle = make_engine().submit(Request([3]))
        with pytest.raises(ValueError, match="this request is not in this engine"):
            next(make_engine().stream(handle))
        with pytest.raises(ValueError, match="the request has not ended"):
            handle.completion  # noqa: B018

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_len": 1}, "max_len=1 must be between 2 and max_seq_len=256"),
            ({"max_len": 257}, "max_len=257 must be between"),
            ({"slots": 0}, "slots=0 must be an integer, 1 or more"),
            ({"max_queue": 0}, "max_queue=0"),
            ({"prefill_buckets": (65,)}, "the prefill bucket 65"),
            ({"prefill_rows": 0}, "prefill_rows=0"),
            ({"max_len": 20.5}, r"max_len=20\.5 must be"),
            ({"max_len": "64"}, "max_len='64' must be between"),
            ({"max_logprobs": "8"}, "max_logprobs='8' must be between"),
            ({"prefill_buckets": 8}, r"prefill_buckets=8 must be a list of lengths, such as \(16, 64, 256\)\."),
            ({"max_queue": 2.5}, r"max_queue=2\.5 must be an integer"),
            ({"slots": True}, "slots=True must be an integer"),
            ({"max_logprobs": 2.5}, r"max_logprobs=2\.5 must be between"),
            ({"max_logprobs": 33}, "max_logprobs=33 must be between 0 and the 32 tokens"),
        ],
        ids=str,
    )
    def test_sizes_out_of_range_are_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_engine(**options)

    def test_a_tokenizer_of_more_tokens_is_refused(self) -> None:
        class Larger(Letters):
            vocab_size = VOCAB + 1

        with pytest.raises(ValueError, match="the tokenizer has 33 tokens, the model 32"):
            make_engine(Larger())

    @pytest.mark.parametrize("prompt", ["abc", b"abc", [3, 4, 5], np.array([3, 4, 5]), None, 3], ids=str)
    def test_one_prompt_is_no_list(self, prompt: object) -> None:
        engine = make_engine(Letters())
        with pytest.raises(ValueError, match=r"generate takes a list of prompts, not .*: put the text, or the list of"):
            engine.generate(prompt)
        assert not engine.has_work

    def test_prompts_may_come_in_any_iterable(self) -> None:
        done = make_engine().generate(np.array([[3, 4], [5, 6]]), max_new_tokens=1)
        assert [list(one.prompt_ids) for one in done] == [[3, 4], [5, 6]]
        assert len(make_engine().generate(([token] for token in (3, 4)), max_new_tokens=1)) == 2

    @pytest.mark.parametrize("given", ["abc", None, [3, 4]], ids=str)
    def test_what_is_no_request_is_refused(self, given: object) -> None:
        engine = make_engine()
        with pytest.raises(ValueError, match=r"submit takes a request, not .*: make one with Request\(prompt\)\."):
            engine.submit(given)
        with pytest.raises(ValueError, match="submit takes a request, not"):
            list(engine.as_completed([given]))
        with pytest.raises(ValueError, match=r"stream takes what submit returned, not .*: submit the request first\."):
            next(engine.stream(given))
        with pytest.raises(ValueError, match=r"cancel takes what submit returned, not .*: submit the request first\."):
            engine.cancel(given)

    def test_what_holds_no_requests_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"as_completed takes requests in a list, not None\."):
            next(make_engine().as_completed(None))


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


def traced() -> int:
    """Bytes that Python holds on to."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_ten_thousand_requests_are_answered_in_memory_that_does_not_grow() -> None:
    """All are answered as by hand."""
    random = np.random.default_rng(0)
    engine = make_engine(slots=8, max_queue=64)
    shared = random.integers(3, VOCAB, 16).tolist()

    def requests(count: int):
        for number in range(count):
            prompt = shared[: random.integers(0, 17)] + random.integers(3, VOCAB, random.integers(1, 20)).tolist()
            yield Request(prompt, max_new_tokens=int(random.integers(1, 12)), seed=number % 100)

    def run(count: int) -> int:
        finished = 0
        for handle in engine.as_completed(requests(count)):
            request, done = handle.request, handle.completion
            assert list(done.token_ids) == expected(request.prompt, limit=request.max_new_tokens, seed=request.seed)
            finished += 1
        return finished

    tracemalloc.start()
    assert run(5000) == 5000
    before = traced()
    assert run(5000) == 5000
    grown = traced() - before
    tracemalloc.stop()
    assert grown < 50_000
    assert engine.metrics().prefix_hits > 1000
    assert not engine.has_work


def test_a_closed_engine_has_cancelled_its_requests_and_takes_no_more() -> None:
    with make_engine(model=(model := FakeModel())) as engine:
        handle = engine.submit(Request([1, 2], max_new_tokens=2))
        assert not model.steps.is_closed
    engine.close()
    assert model.steps.is_closed
    assert handle.completion.finish_reason == "cancelled"
    with pytest.raises(ValueError, match=r"this engine was closed: make a new one\."):
        engine.submit(Request([1, 2], max_new_tokens=2))


def test_a_closed_engine_has_no_work() -> None:
    engine = make_engine(model=(model := FakeModel()))
    for count in (2, 9):
        engine.submit(Request([3], max_new_tokens=count, ignore_eos=True))
    engine.step()
    assert model.steps.unread
    engine.close()
    assert not engine.has_work


def test_what_was_cancelled_leaves_the_queue() -> None:
    engine = make_engine(slots=1)
    engine.submit(Request([3], max_new_tokens=9))
    references = []
    for _ in range(200):
        handle = engine.submit(Request([4], n=2))
        engine.cancel(handle)
        references.append(weakref.ref(handle))
    assert engine.metrics().queue_length == 1
    engine.step()  # tells who has ended
    assert still_held(references) < 50


def test_an_interrupt_ends_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it nearly always comes: while tokens are waited for, which are lost with it."""
    engine = make_engine()
    handles = [engine.submit(Request([token], max_new_tokens=9, ignore_eos=True)) for token in (5, 6)]
    engine.step()

    def interrupt(_: FakePending) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakePending, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert not engine.has_work
    assert [handle.completion.finish_reason for handle in handles] == ["error", "error"]
    with pytest.raises(ValueError, match=r"a step of this engine failed \(RuntimeError: interrupted by Key"):
        engine.submit(Request([1]))


def test_requests_of_an_iterator_left_early_are_cancelled() -> None:
    engine = make_engine()
    finished = engine.as_completed(Request([5], max_new_tokens=count, ignore_eos=True) for count in (2, 30, 30))
    next(finished)
    finished.close()
    assert engine.metrics().finished["cancelled"] == 2
    assert engine.run() == []


def test_samples_keep_the_place_of_their_request() -> None:
    engine = make_engine(slots=1)
    for prompt, n in (([3, 4], 2), ([5, 6], 1)):
        engine.submit(Request(prompt, max_new_tokens=2, n=n, ignore_eos=True))
    order = [len(handle.completions) for handle in engine.run()]
    assert order == [2, 1]


def test_waiting_samples_fill_the_queue() -> None:
    engine = make_engine(slots=1, max_queue=4)
    handle = engine.submit(Request([3, 4], max_new_tokens=2, n=4))
    assert not engine.has_room
    assert engine.metrics().queue_length == 4
    with pytest.raises(QueueFullError, match="4 samples are waiting"):
        engine.submit(Request([3, 4]))
    engine.cancel(handle)
    assert engine.metrics().queue_length == 0
    assert engine.has_room


def test_more_samples_than_may_wait_are_an_error() -> None:
    engine = make_engine(slots=1, max_queue=2)
    handles = list(engine.as_completed(Request([token], n=n, max_new_tokens=2) for token, n in ((3, 3), (4, 2))))
    reasons = [[sample.finish_reason for sample in handle.samples] for handle in handles]
    assert reasons == [["error"] * 3, ["length"] * 2]
    message = "n=3 samples exceed the engine's max_queue=2: ask for fewer, or make the engine with a longer queue."
    assert {str(sample.error) for sample in handles[0].samples} == {message}
    engine.submit(Request([3], n=1000))
    assert engine.metrics().queue_length == 0


def test_a_request_is_taken_whole_while_the_queue_has_room() -> None:
    engine = make_engine(slots=1, max_queue=3)
    for n in (2, 3):
        engine.submit(Request([3], n=n, max_new_tokens=2))
    assert engine.metrics().queue_length == 5
    assert [len(handle.samples) for handle in engine.run()] == [2, 3]


def test_each_end_is_told_once() -> None:
    engine = make_engine()
    streamed, other = (engine.submit(Request([first], max_new_tokens=2)) for first in (3, 4))
    list(engine.stream(streamed))
    assert engine.has_work
    assert engine.run() == [other]
    waiting = engine.submit(Request([5], max_new_tokens=2))
    taken = list(engine.as_completed([Request([6], max_new_tokens=2)]))
    assert engine.run() == [waiting]
    assert waiting not in taken
    assert not engine.has_work


def test_a_warm_up_forgets_what_the_rows_held() -> None:
    engine, prompt = make_engine(), list(range(3, 14))
    for _ in range(2):
        [done] = engine.generate([prompt], max_new_tokens=5, ignore_eos=True)
        assert list(done.token_ids) == continuation(prompt, 5)
        engine.warm_up()
    assert engine.metrics().reused_tokens == 0


def test_a_warm_up_that_fails_ends_the_engine() -> None:
    engine = make_engine(model=(model := FakeModel()))
    model.steps.error = MemoryError("no room for it")
    with pytest.raises(MemoryError):
        engine.warm_up()
    model.steps.error = None
    with pytest.raises(ValueError, match=r"a step of this engine failed \(MemoryError: no room for it\)"):
        engine.submit(Request([3]))


def test_the_end_may_complete_a_stop_string() -> None:
    engine = make_engine(Letters(), make_steps=scripted([3, 30]))
    handle = engine.submit(Request([5], max_new_tokens=2, stop="\ufffd"))
    engine.run()
    assert (handle.completion.text, handle.completion.finish_reason) == ("a", "stop")
