"""The engine by hand, over a fake model: in which order requests are served, and how many may wait."""

import itertools
import weakref

import pytest
from builders import still_held
from fake_steps import FakeModel, make_engine

from grokjax.engine import QueueFullError
from grokjax.request import Request


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

    @pytest.mark.parametrize("options", [{}, {"max_guesses": 2}], ids=["plain", "guessing"])
    def test_a_first_piece_does_not_wait_for_what_may_be_compiled(self, options: dict[str, int]) -> None:
        engine = make_engine(model=(model := FakeModel()), **options)
        first, then = (Request([3 + i], max_new_tokens=4, ignore_eos=True) for i in range(2))
        pieces = engine.stream(engine.submit(first))
        next(pieces)
        assert [entry[0] for entry in model.steps.log] == ["prefill", "begin", "read", "wait"]
        assert len([piece for piece in pieces if piece.token_id is not None]) == 3
        model.steps.log.clear()
        next(engine.stream(engine.submit(then)))
        assert [entry[0].partition("_")[0] for entry in model.steps.log] == ["prefill", "begin", "decode", "read"]

    def test_a_first_piece_keeps_nobody_waiting(self) -> None:
        """Of two requests that are prefilled one after the other, the one that is streamed is the second."""
        engine = make_engine(prefill_rows=1)
        other, streamed = (engine.submit(Request([3 + i], max_new_tokens=4, ignore_eos=True)) for i in range(2))
        next(engine.stream(streamed))
        assert len(streamed.pieces) == 1
        assert len(other.pieces) == 1
        engine.step()
        assert (len(other.pieces), len(streamed.pieces)) == (2, 2)

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


class TestQueue:
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
