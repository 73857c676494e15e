"""Jobs of the tests of the scheduler, and a small scheduler for them."""

import numpy as np

from grokjax.engine.scheduler import Job, Scheduler


def job(length: int = 3, *, first: int = 0, **options) -> Job:
    """A job whose prompt counts up from `first`."""
    return Job(np.arange(first, first + length, dtype=np.int32), **options)


def scheduler(slots: int = 2, **options) -> Scheduler[Job]:
    return Scheduler(**{"slots": slots, "max_len": 64, "buckets": (4, 8), **options})


def submit(plan: Scheduler[Job], *jobs: Job) -> None:
    for one in jobs:
        plan.submit(one)
