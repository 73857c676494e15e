"""Continuous batching: requests share the rows of one batch, each as if it were alone."""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

from jax.typing import DTypeLike
from prometheus_client.registry import CollectorRegistry

from grokjax.engine.guessing import Guessing
from grokjax.engine.intake import Intake, iterate_requests, list_prompts
from grokjax.engine.metrics import Meter, Metrics
from grokjax.engine.one_thread import OneThread, by_one_thread
from grokjax.engine.prometheus import make_registry
from grokjax.engine.protocol import MakeSteps
from grokjax.engine.sample import CheckedRequest, Handle, LiveSample, check_handle
from grokjax.engine.scheduler import Scheduler, default_buckets, plan_chunks
from grokjax.engine.shared_steps import make_steps as steps_of_model
from grokjax.engine.stepping import Stepper
from grokjax.engine.warm_up import WarmedStep, warm_up
from grokjax.model import Grok, SlotOptions
from grokjax.request import Completion, Piece, Request, check_integer
from grokjax.tokenizer import Tokenizer


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
        max_guesses = check_integer("max_guesses", max_guesses, 0, max_len - 1)
        used = model.config.experts_per_token / model.config.num_experts
        self._guessing = Guessing(max_guesses, used) if max_guesses else None
        options = SlotOptions(
            slots=self._scheduler.slots,
            max_len=max_len,
            num_top=max_logprobs,
            max_guesses=max_guesses,
            cache_dtype=cache_dtype,
            allow_oom=allow_oom,
        )
        self._steps = make_steps(model, options)
        self._clock, self._meter = clock, Meter(self._scheduler)
        self._stepper = Stepper(
            self._steps, self._scheduler, self._meter, clock=clock, guessing=self._guessing, max_guesses=max_guesses
        )
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
        return self._stepper.is_busy or bool(self._stepper.ended)

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
        if self._stepper.is_busy:
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
            self._stepper.add(self._intake.samples(handle, now))
        except Exception as error:  # a tokenizer may raise anything
            for number in range(request.n):
                self._stepper.finish(LiveSample(handle, number, CheckedRequest(), submitted=now), "error", error)
        return handle

    @by_one_thread
    def cancel(self, handle: Handle) -> None:
        """Ends a request now, with what it has; its slot is free for the next step. Harmless when it has ended.

        Raises:
          ValueError: This is no `Handle`.
        """
        check_handle("cancel", handle)
        for sample in self._stepper.samples_of(handle):
            self._stepper.finish(sample, "cancelled")

    @by_one_thread
    def step(self) -> list[Handle]:
        """Fills free slots, prefills at most one group of chunks, decodes one token for each running request.

        Before that it ends the requests whose deadline has come. The tokens that it dispatches are read in the next
        step, when the device already works on those after them; or in this one, while further chunks of prompts wait.

        Returns:
          The requests that have ended and were not reported yet, by this or as the end of their `stream`.
        """
        self._advance()
        return self._stepper.take_ended()

    @by_one_thread
    def run(self) -> list[Handle]:
        """Steps until every request has ended; returns those that ended, in this order."""
        ended = []
        while self.has_work:
            ended += self.step()
        return ended

    def stream(self, handle: Handle) -> Iterator[Piece]:
        """The pieces of a request as they come, from its first; steps the engine, and the other requests, on the way.

        In an engine that was not warmed up the first piece comes before the step that makes the next is compiled.

        Raises:
          ValueError: The request is not of this engine, or this is no `Handle`.
        """
        check_handle("stream", handle)
        if not handle.is_done and not self._stepper.samples_of(handle):
            raise ValueError("this request is not in this engine: stream it from the engine it was given to.")
        for number in itertools.count():
            while number >= len(handle.pieces):
                if handle.is_done:
                    self._stepper.forget([handle])
                    return
                self._advance(first_alone=not number)
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
                self._stepper.forget(ended)
                for handle in ended:
                    del running[handle]
                yield from ended
        finally:
            for handle in running:  # if the caller left early
                self.cancel(handle)
            self._stepper.forget(running)

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
        self._stepper.end_all("cancelled")
        if not self._is_closed:
            self._is_closed = True
            self._steps.close()

    def metrics(self) -> Metrics:
        """What the engine does now and did so far."""
        return self._meter.snapshot()

    @by_one_thread
    def _advance(self, *, first_alone: bool = False) -> None:
        """Makes one step, as the stepper's `advance`; leaves it to its callers to tell which requests have ended."""
        self._check_open()
        with self._failing():
            self._stepper.advance(first_alone=first_alone)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Where a step of the model fails, the cache may be lost with it: every request ends with the error."""
        try:
            yield
        except BaseException as cause:  # after Ctrl-C, too, tokens are lost that were drawn and not read
            error = cause if isinstance(cause, Exception) else RuntimeError(f"interrupted by {type(cause).__name__}")
            self._failure = error
            self._stepper.end_all("error", error)  # the raised error tells of them all
            raise

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("this engine was closed: make a new one.")
        if self._failure is not None:
            raise ValueError(
                f"a step of this engine failed ({type(self._failure).__name__}: {self._failure}) and its cache is lost "
                "with it: make a new engine."
            ) from self._failure
