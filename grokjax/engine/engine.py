"""Continuous batching: requests share the rows of one batch, each as if it were alone."""

import collections
import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from jax.typing import DTypeLike
from prometheus_client.registry import CollectorRegistry

from grokjax.engine.guessing import Guessing
from grokjax.engine.intake import Intake, iterate_requests, list_prompts
from grokjax.engine.metrics import Meter, Metrics
from grokjax.engine.one_thread import OneThread, by_one_thread
from grokjax.engine.prometheus import make_registry
from grokjax.engine.protocol import MakeSteps, Pending, PendingRuns
from grokjax.engine.sample import CheckedRequest, Handle, LiveSample, check_handle
from grokjax.engine.scheduler import PrefillGroup, Scheduler, default_buckets, plan_chunks
from grokjax.engine.shared_steps import make_steps as steps_of_model
from grokjax.engine.warm_up import WarmedStep, warm_up
from grokjax.model import Drawn, Grok, Scores, SlotOptions, SlotSettings
from grokjax.request import Completion, FinishReason, Piece, Request, check_integer
from grokjax.tokenizer import Tokenizer

_Rows = tuple[tuple[int, LiveSample], ...]


class Engine(OneThread):
    """Runs many requests at once over the slots of one batch.

    A request's tokens do not depend on the others: not on its slot, nor on the order of arrival, nor on who runs, stops
    or is cancelled beside it. The draw at position p uses `fold_in(key(seed), p)`, as in `generate`.

    An engine belongs to one thread at a time, and refuses another meanwhile; but any thread may ask for what it
    measures, `metrics` and `registry`, and for its `failure`. As a context, it is closed at the end.

    Args:
      model: a `Grok`.
      tokenizer: for prompts and continuations as text, and its end-of-sequence token ends them; without it, requests
        give and get token ids, and the token that the configuration names ends them.
      slots: B, requests that run at once.
      max_len: S, tokens of prompt and continuation together; by default the model's longest sequence.
      prefill_buckets: padded lengths of prompts. A longer prompt is taken in chunks of the largest, a decode step
        between two of them. By default those of 16, 64, 256 and 1024 that fit.
      prefill_rows: prompts of one bucket that are prefilled together at most; of those waiting, a power of two is. A
        prompt of several chunks goes alone.
      max_queue: no request is taken while so many samples wait for a slot, and none of more samples than that.
      max_logprobs: most probable tokens that a request may ask for.
      max_guesses: tokens that a step may guess from each row's text and check together, less than `max_len`: faster
        where texts repeat themselves or their prompts. It guesses only as many as pay; by default never.
      reuse_prefixes: take keys and values from another slot where a prompt begins with the same tokens, at least the
        smallest bucket.
      add_bos: put the beginning-of-sequence token before prompts that are text.
      cache_dtype: of the cache, as in `Grok.new_cache`.
      allow_oom: try it even where the devices have too little memory left for the slots.
      clock: seconds, for timings.
      make_steps: makes the `Steps` of the model; another one serves tests.

    Raises:
      ValueError: A number is out of range, the tokenizer has more tokens than the model, the devices have too little
        memory left, or the model spans processes and this is not the first: the others call `follow`.
    """

    def __init__(
        self,
        model: Grok,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        max_len: int | None = None,
        prefill_buckets: Sequence[int] | None = None,
        prefill_rows: int = 4,
        max_queue: int = 1024,
        max_logprobs: int = 8,
        max_guesses: int = 0,
        reuse_prefixes: bool = True,
        add_bos: bool = False,
        cache_dtype: DTypeLike | None = None,
        allow_oom: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        make_steps: MakeSteps = steps_of_model,
    ):
        super().__init__()
        if not hasattr(model, "config"):
            raise ValueError(f"the model must be one that init or load makes, not a {type(model).__name__}.")
        max_len = model.config.max_seq_len if max_len is None else max_len
        self._intake = Intake(
            tokenizer, config=model.config, max_len=max_len, max_logprobs=max_logprobs, add_bos=add_bos
        )
        self._scheduler: Scheduler[LiveSample] = Scheduler(
            slots=slots,
            max_len=max_len,
            buckets=default_buckets(max_len) if prefill_buckets is None else prefill_buckets,
            prefill_rows=prefill_rows,
            max_queue=max_queue,
            reuse_prefixes=reuse_prefixes,
        )
        self._max_guesses = check_integer("max_guesses", max_guesses, 0, max_len - 1)
        used = model.config.experts_per_token / model.config.num_experts
        self._guessing = Guessing(max_guesses, used) if max_guesses else None
        options = SlotOptions(
            slots=self._scheduler.slots,
            max_len=max_len,
            num_top=max_logprobs,
            max_guesses=self._max_guesses,
            cache_dtype=cache_dtype,
            allow_oom=allow_oom,
        )
        self._steps = make_steps(model, options)
        self._clock, self._meter = clock, Meter(self._scheduler)
        self._live: dict[LiveSample, None] = {}
        self._in_flight: collections.deque[Callable[[], None]] = collections.deque()
        self._ended: list[Handle] = []
        self._last_settings: tuple[_Rows, SlotSettings] | None = None
        self._last_read: float | None = None
        self._counts_run: set[int] = set()
        self._failure: Exception | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "failed" if self._failure is not None else "open"
        scheduler = self._scheduler
        return (
            f"Engine({state}: {scheduler.slots} slots of {scheduler.max_len} tokens, {scheduler.num_running} running, "
            f"{scheduler.num_waiting} queued)"
        )

    @property
    def failure(self) -> Exception | None:
        """What made a step of the model fail, after which the engine takes no more requests; None while all is well."""
        return self._failure

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called, after which no request is taken."""
        return self._is_closed

    @functools.cached_property
    def registry(self) -> CollectorRegistry:
        """What the engine measures, for the tools of `prometheus_client`, which may ask in any thread."""
        return make_registry(self._meter)

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or nobody was told that it has."""
        return bool(self._live or self._in_flight or self._ended)

    @property
    def has_room(self) -> bool:
        """Whether the queue takes another request."""
        return self._scheduler.has_room

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @by_one_thread
    def warm_up(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        prompt_len: int | None = None,
        progress: Callable[[WarmedStep, int, int], None] | None = None,
    ) -> tuple[WarmedStep, ...]:
        """Compiles every step that a request can need, so that none compiles later; an idle engine only.

        Args:
          cache_dir: directory of JAX's persistent compilation cache, used for these compilations: what is in it is not
            compiled again.
          prompt_len: compiles only what a lone request with a prompt of so many tokens may need, such as the first, be
            it a step of any count of guesses; the other steps compile when they are needed.
          progress: called with each step as soon as it is compiled, how many are, and how many there will be; without
            it the logger is told.

        Returns:
          Each step and how long its first run took.

        Raises:
          ValueError: A request has not ended, a step failed before, or `prompt_len` is no length of a prompt.
        """
        self._check_open()
        if self._live or self._in_flight:
            raise ValueError("requests are running: warm the engine up before the first, or after the last.")
        scheduler = self._scheduler
        buckets, group_sizes = scheduler.buckets, scheduler.group_sizes
        guesses = () if self._guessing is None else self._guessing.counts
        if prompt_len is not None:
            length = check_integer("prompt_len", prompt_len, 1, scheduler.max_len - 1)
            buckets, group_sizes = tuple(dict.fromkeys(chunk.bucket for chunk in plan_chunks(0, length, buckets))), (1,)
        scheduler.forget_rows()
        with self._failing():
            return warm_up(
                self._steps,
                buckets,
                group_sizes,
                guesses,
                is_whole=prompt_len is None,
                cache_dir=cache_dir,
                clock=self._clock,
                progress=progress,
            )

    @by_one_thread
    def submit(self, request: Request) -> Handle:
        """Puts a request into the queue.

        What is wrong with the request itself, be it the prompt, the mask, more samples than may wait or the tokenizer's
        opinion of it, ends it with the finish reason "error"; nothing is raised for it.

        Raises:
          QueueFullError: `max_queue` samples are waiting.
          ValueError: A step of the model failed before: the engine is over. Or this is no `Request`, or one with text
            and the engine has no tokenizer.
        """
        self._check_open()
        self._intake.check(request)
        self._scheduler.check_room()
        handle, now = Handle(request), self._clock()
        try:
            samples = self._intake.samples(handle, now)
            self._scheduler.submit(*samples)
        except Exception as error:  # a tokenizer may raise anything
            for number in range(request.n):
                self._finish(LiveSample(handle, number, CheckedRequest(), submitted=now), "error", error)
            return handle
        self._live.update(dict.fromkeys(samples))
        return handle

    @by_one_thread
    def cancel(self, handle: Handle) -> None:
        """Ends a request now, with what it has; its slot is free for the next step. Harmless when it has ended.

        Raises:
          ValueError: This is no `Handle`.
        """
        check_handle("cancel", handle)
        for sample in [sample for sample in self._live if sample.handle is handle]:
            self._finish(sample, "cancelled")

    @by_one_thread
    def step(self) -> list[Handle]:
        """Fills free slots, prefills at most one group of chunks, decodes one token for each running request.

        Before that it ends the requests whose deadline has come. The tokens that it dispatches are read in the next
        step, when the device already works on those after them; or in this one, while further chunks of prompts wait.

        Returns:
          The requests that have ended and were not reported yet, by this or as the end of their `stream`.
        """
        self._advance()
        ended, self._ended = self._ended, []
        return ended

    @by_one_thread
    def run(self) -> list[Handle]:
        """Steps until every request has ended; returns those that ended, in this order."""
        ended = []
        while self.has_work:
            ended += self.step()
        return ended

    def stream(self, handle: Handle) -> Iterator[Piece]:
        """The pieces of a request as they come, from its first; steps the engine, and the other requests, on the way.

        Raises:
          ValueError: The request is not of this engine, or this is no `Handle`.
        """
        check_handle("stream", handle)
        if not handle.is_done and not any(sample.handle is handle for sample in self._live):
            raise ValueError("this request is not in this engine: stream it from the engine it was given to.")
        for number in itertools.count():
            while number >= len(handle.pieces):
                if handle.is_done:
                    self._reported([handle])
                    return
                self._advance()
            yield handle.pieces[number]

    def as_completed(self, requests: Iterable[Request]) -> Iterator[Handle]:
        """Runs requests, taken from an iterable as the queue has room, and yields each as soon as it has ended.

        Raises:
          ValueError: This is nothing to take requests from, or what `submit` says of one of them.
        """
        source, running = iterate_requests(requests), dict[Handle, None]()
        exhausted = False
        try:
            while running or not exhausted:
                while self.has_room and not exhausted:
                    taken = [self.submit(request) for request in itertools.islice(source, 1)]
                    exhausted = not taken
                    running.update(dict.fromkeys(taken))
                self._advance()
                ended = [handle for handle in running if handle.is_done]
                self._reported(ended)
                for handle in ended:
                    del running[handle]
                yield from ended
        finally:
            for handle in running:  # if the caller left early
                self.cancel(handle)
            self._reported(running)

    def generate(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[Completion]:
        """Continues prompts; the options are those of `Request`, the same for all.

        Returns:
          Their completions in the order of the prompts, with all samples of a prompt one after the other.

        Raises:
          ValueError: An option is out of range, or `prompts` is one prompt.
        """
        requests = [Request(prompt, **options) for prompt in list_prompts(prompts)]
        handles = {handle.request: handle for handle in self.as_completed(requests)}
        return [sample for request in requests for sample in handles[request].samples]

    @by_one_thread
    def close(self) -> None:
        """Cancels every request that has not ended; other processes return from `follow`. The engine is over."""
        for sample in list(self._live):
            self._finish(sample, "cancelled")
        self._in_flight.clear()
        self._ended.clear()
        if not self._is_closed:
            self._is_closed = True
            self._steps.close()

    def metrics(self) -> Metrics:
        """What the engine does now and did so far."""
        return self._meter.snapshot()

    @by_one_thread
    def _advance(self) -> None:
        """Makes one step, and leaves it to its callers to tell which requests have ended."""
        self._check_open()
        start = self._clock()
        for sample in self._scheduler.late(start):
            self._finish(sample, "deadline")
        with self._failing():
            ready = self._admit()
            prefilled = self._prefill()
            self._begin(ready + [sample for sample in prefilled if not sample.chunks])
            decoded = self._decode(alone=not ready and not prefilled)
            # While chunks of prompts wait nothing is dispatched ahead: whoever comes now waits for this chunk alone.
            is_ahead = decoded and not self._scheduler.has_chunks
            while len(self._in_flight) > is_ahead:
                self._in_flight.popleft()()
            if prefilled and not is_ahead:
                self._steps.wait()
        self._meter.note_step(self._clock() - start, prefilled=bool(prefilled), decoded=decoded)

    def _reported(self, handles: Container[Handle]) -> None:
        self._ended = [handle for handle in self._ended if handle not in handles]

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
            for other in [other for other in self._live if other.handle is sample.handle]:
                self._finish(other, "error", error)

    def _begin(self, samples: list[LiveSample]) -> None:
        """Draws the first tokens of samples whose prompts are prefilled."""
        for sample in samples:
            if not sample.limit:
                self._scheduler.release(sample)
                self._in_flight.append(functools.partial(self._finish, sample, "length"))
        self._dispatch(self._steps.begin, [sample for sample in samples if sample.limit])

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
        self._in_flight.append(functools.partial(self._take_runs, pending, rows, took))
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

    def _take_runs(self, pending: PendingRuns, rows: _Rows, took: Callable[[float], None] | None) -> None:
        runs, now = pending.read(), self._clock()
        if took is not None and self._last_read is not None:
            took(now - self._last_read)
        self._last_read = now
        for slot, sample in rows:
            if sample.ended:
                continue
            run = runs.of(slot)
            sample.hits.note(looked=run.looked, right=run.right)
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
            self._finish(sample, "error", error)
            return
        self._meter.note_token(now - (sample.times.submitted if last is None else last), is_first=last is None)
        if last is not None:
            # That a token was drawn after it shows that the last one's keys and values are in the row.
            self._scheduler.note_token(sample, sample.token_ids[-2])
        if reason is not None:
            self._finish(sample, reason)

    def _finish(self, sample: LiveSample, reason: FinishReason, error: Exception | None = None) -> None:
        if sample.ended:
            return
        self._scheduler.release(sample)
        self._live.pop(sample, None)
        self._last_settings = None  # names the sample: an idle engine would hold on to its request
        completion = sample.finish(reason, self._clock(), error)
        self._meter.note_end(completion.finish_reason, completion.timings.total)
        if sample.handle.is_done:
            self._ended.append(sample.handle)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Where a step of the model fails, the cache may be lost with it: every request ends with the error."""
        try:
            yield
        except BaseException as cause:  # after Ctrl-C, too, tokens are lost that were drawn and not read
            error = cause if isinstance(cause, Exception) else RuntimeError(f"interrupted by {type(cause).__name__}")
            self._failure = error
            self._in_flight.clear()
            for sample in list(self._live):
                self._finish(sample, "error", error)
            self._ended.clear()  # the raised error tells of them all
            raise

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("this engine was closed: make a new one.")
        if self._failure is not None:
            raise ValueError(
                f"a step of this engine failed ({type(self._failure).__name__}: {self._failure}) and its cache is lost "
                "with it: make a new engine."
            ) from self._failure


def _rows_of(samples: list[LiveSample]) -> _Rows:
    return tuple((sample.slot, sample) for sample in samples if sample.slot is not None)
