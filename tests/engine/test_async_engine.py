"""The asyncio front: many tasks at once, cancelled tasks, streams left early, full queues and failing steps."""

import asyncio
import contextlib
import random
import threading
import time
import weakref

import pytest
from builders import still_held
from fake_steps import FakeModel, FakeSteps, continuation

from grokjax.engine import AsyncEngine, Engine, Handle, QueueFullError
from grokjax.request import Request


class SlowSteps(FakeSteps):
    """Steps that take a moment, so that the loop's tasks run between and beside them."""

    def decode(self, settings):
        time.sleep(0.002)
        return super().decode(settings)


def make_engine(model: FakeModel | None = None, **options) -> Engine:
    defaults = {"slots": 3, "max_len": 200, "prefill_buckets": (4, 8), "make_steps": SlowSteps}
    return Engine(model or FakeModel(), **{**defaults, **options})


def request(first: int, count: int = 10, **options) -> Request:
    return Request([first, 5], max_new_tokens=count, ignore_eos=True, **options)


def run(main) -> None:
    """Runs a coroutine; one that hangs is a failure."""
    asyncio.run(asyncio.wait_for(main, 30))


def test_many_tasks_get_their_own() -> None:
    async def main() -> None:
        async with AsyncEngine(make_engine()) as served:
            answers = await asyncio.gather(*(served.complete(request(3 + i, n=2)) for i in range(12)))
            for i, samples in enumerate(answers):
                expected = [continuation([3 + i, 5], 10, seed=seed) for seed in range(2)]
                assert [list(sample.token_ids) for sample in samples] == expected
            assert (await served.metrics()).new_tokens == 240

    run(main())


def test_streams_come_while_they_are_made() -> None:
    async def main() -> None:
        async with AsyncEngine(make_engine()) as served:

            async def read(first: int) -> list[float]:
                times, tokens = [], []
                async for piece in served.stream(request(first, 20)):
                    times.append(time.perf_counter())
                    tokens.append(piece.token_id)
                assert tokens == [*continuation([first, 5], 20), None]
                return times

            for times in await asyncio.gather(read(3), read(4), read(5)):
                assert times[-1] - times[0] > 0.002 * 10

    run(main())


def test_a_cancelled_task_cancels_its_request() -> None:
    async def main() -> None:
        engine = make_engine(slots=1)
        async with AsyncEngine(engine) as served:
            long = asyncio.create_task(served.complete(request(3, 150)))
            other = asyncio.create_task(served.complete(request(4)))
            await asyncio.sleep(0.05)
            long.cancel()
            [done] = await other
            assert list(done.token_ids) == continuation([4, 5], 10)
            assert (await served.metrics()).finished == {"cancelled": 1, "length": 1}
            with pytest.raises(asyncio.CancelledError):
                await long

    run(main())


def test_a_stream_left_early_cancels_its_request() -> None:
    async def main() -> None:
        async with AsyncEngine(make_engine()) as served:
            stream = served.stream(request(3, 150))
            async for piece in stream:
                assert piece.token_id == continuation([3, 5], 1)[0]
                break
            await stream.aclose()
            while (metrics := await served.metrics()).active_slots:
                await asyncio.sleep(0)
            assert metrics.finished == {"cancelled": 1}
            assert metrics.new_tokens < 150

    run(main())


def test_the_end_of_the_block_ends_the_requests() -> None:
    async def main() -> None:
        engine = make_engine(slots=1)
        async with AsyncEngine(engine) as served:
            tasks = [asyncio.create_task(served.complete(request(3 + i, 150))) for i in range(3)]
            await asyncio.sleep(0.02)
        for task in tasks:
            assert [sample.finish_reason for sample in await task] == ["cancelled"]
        metrics = engine.metrics()
        assert (metrics.active_slots, metrics.queue_length, metrics.finished) == (0, 0, {"cancelled": 3})
        with pytest.raises(ValueError, match="this AsyncEngine does not run: use it inside `async with`"):
            await served.complete(request(3))
        with pytest.raises(ValueError, match="was entered before: make another one"):
            await served.__aenter__()

    run(main())


def test_errors_reach_their_task() -> None:
    async def main() -> None:
        async with AsyncEngine(make_engine(slots=1, max_queue=1)) as served:
            running = asyncio.create_task(served.complete(request(3, 100)))
            while not (await served.metrics()).active_slots:
                await asyncio.sleep(0)
            waiting = asyncio.create_task(served.complete(request(4)))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="max_queue=1 allows no more"):
                await served.complete(request(5))
            assert len(await running + await waiting) == 2
            [bad] = await served.complete(Request([]))
            assert "the prompt is empty" in str(bad.error)

    run(main())


def test_a_failing_step_reaches_everyone_and_hangs_nobody() -> None:
    async def main() -> None:
        model = FakeModel()
        async with AsyncEngine(make_engine(model, slots=1)) as served:
            tasks = [asyncio.create_task(served.complete(request(3 + i, 150))) for i in range(3)]
            await asyncio.sleep(0.02)
            model.steps.error = RuntimeError("out of memory")
            for task in tasks:
                assert [str(sample.error) for sample in await task] == ["out of memory"]
            with pytest.raises(ValueError, match="a step of this engine failed"):
                await served.complete(request(3))

    run(main())


def test_health_is_told_before_during_and_after() -> None:
    async def main() -> None:
        model = FakeModel()
        served = AsyncEngine(make_engine(model))
        assert not served.is_healthy
        async with served:
            assert served.is_healthy
            await served.complete(request(3))
            assert served.is_healthy
        assert not served.is_healthy
        async with AsyncEngine(make_engine(model)) as failing:
            model.steps.error = RuntimeError("out of memory")
            await failing.complete(request(3))
            assert not failing.is_healthy
        engine = make_engine(FakeModel())
        async with AsyncEngine(engine) as closed:
            engine.close()
            assert not closed.is_healthy

    run(main())


def test_an_engine_that_drains_ends_what_it_has_and_takes_no_more() -> None:
    async def main() -> None:
        async with AsyncEngine(make_engine(slots=1)) as served:
            tasks = [asyncio.create_task(served.complete(request(3 + i))) for i in range(4)]
            while not (await served.metrics()).active_slots:
                await asyncio.sleep(0)
            draining = asyncio.create_task(served.drain())
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="this AsyncEngine drains and takes no more requests: send this one"):
                await served.complete(request(9))
            assert served.is_healthy
            await draining
            assert (await served.metrics()).finished == {"length": 4}
        for i, task in enumerate(tasks):
            [done] = await task
            assert list(done.token_ids) == continuation([3 + i, 5], 10)

    run(main())


def test_draining_an_engine_that_fails_or_is_left_hangs_nobody() -> None:
    async def main() -> None:
        model = FakeModel()
        async with AsyncEngine(make_engine(model)) as failing:
            task = asyncio.create_task(failing.complete(request(3, 150)))
            while not (await failing.metrics()).active_slots:
                await asyncio.sleep(0)
            model.steps.error = RuntimeError("out of memory")
            await failing.drain()
            assert (await task)[0].finish_reason == "error"
        async with AsyncEngine(make_engine()) as left:
            await asyncio.sleep(0)
            task = asyncio.create_task(left.complete(request(3, 150)))
            while not (await left.metrics()).active_slots:
                await asyncio.sleep(0)
            draining = asyncio.create_task(left.drain())
            await asyncio.sleep(0)
        await draining
        assert (await task)[0].finish_reason == "cancelled"

    run(main())


def test_text_without_a_tokenizer_reaches_its_task_as_an_error() -> None:
    async def main() -> None:
        async with AsyncEngine(make_engine()) as served:
            with pytest.raises(ValueError, match="the engine has no tokenizer"):
                await served.complete(Request("abc"))

    run(main())


def test_a_task_cancelled_before_it_wakes_cancels_its_request() -> None:
    async def main() -> None:
        engine = make_engine()
        async with AsyncEngine(engine) as served:
            made = request(3, 150)
            reference, task = weakref.ref(made), asyncio.create_task(served.complete(made))
            while not engine.has_work:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while engine.has_work:
                await asyncio.sleep(0)
            assert (await served.metrics()).finished["cancelled"] == 1
            del made, task
            assert still_held([reference]) == 0

    run(main())


def test_no_stream_loses_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last pieces may be added by the other thread while the loop asks whether the request has ended."""
    is_done = Handle.is_done.fget

    def ask_slowly(handle: Handle) -> bool:
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.002)
        return is_done(handle)

    monkeypatch.setattr(Handle, "is_done", property(ask_slowly))

    async def main() -> None:
        async with AsyncEngine(make_engine(make_steps=FakeSteps)) as served:

            async def read(first: int) -> None:
                for seed in range(8):
                    tokens = [piece.token_id async for piece in served.stream(request(first, 4, seed=seed))]
                    assert tokens == [*continuation([first, 5], 4, seed=seed), None]

            await asyncio.gather(*(read(3 + i) for i in range(8)))

    run(main())


def test_a_cancellation_passes_through_the_end_of_the_block() -> None:
    async def main() -> None:
        async def leave() -> None:
            async with AsyncEngine(make_engine()) as served:
                await served.complete(request(3, 2))
                asyncio.current_task().cancel()  # takes effect at the next wait, which is the block's end

        task = asyncio.create_task(leave())
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_a_task_cancelled_at_once_submits_nothing() -> None:
    async def main() -> None:
        async with AsyncEngine(make_engine()) as served:
            task = asyncio.create_task(served.complete(request(3)))
            await asyncio.sleep(0)
            task.cancel()
            await served.complete(request(4))
            assert (await served.metrics()).finished == {"length": 1}

    run(main())


@pytest.mark.parametrize("seed", range(20))
def test_random_tasks_lose_nothing_and_leave_nothing_behind(seed: int) -> None:
    """Tasks that complete, stream, leave early or are cancelled, at random moments."""
    draw = random.Random(seed)
    references: list[weakref.ref[Request]] = []

    async def task(served: AsyncEngine, first: int) -> None:
        for _ in range(draw.randrange(12)):
            await asyncio.sleep(0)
        made = request(first)
        references.append(weakref.ref(made))
        expected, most = continuation([first, 5], 10), draw.choice((3, 100))
        tokens = []
        async with contextlib.aclosing(served.stream(made)) as stream:
            async for piece in stream:
                tokens.append(piece.token_id)
                if len(tokens) == most:
                    break
        assert tokens == [*expected, None][:most]

    async def main() -> None:
        engine = make_engine(make_steps=FakeSteps, slots=draw.choice((1, 3)))
        async with AsyncEngine(engine) as served:
            tasks = [asyncio.create_task(task(served, 3 + i)) for i in range(15)]
            for victim in draw.sample(tasks, 4):
                for _ in range(draw.randrange(30)):
                    await asyncio.sleep(0)
                victim.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends), ends
            while (metrics := await served.metrics()).active_slots or engine.has_work:
                await asyncio.sleep(0)
            assert metrics.queue_length == 0
            assert sum(end is None for end in ends) <= sum(metrics.finished.values()) <= len(references)
            del ends, tasks, victim  # whose errors lead to requests
            assert still_held(references) == 0

    run(main())


def test_errors_of_an_idle_engine_do_not_pile_up() -> None:
    async def main() -> None:
        references = []

        async def fail(served: AsyncEngine) -> None:
            made = Request([])
            references.append(weakref.ref(made))
            [done] = await served.complete(made)
            assert done.finish_reason == "error"

        async with AsyncEngine(make_engine()) as served:
            for _ in range(5):
                await fail(served)
            await served.metrics()
            assert still_held(references) < 2

    run(main())


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="AsyncEngine takes an Engine, not 'engine': make one of a model first"):
        AsyncEngine("engine")
