"""The standard streams of a command: text may fail to be written, and ends it; messages vanish, and it goes on."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class ReaderLeft(Exception):  # noqa: N818, it is no error
    """Nobody reads on what a command writes to standard output."""


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """The streams that a command finds: one that was closed leads nowhere, and no message fails to be written."""
    _open_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of few characters must not end the run
    if not isinstance(sys.stderr, io.TextIOWrapper):  # a notebook's
        yield
        return
    with contextlib.redirect_stderr(_without_errors(sys.stderr)):
        yield


def write(text: str) -> None:
    """Writes text to standard output, all of it at once.

    Raises:
      ReaderLeft: Nobody reads on.
      ValueError: It cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What Python still holds, and would write at its exit, goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise ReaderLeft from error
        raise ValueError(
            f"standard output cannot be written: {error.strerror}. Send it elsewhere, such as to a disk with room."
        ) from error


def _open_closed() -> None:
    """Opens each closed stream in its place: a file of the command would get its number, and what others write to it.

    The lowest free number is that of the first closed one.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _without_errors(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The stream, but what cannot be written to it vanishes."""
    binary: Any = stream.buffer  # of a process that buffers nothing, this is the file itself
    buffer = io.BufferedWriter(_Vanishing(getattr(binary, "raw", binary)))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)


class _Vanishing(io.RawIOBase):
    """A file in which what cannot be written counts as written."""

    def __init__(self, file: Any):
        self._file = file

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return bool(self._file.isatty())

    def fileno(self) -> int:
        return int(self._file.fileno())

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data) or len(data)
        except OSError:
            return len(data)
