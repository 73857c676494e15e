"""An engine behind an event loop: requests from many tasks, steps in a thread of their own."""

import asyncio
import contextlib
import functools
import reprlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from grokjax.engine.engine import Engine
from grokjax.engine.metrics import Metrics
from grokjax.engine.sample import Handle
from grokjax.request import Completion, Piece, Request

T = TypeVar("T")


class AsyncEngine:
    """Serves the requests of an event loop's tasks with one engine, for as long as it is entered with `async with`.

    A task that is cancelled, or leaves its stream early, cancels its request. When the block ends, so does every
    request that has not; `drain` before it lets them end by themselves.

    Args:
      engine: the engine; nothing else may use it meanwhile.

    Raises:
      ValueError: It is something else.

    Example:
      >>> from grokjax import ByteTokenizer, GrokConfig, init
      >>> from grokjax.engine import Engine
      >>> config = GrokConfig.tiny().replace(num_layers=1, max_seq_len=32)
      >>> engine = Engine(init(config), ByteTokenizer(config.vocab_size), slots=2, prefill_buckets=(8,))
      >>> async def serve(*prompts):
      ...     async with AsyncEngine(engine) as served:
      ...         jobs = [served.complete(Request(prompt, max_new_tokens=3)) for prompt in prompts]
      ...         return [len(sample.token_ids) for samples in await asyncio.gather(*jobs) for sample in samples]
      >>> asyncio.run(serve("one", "two", "three"))
      [3, 3, 3]
    """

    def __init__(self, engine: Engine):
        if not isinstance(engine, Engine):
            raise ValueError(f"AsyncEngine takes an Engine, not {reprlib.repr(engine)}: make one of a model first.")
        self._engine = engine
        self._task: asyncio.Task[None] | None = None
        self._is_open = self._is_draining = False

    @property
    def is_healthy(self) -> bool:
        """Whether requests are served: inside the `async with` block, while the engine is open and no step failed."""
        return self._is_open and not self._engine.is_closed and self._engine.failure is None

    async def __aenter__(self) -> Self:
        if self._task is not None:
            raise ValueError("this AsyncEngine was entered before: make another one.")
        self._commands: list[Callable[[], None]] = []
        self._wake = asyncio.Event()
        self._stepped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._handles: set[Handle] = set()
        self._task, self._is_open = asyncio.create_task(self._work()), True
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._order(self._close)
        await asyncio.wait([self._task])  # and not the task itself, whose end is no cancellation of the one that leaves

    async def complete(self, request: Request) -> tuple[Completion, ...]:
        """All samples of a request, when the last of them has ended.

        Raises:
          QueueFullError: As many requests wait as may.
          ValueError: What `Engine.submit` raises; or it drains, or the `async with` block was left.
        """
        handles: list[Handle] = []
        async for _ in self._pieces(request, handles):
            pass
        return handles[0].samples

    def stream(self, request: Request) -> AsyncIterator[Piece]:
        """The pieces of a request as they come.

        Raises:
          QueueFullError: As many requests wait as may; when the first piece is asked for.
          ValueError: What `Engine.submit` raises; or it drains, or the `async with` block was left.
        """
        return self._pieces(request, [])

    async def drain(self) -> None:
        """Takes no more requests, and waits until those that it has, be they running or queued, have ended.

        Raises:
          ValueError: The `async with` block was left.
        """
        await self._between_steps(self._refuse)
        while self._is_open and self._engine.has_work:
            await asyncio.shield(self._stepped)

    async def metrics(self) -> Metrics:
        """What the engine does now and did so far, as it is between two steps."""
        return await self._between_steps(self._engine.metrics)

    async def _pieces(self, request: Request, handles: list[Handle]) -> AsyncIterator[Piece]:
        number = 0
        try:
            handle = await self._between_steps(lambda: self._submit(request, handles))
            while True:
                # Before the pieces are looked at: the thread that steps adds the last ones first.
                is_done = handle.is_done
                while number < len(handle.pieces):
                    yield handle.pieces[number]
                    number += 1
                if is_done:
                    return
                if not handle.is_done:
                    await asyncio.shield(self._stepped)
        finally:
            # None if the task was cancelled before the submission; one also if it was between that and its waking.
            for submitted in handles:
                self._handles.discard(submitted)
                if not submitted.is_done:
                    self._order(functools.partial(self._engine.cancel, submitted))

    def _refuse(self) -> None:
        self._is_draining = True

    def _submit(self, request: Request, handles: list[Handle]) -> Handle:
        if self._is_draining:
            raise ValueError("this AsyncEngine drains and takes no more requests: send this one to another.")
        handle = self._engine.submit(request)
        handles.append(handle)
        self._handles.add(handle)
        return handle

    async def _between_steps(self, call: Callable[[], T]) -> T:
        """Calls something when no step is being made, and waits for its result."""
        if not self._is_open:
            raise ValueError("this AsyncEngine does not run: use it inside `async with`.")
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            if result.cancelled():
                return
            try:
                result.set_result(call())
            except Exception as error:
                result.set_exception(error)

        self._order(run)
        return await result

    def _order(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _close(self) -> None:
        assert self._task is not None
        self._is_open = False
        self._task.cancel()

    async def _work(self) -> None:
        try:
            with ThreadPoolExecutor(1, "grokjax-engine") as thread:
                while True:
                    await self._run_commands()
                    if self._engine.has_work:
                        # A failed step ends every request with its error and refuses the next ones: that tells all.
                        with contextlib.suppress(Exception):
                            await asyncio.get_running_loop().run_in_executor(thread, self._engine.step)
                    self._tell()
        finally:
            self._is_open = False
            for handle in self._handles:
                self._engine.cancel(handle)
            self._tell()

    async def _run_commands(self) -> None:
        if not self._engine.has_work:
            await self._wake.wait()
        self._wake.clear()
        commands, self._commands = self._commands, []
        for command in commands:
            command()
        # The last command ends this task, which takes effect where it waits: here, not while a step is made.
        await asyncio.sleep(0)

    def _tell(self) -> None:
        """Wakes everyone who waits for a step."""
        self._stepped.set_result(None)
        self._stepped = asyncio.get_running_loop().create_future()
