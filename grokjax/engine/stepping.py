"""One step of an engine: free slots are filled, prompts prefilled, tokens drawn, and those drawn before are read."""

import collections
import functools
from collections.abc import Callable, Container, Sequence

import numpy as np

from grokjax.engine.guessing import Guessing
from grokjax.engine.metrics import Meter
from grokjax.engine.protocol import Pending, PendingRuns, Steps
from grokjax.engine.sample import Handle, LiveSample
from grokjax.engine.scheduler import PrefillGroup, Scheduler
from grokjax.model import Drawn, Scores, SlotSettings
from grokjax.request import FinishReason

_Rows = tuple[tuple[int, LiveSample], ...]


class Stepper:
    """Carries samples through the steps of a model, from the queue to their ends.

    Args:
      steps: of the model.
      scheduler: says who has which slot, and who is next.
      meter: is told what happens.
      clock: seconds.
      guessing: how many tokens a step guesses; None where no step does.
      max_guesses: tokens that a step may guess.

    Attributes:
      ended: the requests that have ended and nobody was told of.
    """

    def __init__(
        self,
        steps: Steps,
        scheduler: Scheduler[LiveSample],
        meter: Meter,
        *,
        clock: Callable[[], float],
        guessing: Guessing | None,
        max_guesses: int,
    ):
        self.ended: list[Handle] = []
        self._steps, self._scheduler, self._meter, self._clock = steps, scheduler, meter, clock
        self._guessing, self._max_guesses = guessing, max_guesses
        self._live: dict[LiveSample, None] = {}
        self._in_flight: collections.deque[Callable[[], None]] = collections.deque()
        self._last_settings: tuple[_Rows, SlotSettings] | None = None
        self._last_read: float | None = None
        self._counts_run: set[int] = set()

    @property
    def is_busy(self) -> bool:
        """Whether a sample has not ended, or a step was not read."""
        return bool(self._live or self._in_flight)

    def samples_of(self, handle: Handle) -> list[LiveSample]:
        """The samples of a request that have not ended."""
        return [sample for sample in self._live if sample.handle is handle]

    def add(self, samples: Sequence[LiveSample]) -> None:
        """Puts the samples of a request into the queue.

        Raises:
          ValueError: They are more than may ever wait.
        """
        self._scheduler.submit(*samples)
        self._live.update(dict.fromkeys(samples))

    def take_ended(self) -> list[Handle]:
        """The requests that have ended and nobody was told of, until now."""
        ended, self.ended = self.ended, []
        return ended

    def forget(self, handles: Container[Handle]) -> None:
        """Notes that somebody knows of the end of some requests."""
        self.ended = [handle for handle in self.ended if handle not in handles]

    def finish(self, sample: LiveSample, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a sample now, with what it has; harmless when it has ended."""
        if sample.ended:
            return
        self._scheduler.release(sample)
        self._live.pop(sample, None)
        self._last_settings = None  # names the sample: an idle engine would hold on to its request
        completion = sample.finish(reason, self._clock(), error)
        self._meter.note_end(completion.finish_reason, completion.timings.total)
        if sample.handle.is_done:
            self.ended.append(sample.handle)

    def end_all(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends every sample, with nothing of what is in flight; nobody need be told."""
        for sample in list(self._live):
            self.finish(sample, reason, error)
        self._in_flight.clear()
        self.ended.clear()

    def advance(self, *, first_alone: bool = False) -> None:
        """Makes one step, after it has ended the requests whose deadline has come.

        Args:
          first_alone: somebody waits for a first token. If the step that makes the next has never run, and so may have
            to be compiled, it is left to the next step of the engine, unless another sample waits for it.
        """
        start, has_decoded = self._clock(), self._steps.has_decoded
        for sample in self._scheduler.late(start):
            self.finish(sample, "deadline")
        ready = self._admit()
        prefilled = self._prefill()
        others = any(sample.dispatched for sample in self._scheduler.running)
        begun = self._begin(ready + [sample for sample in prefilled if not sample.chunks])
        is_put_off = first_alone and begun and not has_decoded and not others
        decoded = not is_put_off and self._decode(alone=not ready and not prefilled)
        # While chunks of prompts wait nothing is dispatched ahead: whoever comes now waits for this chunk alone.
        is_ahead = decoded and not self._scheduler.has_chunks
        while len(self._in_flight) > is_ahead:
            self._in_flight.popleft()()
        if prefilled and not is_ahead:
            self._steps.wait()
        seconds = self._clock() - start
        self._meter.note_step(seconds, prefilled=bool(prefilled), decoded=decoded, is_first=decoded and not has_decoded)

    def _admit(self) -> list[LiveSample]:
        """Fills free slots; returns the samples whose prompts need no prefill."""
        admissions = self._scheduler.admit()
        for admission in admissions:
            sample, slot = admission.job, admission.job.slot
            assert slot is not None
            sample.times.admitted = now = self._clock()
            self._meter.note_prompt(len(sample.prompt), sample.reused, now - sample.times.submitted)
            if admission.is_complete or admission.source != slot:
                self._steps.share(admission.source, slot, sample.reused)
            if sample.bias is not None:
                self._steps.set_bias(slot, sample.bias)
        return [admission.job for admission in admissions if admission.is_complete]

    def _prefill(self) -> tuple[LiveSample, ...]:
        """Dispatches one group of chunks; returns the samples that they belong to."""
        group = self._scheduler.next_prefill()
        if group is None:
            return ()
        if group.jobs[0].is_scored:
            self._score(group)
        else:
            self._steps.prefill(group.tokens(), *group.place())
        return group.jobs

    def _score(self, group: PrefillGroup[LiveSample]) -> None:
        (sample,), (chunk,) = group.jobs, group.chunks
        assert sample.slot is not None
        tokens, targets = group.tokens()[0], group.tokens(offset=1)[0]
        place, wants_top = (chunk.count, chunk.start, sample.slot), sample.row.wants_top
        pending = self._steps.score(tokens, targets, *place, wants_top=wants_top)
        self._in_flight.append(lambda: self._push_scores(sample, pending.read(), chunk.count))

    def _push_scores(self, sample: LiveSample, scores: Scores[np.ndarray], count: int) -> None:
        """Takes the scores behind a chunk of a prompt, which all samples of its request share."""
        try:
            sample.push_scores(scores, count)
        except ValueError as error:
            for other in self.samples_of(sample.handle):
                self.finish(other, "error", error)

    def _begin(self, samples: list[LiveSample]) -> bool:
        """Draws the first tokens of samples whose prompts are prefilled; says whether there are any."""
        for sample in samples:
            if not sample.limit:
                self._scheduler.release(sample)
                self._in_flight.append(functools.partial(self.finish, sample, "length"))
        return self._dispatch(self._steps.begin, [sample for sample in samples if sample.limit])

    def _decode(self, *, alone: bool) -> bool:
        """Dispatches a decode step for the running samples that have another token to come, if there are any.

        Args:
          alone: nothing else was dispatched in this step of the engine.
        """
        running = [sample for sample in self._scheduler.running if sample.dispatched]
        self._scheduler.note_draws(running)
        if self._guessing is None:
            return self._dispatch(self._steps.decode, running)
        return self._dispatch_guesses(self._guessing, running, is_timed=alone and bool(self._in_flight))

    def _dispatch(self, step: Callable[[SlotSettings], Pending], samples: list[LiveSample]) -> bool:
        """Dispatches a step that draws a token for each of some running samples; says whether there are any."""
        rows = _rows_of(samples)
        if not rows:
            return False
        pending = step(self._settings(rows))
        self._in_flight.append(functools.partial(self._take_tokens, pending, rows))
        self._note_dispatched(rows)
        return True

    def _dispatch_guesses(self, guessing: Guessing, samples: list[LiveSample], *, is_timed: bool) -> bool:
        """`_dispatch` of a step that may guess; its time tells what such steps take if the device goes on with it."""
        rows = _rows_of(samples)
        if not rows:
            return False
        count, tried = guessing.choose([(sample.hits, self._most_guesses(sample)) for _, sample in rows])
        limits = np.zeros((self._steps.slots, 2), np.int32)
        for (slot, sample), own in zip(rows, tried, strict=True):
            limits[slot] = len(sample.prompt) + sample.limit, own
        pending = self._steps.decode_guesses(self._settings(rows), limits, count)
        if count not in self._counts_run:  # it may have been compiled, which is no time of the step before
            self._counts_run.add(count)
            self._last_read = None
        took = functools.partial(guessing.note_seconds, count, len(rows) + sum(tried)) if is_timed else None
        self._in_flight.append(functools.partial(self._take_runs, guessing, pending, rows, took))
        self._note_dispatched(rows)
        return True

    def _most_guesses(self, sample: LiveSample) -> int:
        """Guesses that a sample may try: no more than its request allows, nor than tokens are left behind the next."""
        asked = sample.handle.request.guesses
        allowed = self._max_guesses if asked is None else min(asked, self._max_guesses)
        return min(allowed, sample.limit - sample.dispatched - 1)

    def _settings(self, rows: _Rows) -> SlotSettings:
        """How some rows draw; the last ones are kept, for the next step is mostly of the same."""
        if self._last_settings is None or self._last_settings[0] != rows:
            settings = SlotSettings.of({slot: sample.row for slot, sample in rows}, self._steps.slots)
            self._last_settings = rows, settings
        return self._last_settings[1]

    def _note_dispatched(self, rows: _Rows, count: int = 1) -> None:
        """Notes that so many more tokens of each row come from steps that are dispatched."""
        for _, sample in rows:
            sample.dispatched += count
            if sample.dispatched >= sample.limit:
                # Nothing more comes from its row, so another may have it before the last tokens are read.
                self._scheduler.release(sample)

    def _take_tokens(self, pending: Pending, rows: _Rows) -> None:
        drawn, now = pending.read(), self._clock()
        self._last_read = now
        for slot, sample in rows:
            # One that was stopped or cancelled after this step was dispatched has drawn a token too many.
            if not sample.ended:
                self._push(sample, drawn.of(slot), now)

    def _take_runs(
        self, guessing: Guessing, pending: PendingRuns, rows: _Rows, took: Callable[[float], None] | None
    ) -> None:
        runs, now = pending.read(), self._clock()
        if took is not None and self._last_read is not None:
            took(now - self._last_read)
        self._last_read = now
        for slot, sample in rows:
            if sample.ended:
                continue
            run = runs.of(slot)
            guessing.note_guesses(sample.hits, looked=run.looked, right=run.right)
            further = len(run.tokens) - 1  # one was counted when the step was dispatched
            self._meter.note_guesses(run.tried, further)
            self._scheduler.note_draws([sample], count=further)
            for drawn in run.tokens:
                if not sample.ended:  # by the token before
                    self._push(sample, drawn, now)
            self._note_dispatched(((slot, sample),), further)

    def _push(self, sample: LiveSample, drawn: Drawn, now: float) -> None:
        last = sample.times.last_token
        try:
            reason = sample.push(drawn, now)
        except Exception as error:  # a tokenizer may raise anything
            self.finish(sample, "error", error)
            return
        self._meter.note_token(now - (sample.times.submitted if last is None else last), is_first=last is None)
        if last is not None:
            # That a token was drawn after it shows that the last one's keys and values are in the row.
            self._scheduler.note_token(sample, sample.token_ids[-2])
        if reason is not None:
            self.finish(sample, reason)


def _rows_of(samples: list[LiveSample]) -> _Rows:
    return tuple((sample.slot, sample) for sample in samples if sample.slot is not None)
