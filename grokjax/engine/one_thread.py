"""One thread at a time: a second one is refused in a sentence, before it changes anything."""

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar


class OneThread:
    """What one thread at a time may use: its methods that are marked with `by_one_thread`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()


T = TypeVar("T", bound=OneThread)
P = ParamSpec("P")
R = TypeVar("R")


def by_one_thread(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Lets a thread into a method unless another is in such a method of the same object; they may call each other.

    Raises:
      ValueError: Another one is.
    """

    @functools.wraps(method)
    def call(self: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._lock.acquire(blocking=False):
            raise ValueError(
                f"another thread is using this {type(self).__name__}, which the thread "
                f"{threading.current_thread().name!r} cannot meanwhile: let one thread make all calls, or serve many "
                "tasks with AsyncEngine."
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self._lock.release()

    return call
