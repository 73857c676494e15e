"""Guesses by hand: when steps guess, how many steps that saves, and what is counted."""

import itertools

import pytest
from fake_steps import FakeModel, FakeSteps, continuation, make_engine

from grokjax.engine.guessing import Guessing, HitRate
from grokjax.request import Request

PROMPTS = [[3, 4, 5], [6, 7], [8]]


def hits(*right: int, looked: int = 7) -> HitRate:
    """The rate after steps of which each had so many guesses right."""
    rate = HitRate()
    for count in right:
        rate.note(looked=looked, right=count)
    return rate


class TestHitRate:
    def test_long_runs_are_expected_after_a_right_guess_only(self) -> None:
        rate = hits(7, 7, 7)
        assert rate.expected(7) > 6
        rate.note(looked=7, right=2)
        for _ in range(5):
            rate.note(looked=0, right=0)
        assert rate.expected(7) < 1
        rate.note(looked=1, right=1)
        assert rate.expected(7) > 4

    def test_more_guesses_never_lose_one(self) -> None:
        rate = hits(1, 0, 3, 7)
        expected = [rate.expected(count) for count in range(10)]
        assert expected[0] == 0
        assert expected == sorted(expected)


class TestChoice:
    def test_a_new_row_is_judged_by_those_before_it(self) -> None:
        guessing, before = Guessing(7, 0.25), hits()
        assert guessing.choose([(hits(), 7)]) == (0, [0])
        for _ in range(9):
            guessing.note_guesses(before, looked=7, right=7)
        assert guessing.choose([(hits(), 7)]) == (7, [7])

    def test_nothing_is_guessed_before_anything_was_right(self) -> None:
        assert Guessing(7, 0.25).choose([(hits(), 7), (hits(0, 0), 7)]) == (0, [0, 0])

    def test_rows_that_repeat_are_guessed_and_others_are_not(self) -> None:
        """As far as each may be."""
        rows = [(hits(7, 7), 20), (hits(0, 0, 0, 0), 20), (hits(7, 7), 2)]
        assert Guessing(7, 0.25).choose(rows) == (7, [7, 0, 2])

    @pytest.mark.parametrize("most", [1, 3, 5, 7, 15, 40])
    def test_few_programs_serve_any_number_of_guesses(self, most: int) -> None:
        counts = Guessing(most, 0.25).counts
        assert counts[0] == 0
        assert counts[-1] == most
        assert sorted(set(counts)) == list(counts)
        assert len(counts) <= 5

    def test_a_step_that_takes_too_long_is_avoided_and_in_time_tried_again(self) -> None:
        guessing, rows = Guessing(7, 0.25), [(hits(3, 5, 7), 7)]
        guessing.note_seconds(0, 1, 0.01)
        first, _ = guessing.choose(rows)
        assert first > 0
        for count in (3, 7):
            guessing.note_seconds(count, 1 + count, 1.0)
        assert guessing.choose(rows) == (0, [0])
        for _ in range(300):
            guessing.note_seconds(0, 1, 0.01)
        assert guessing.choose(rows)[0] == first

    def test_steps_that_cost_no_more_are_taken_for_little(self) -> None:
        guessing, rows = Guessing(3, 0.25), [(hits(*[1, 0, 0] * 3, looked=3), 3)] * 8
        assert guessing.choose(rows)[0] == 0
        guessing.note_seconds(0, 8, 0.020)
        guessing.note_seconds(3, 32, 0.021)
        assert guessing.choose(rows) == (3, [3] * 8)


def steps_that_guess(model: FakeModel) -> list[tuple[list[list[int]], int]]:
    """The limits of the last steps that may guess, and their guesses."""
    return [entry[2] for entry in model.steps.log if entry[0] == "decode_guesses"]


class TestEngine:
    def test_a_text_that_repeats_takes_fewer_steps_and_is_the_same(self) -> None:
        """On a device whose steps take the same time, whatever they guess."""
        programs, ticks = {}, itertools.count()
        for guesses in (0, 7):
            model = FakeModel(repeats=True)
            engine = make_engine(model=model, max_guesses=guesses, clock=lambda: next(ticks))
            done = engine.generate(PROMPTS, max_new_tokens=60, ignore_eos=True)
            expected = [continuation(prompt, 60, repeats=True) for prompt in PROMPTS]
            assert [list(one.token_ids) for one in done] == expected
            programs[guesses] = model.steps.programs
        assert programs[7] < 0.6 * programs[0]
        metrics = engine.metrics()
        assert metrics.new_tokens == 180
        assert 90 < metrics.accepted_tokens <= metrics.guessed_tokens

    def test_a_request_after_one_that_repeats_is_guessed_for_from_its_first_step_on(self) -> None:
        model, ticks = FakeModel(repeats=True), itertools.count()
        engine = make_engine(model=model, max_guesses=7, slots=1, clock=lambda: next(ticks))
        first = []
        for prompt in ([5], [6]):
            before = len(steps_that_guess(model)) if first else 0
            engine.generate([prompt], max_new_tokens=60, ignore_eos=True)
            first.append(steps_that_guess(model)[before][1])
        assert first[0] == 0 < first[1]

    def test_a_text_that_does_not_repeat_is_not_guessed(self) -> None:
        engine = make_engine(max_guesses=7, max_len=200)
        engine.generate(PROMPTS, max_new_tokens=190, ignore_eos=True)
        metrics = engine.metrics()
        assert metrics.guessed_tokens < 0.03 * metrics.new_tokens

    def test_the_compilation_of_a_step_is_not_taken_for_its_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It takes 60 seconds, steps take one."""
        now, compiled, noted = 0, set(), set()

        class Compiling(FakeSteps):
            def decode_guesses(self, settings, limits, num_guesses):
                nonlocal now
                now += 1 if num_guesses in compiled else 60
                compiled.add(num_guesses)
                return super().decode_guesses(settings, limits, num_guesses)

        monkeypatch.setattr(Guessing, "note_seconds", lambda *arguments: noted.add(arguments[-1]))
        engine = make_engine(model=FakeModel(repeats=True), max_guesses=7, make_steps=Compiling, clock=lambda: now)
        engine.generate(PROMPTS, max_new_tokens=60, ignore_eos=True)
        assert noted == {0, 1}  # 0 where two steps are read one after the other

    def test_a_request_may_have_fewer_guesses_or_none(self) -> None:
        model, most = FakeModel(repeats=True), [0, 0, 0]
        engine = make_engine(model=model, max_guesses=7)
        for guesses in (0, 2, None):
            engine.submit(Request([5], max_new_tokens=60, ignore_eos=True, guesses=guesses))
        while engine.has_work:
            engine.step()
            for limits, _ in steps_that_guess(model)[-1:]:
                most = [max(before, own) for before, (_, own) in zip(most, limits, strict=True)]
        assert most == [0, 2, 7]

    def test_a_slot_is_free_when_its_last_token_is_known_to_be_on_its_way(self) -> None:
        """A row that is the first to have all its tokens draws no more of them, and the next sample has the slot."""
        model = FakeModel(repeats=True)
        engine = make_engine(model=model, max_guesses=7, slots=1)
        handles = [engine.submit(Request([3 + i], max_new_tokens=20, ignore_eos=True)) for i in range(4)]
        engine.run()
        for i, handle in enumerate(handles):
            assert list(handle.completion.token_ids) == continuation([3 + i], 20, repeats=True)
            assert handle.completion.finish_reason == "length"
        assert len(model.steps.rows[0]) == 20  # the prompt and all tokens but the last
        assert engine.metrics().accepted_tokens > 10

    @pytest.mark.parametrize("guesses", [-1, 64, True])
    def test_guesses_must_fit_into_a_slot(self, guesses: int) -> None:
        with pytest.raises(ValueError, match=rf"max_guesses={guesses} must be an integer between 0 and 63"):
            make_engine(max_guesses=guesses)

    def test_a_request_s_guesses_are_a_number(self) -> None:
        with pytest.raises(ValueError, match=r"guesses=-1 must be an integer, 0 or more"):
            Request("x", guesses=-1)
