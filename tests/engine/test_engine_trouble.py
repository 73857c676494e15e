"""The engine by hand, over a fake model: how it ends what fails, is cancelled or closed, and nothing else."""

import functools
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from builders import still_held
from fake_steps import (
    VOCAB,
    FakeModel,
    FakePending,
    FakeSteps,
    Letters,
    continuation,
    entry_after,
    make_engine,
    prompt_logprobs,
    scripted,
)

from grokjax.engine import Engine
from grokjax.request import Request


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
        """The engine lacks it, not the request: so `submit` says it, and no result has to be looked at."""
        engine = make_engine()
        running = engine.submit(Request([3], max_new_tokens=2, ignore_eos=True))
        for request, message in (
            (Request("abc"), "the prompt is text and the engine has no tokenizer: give it one, or token ids"),
            (Request([3], stop="x"), "stop strings need a tokenizer: give one to the engine, or stop at `stop_ids`"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.submit(request)
        with pytest.raises(ValueError, match="the engine has no tokenizer"):
            engine.generate(["abc"])
        assert engine.run() == [running]

    def test_a_text_that_is_far_too_long_is_refused_by_its_beginning(self) -> None:
        """To encode all of 50 MB would take half a minute."""

        class Counting(Letters):
            def encode(self, text):
                assert len(text) <= 4096
                return super().encode(text.replace("b", ""))

        engine = make_engine(Counting())
        handle = engine.submit(Request("a" * 10**7))
        message = "the first 1024 of the prompt's 10000000 characters have 1024 tokens and at most 63 leave room"
        assert message in str(handle.completion.error)
        assert engine.generate(["a" + "b" * 4000], max_new_tokens=1)[0].prompt_ids == (3,)

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

    @pytest.mark.parametrize("logprob", [np.nan, np.inf, -np.inf])
    def test_scores_that_are_not_finite_end_their_request_alone(self, logprob: float) -> None:
        """All of its samples, which share them, at the chunk that has the first."""

        class Failing(FakeSteps):
            def score(self, tokens, targets, *place, **options):
                pending = super().score(tokens, targets, *place, **options)
                pending.scores.logprob[targets == 20] = logprob
                return pending

        engine = make_engine(make_steps=Failing)
        bad = engine.submit(Request(list(range(3, 24)), max_new_tokens=3, prompt_logprobs=True, n=2))
        good = engine.submit(Request([3, 4, 5], max_new_tokens=3, prompt_logprobs=True, ignore_eos=True))
        engine.run()
        for sample in bad.samples:
            assert (sample.finish_reason, sample.prompt_logprobs) == ("error", None)
            assert "the model's logits are not finite" in str(sample.error)
        assert prompt_logprobs(good.completion) == [None, -4.0, -6.0]
        assert list(good.completion.token_ids) == continuation([3, 4, 5], 3)

    @pytest.mark.parametrize("where", ["logprobs", "top_logprobs"])
    def test_infinite_log_probabilities_are_not_finite_either(self, where: str) -> None:
        class Failing(FakeSteps):
            def draw_rows(self, settings, ends, number):
                pending = super().draw_rows(settings, ends, number)
                getattr(pending.drawn, where)[...] = -np.inf
                return pending

        engine = make_engine(make_steps=Failing)
        [done] = engine.generate([[3]], logprobs=2)
        assert "the model's logits are not finite" in str(done.error)
        assert (done.token_ids, done.logprobs) == ((), ())

    def test_a_step_that_fails_ends_the_engine_and_says_so(self) -> None:
        engine = make_engine(model=(model := FakeModel()), slots=1)
        handles = [engine.submit(Request([3 + i], max_new_tokens=9, n=2)) for i in range(3)]
        engine.step()
        assert engine.failure is None
        model.steps.error = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
        assert all(sample.finish_reason == "error" for handle in handles for sample in handle.samples)
        assert all(handle.is_done for handle in handles)
        assert not engine.has_work
        assert engine.failure is model.steps.error
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
            ({"slots": 0}, "slots=0 must be an integer between 1 and 4194304"),
            ({"slots": 10**400}, r"slots=1000.*000 must be an integer between 1 and"),
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

    def test_what_is_no_model_is_refused(self) -> None:
        with pytest.raises(ValueError, match="the model must be one that init or load makes, not a str"):
            Engine("grok-1")

    def test_a_tokenizer_of_more_tokens_is_refused(self) -> None:
        class Larger(Letters):
            vocab_size = VOCAB + 1

        with pytest.raises(ValueError, match="the tokenizer has 33 tokens, the model 32"):
            make_engine(Larger())

    def test_the_file_of_a_tokenizer_is_none(self) -> None:
        with pytest.raises(ValueError, match=r"one such as load_tokenizer\(path\) makes, not 'tokenizer\.model'"):
            make_engine("tokenizer.model")

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


def test_a_warm_up_that_fails_ends_the_engine() -> None:
    engine = make_engine(model=(model := FakeModel()))
    model.steps.error = MemoryError("no room for it")
    with pytest.raises(MemoryError):
        engine.warm_up()
    model.steps.error = None
    with pytest.raises(ValueError, match=r"a step of this engine failed \(MemoryError: no room for it\)"):
        engine.submit(Request([3]))


def test_a_step_that_does_not_compile_ends_the_engine_before_any_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(steps: FakeSteps, name: str, shape: tuple[int, ...]) -> Callable[[], object]:
        return functools.partial(refuse, name) if name == "begin" else lambda: None

    def refuse(name: str) -> None:
        raise RuntimeError(f"{name} does not compile")

    monkeypatch.setattr(FakeSteps, "lower", lower)
    engine = make_engine(model=(model := FakeModel()))
    with pytest.raises(RuntimeError, match="begin does not compile"):
        engine.warm_up()
    assert model.steps.programs == 0
    assert "begin does not compile" in str(engine.failure)


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


def test_requests_of_an_iterator_left_early_are_cancelled() -> None:
    engine = make_engine()
    finished = engine.as_completed(Request([5], max_new_tokens=count, ignore_eos=True) for count in (2, 30, 30))
    next(finished)
    finished.close()
    assert engine.metrics().finished["cancelled"] == 2
    assert engine.run() == []


def test_what_is_printed_is_short() -> None:
    engine = make_engine(Letters(), model=(model := FakeModel()), slots=2)
    handles = [engine.submit(Request([3] * 60, max_new_tokens=3, n=2, ignore_eos=True, user="ann")) for _ in range(3)]
    assert repr(engine) == "Engine(open: 2 slots of 64 tokens, 0 running, 6 queued)"
    engine.step()
    assert repr(engine) == "Engine(open: 2 slots of 64 tokens, 2 running, 4 queued)"
    engine.run()
    request = "Request(prompt=[3, 3, 3, 3, 3, 3, ...], max_new_tokens=3, ignore_eos=True, n=2, user='ann')"
    assert repr(handles[0]) == f"Handle({request}: 6 tokens, 2 of 2 samples ended)"
    assert len(repr(handles[0].completion)) < 400
    assert "prompt_ids=(3, 3, 3, 3, 3, 3, ...), finish_reason='length'" in repr(handles[0].completion)
    assert len(repr(Request("long " * 1000, allowed_tokens=np.ones(VOCAB, bool)))) < 200
    model.steps.error = RuntimeError("lost")
    engine.submit(Request([3]))
    with pytest.raises(RuntimeError, match="lost"):
        engine.step()
    assert repr(engine).startswith("Engine(failed: ")
    engine.close()
    assert repr(engine).startswith("Engine(closed: ")
