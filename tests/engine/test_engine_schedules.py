"""Thousands of random schedules against one-at-a-time generation by hand: nothing lost, doubled or mixed up."""

import dataclasses
import itertools

import numpy as np
import pytest
from fake_steps import EOS, VOCAB, FakeModel, FakeSteps, Letters, continuation, prompt_logprobs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from grokjax.engine import Engine, Handle, QueueFullError
from grokjax.request import Completion, Request, TokenLogprob
from grokjax.tokenizer import StreamDecoder

# Prompts that share beginnings of every length, so that rows are reused.
TEXTS = ([3, 4, 5, 6] * 8, [3, 4, 5, 6, 3, 4, 5, 6, 7] + [8, 9] * 10, [10] * 30)
MAX_QUEUE = 4


@dataclasses.dataclass(eq=False)
class Submitted:
    """A request in the machine, and how much of its stream was read."""

    handle: Handle
    read: int = 0


def behind(prompt: list[int], ids: list[int]) -> str:
    """The text of ids behind a prompt: what of the text of both is not that of the prompt."""
    alone, both = (Letters().decode(some) for some in (prompt, [*prompt, *ids]))
    return both[sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, both, strict=False))) :]


def by_hand(request: Request, sample: int, max_len: int, *, repeats: bool) -> tuple[list[int], str, str]:
    """Tokens, text and finish reason of one sample, computed alone."""
    limit = min(request.max_new_tokens, max_len - len(request.prompt))
    bias = None if request.allowed_tokens is None else np.where(request.allowed_tokens, 0, -1e10)
    tokens = continuation(request.prompt, limit, seed=request.seed + sample, bias=bias, repeats=repeats)
    stop_ids = {*request.stop_ids, *(() if request.ignore_eos else (EOS,))}
    decoder, text = StreamDecoder(Letters(), request.prompt), ""
    for count, token in enumerate(tokens, start=1):
        if token in stop_ids:
            return tokens[:count], behind(request.prompt, tokens[: count - 1]), "stop"
        text += decoder.push(token)
        for stop in request.stop:
            if stop in text:
                return tokens[:count], text[: text.find(stop)], "stop"
    return tokens, behind(request.prompt, tokens), "length"


class Schedules(RuleBasedStateMachine):
    """Submits, steps, streams and cancels in any order, on engines of any size."""

    @initialize(
        slots=st.integers(1, 4),
        max_len=st.integers(10, 40),
        rows=st.sampled_from([1, 2, 4]),
        reuse=st.booleans(),
        buckets=st.sampled_from([(2,), (4, 8), (1, 3, 9)]),
        guesses=st.sampled_from([0, 1, 4, 9]),
    )
    def make(self, slots: int, max_len: int, rows: int, reuse: bool, buckets: tuple[int, ...], guesses: int) -> None:
        self.max_len = max_len
        self.now = 0.0
        self.model = FakeModel(repeats=guesses > 0)
        self.engine = Engine(
            self.model,
            Letters(),
            slots=slots,
            max_len=max_len,
            prefill_rows=rows,
            prefill_buckets=buckets,
            max_queue=MAX_QUEUE,
            reuse_prefixes=reuse,
            max_guesses=guesses,
            clock=lambda: self.now,
            make_steps=FakeSteps,
        )
        self.submitted: list[Submitted] = []
        self.ended: list[Handle] = []  # as they were told of, each once

    @rule(
        text=st.sampled_from(TEXTS),
        length=st.integers(1, 30),
        own=st.lists(st.integers(3, VOCAB - 1), max_size=3),
        max_new_tokens=st.integers(0, 12),
        seed=st.integers(0, 3),
        n=st.integers(1, MAX_QUEUE + 1),
        priority=st.integers(-1, 1),
        user=st.sampled_from(["ann", "bob", None]),
        stop_at=st.integers(-6, 8),
        options=st.fixed_dictionaries(
            {},
            optional={
                "ignore_eos": st.booleans(),
                "stop_ids": st.lists(st.integers(0, VOCAB - 1), max_size=2),
                "prompt_logprobs": st.booleans(),
                "logprobs": st.integers(0, 2),
                "guesses": st.integers(0, 3),
                "deadline": st.integers(1, 15),
                "allowed_tokens": st.sets(st.integers(0, VOCAB - 1), min_size=1).map(
                    lambda ids: [token in ids for token in range(VOCAB)]
                ),
            },
        ),
    )
    def submit(self, text, length, own, max_new_tokens, seed, n, priority, user, stop_at, options) -> None:
        prompt = text[:length] + own
        # A stop string that will come, unless something ends the text before.
        letters = (
            Letters().decode(continuation(prompt, 12, seed=seed, repeats=self.model.repeats)).replace("\ufffd", "")
        )
        coming = letters[stop_at:][:2] if stop_at >= 0 else ""
        numbers = {"max_new_tokens": max_new_tokens, "seed": seed, "n": n, "priority": priority}
        self.submit_request(Request(prompt, stop=[coming] if coming else [], user=user, **numbers, **options))

    def submit_request(self, request: Request) -> None:
        waiting = self.engine.metrics().queue_length
        try:
            handle = self.engine.submit(request)
        except QueueFullError:
            assert waiting >= MAX_QUEUE
            return
        assert waiting < MAX_QUEUE
        assert self.engine.metrics().queue_length < 2 * MAX_QUEUE
        self.submitted.append(Submitted(handle))

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), own=st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=3))
    def go_on(self, data: st.DataObject, own: list[int]) -> None:
        """The next turn of a conversation: its prompt is a prompt with what came of it."""
        handle = data.draw(st.sampled_from(self.submitted)).handle
        so_far = [piece.token_id for piece in handle.pieces if piece.sample == 0 and piece.token_id is not None]
        self.submit_request(Request([*handle.request.prompt, *so_far, *own], max_new_tokens=6))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.now += 1
            self.ended += self.engine.step()

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.engine.cancel(data.draw(st.sampled_from(self.submitted)).handle)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), count=st.integers(1, 5))
    def stream(self, data: st.DataObject, count: int) -> None:
        """Reads a stream somewhat further than the last reader; the ends of others are told of later."""
        one = data.draw(st.sampled_from(self.submitted))
        pieces = list(itertools.islice(self.engine.stream(one.handle), one.read + count))
        assert pieces == one.handle.pieces[: one.read + count]
        if len(pieces) < one.read + count:
            assert one.handle.is_done
            self.ended += [one.handle] * (one.handle not in self.ended)
        one.read = len(pieces)

    @rule()
    def run(self) -> None:
        self.ended += self.engine.run()
        assert all(one.handle.is_done for one in self.submitted)

    @rule(firsts=st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=4), count=st.integers(1, 4))
    def complete_some(self, firsts: list[int], count: int) -> None:
        """Takes some of `as_completed` and leaves."""
        completed = self.engine.as_completed(Request([first] * 5, max_new_tokens=9) for first in firsts)
        for handle in itertools.islice(completed, count):
            self.submitted.append(Submitted(handle))
            self.ended.append(handle)
        completed.close()

    @invariant()
    def slots_and_rows_are_consistent(self) -> None:
        if not hasattr(self, "engine"):
            return
        metrics, steps = self.engine.metrics(), self.model.steps
        placed = metrics.active_slots + metrics.queue_length
        unfinished = sum(one.handle.request.n - len(one.handle.completions) for one in self.submitted)
        # A sample whose last token is drawn and not yet read has left its slot.
        assert placed <= unfinished if steps.unread else placed == unfinished
        filled = round(metrics.cache_occupancy * len(steps.rows) * self.max_len)
        assert 0 <= filled <= sum(len(row) for row in steps.rows)

    @invariant()
    def every_ended_sample_is_right(self) -> None:
        for one in getattr(self, "submitted", ()):
            samples = [done.sample for done in one.handle.completions]
            assert len(samples) == len(set(samples))
            for done in one.handle.completions:
                self.check(one.handle, done)

    def check(self, handle: Handle, done: Completion) -> None:
        request = handle.request
        if len(request.prompt) > self.max_len - (request.max_new_tokens > 0) or request.n > MAX_QUEUE:
            assert done.finish_reason == "error"
            return
        tokens, text, reason = by_hand(request, done.sample, self.max_len, repeats=self.model.repeats)
        assert request.deadline is None or done.timings.total < request.deadline + 1
        if done.finish_reason == "deadline":
            assert done.timings.total >= request.deadline
        if done.finish_reason in ("cancelled", "deadline"):
            assert list(done.token_ids) == tokens[: len(done.token_ids)]
            assert done.text == behind(request.prompt, done.token_ids)
        else:
            assert (list(done.token_ids), done.text, done.finish_reason) == (tokens, text, reason)
            if request.prompt_logprobs:
                assert prompt_logprobs(done) == [None, *(-float(t + p) for p, t in enumerate(request.prompt[1:]))]
        count = request.logprobs
        assert (done.logprobs is None) == (count is None)
        for token, logprob in zip(done.token_ids, done.logprobs or (), strict=count is not None):
            top = [(token + more) % VOCAB for more in range(count)]
            assert logprob == TokenLogprob(token, -token / 8, tuple((other, -other / 8) for other in top))
        mine = [piece for piece in handle.pieces if piece.sample == done.sample]
        assert [piece.token_id for piece in mine] == [*done.token_ids, None]
        assert "".join(piece.text for piece in mine) == done.text
        assert [piece.finish_reason for piece in mine] == [None] * len(done.token_ids) + [done.finish_reason]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self.ended += self.engine.step()
        assert not self.engine.has_work
        self.every_ended_sample_is_right()
        assert sorted(map(id, self.ended)) == sorted(id(one.handle) for one in self.submitted)
        assert all(one.handle.is_done for one in self.submitted)
        self.slots_and_rows_are_consistent()
        metrics = self.engine.metrics()
        assert (metrics.active_slots, metrics.queue_length) == (0, 0)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=150, stateful_step_count=20)


@pytest.mark.thorough
class TestManySchedules(Schedules.TestCase):
    settings = settings(max_examples=400, stateful_step_count=20)
