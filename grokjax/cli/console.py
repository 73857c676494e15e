"""What the commands say: messages and progress on standard error, tables for standard output."""

import contextlib
import io
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from grokjax import checkpoint
from grokjax.distributed import process_index

# One for messages and bars, so that a message is written above a bar and not into it.
STDERR = Console(stderr=True, markup=False, emoji=False, highlight=False)

# The package's, to which its library logs, and that of the commands.
_PACKAGE, _LOGGER = logging.getLogger("grokjax"), logging.getLogger(__name__)

# Characters of a bar, few so that what follows it fits into 80; and seconds between two lines where there is none.
_BAR = 12
_LINE_PERIOD = 10.0
# Seconds over which a rate is measured: prompts of a file end in bursts.
_RATE_PERIOD = 300.0
# Columns of a table that nobody looks at in a terminal: no line of it is ever broken.
_UNBROKEN = 10_000


class Display(Progress):
    """Progress of one task: a bar and its texts in a terminal, elsewhere the texts alone, a line now and then.

    It is a context, at whose end the bar stays as it is. Of several processes, the first shows it, unless `--quiet`.

    Args:
      texts: columns of text; the bar stands after the first.
      clock: seconds.
    """

    def __init__(self, *texts: ProgressColumn, clock: Callable[[], float] = time.perf_counter):
        self.texts, self.said = texts, -math.inf
        self.has_bar = _has_bars()
        super().__init__(
            texts[0],
            BarColumn(bar_width=_BAR),
            *texts[1:],
            console=STDERR,
            get_time=clock,
            speed_estimate_period=_RATE_PERIOD,
            redirect_stdout=False,
            disable=not (self.has_bar and process_index() == 0 and _LOGGER.isEnabledFor(logging.INFO)),
        )

    def show(self, task: TaskID, **changes: Any) -> None:
        """Changes the task as `Progress.update` does; without a bar, says so at the end and every ten seconds."""
        self.update(task, **changes)
        now, shown = self.get_time(), self.tasks[task]
        if not self.has_bar and (shown.finished or now - self.said >= _LINE_PERIOD):
            self.said = now
            say(" ".join(filter(None, (str(text.render(shown)) for text in self.texts))))


def byte_progress(what: str) -> contextlib.AbstractContextManager[Callable[[checkpoint.Progress], None] | None]:
    """Whom to tell how many bytes of a checkpoint are done: a bar in a terminal, elsewhere nobody, and so the logger.

    Args:
      what: has become of the bytes, such as `loaded`.
    """
    return ByteProgress(what) if _has_bars() else contextlib.nullcontext()


class ByteProgress(Display):
    """A bar of the bytes of a checkpoint that are done, at what rate, and how long the rest takes.

    What is done at the first call, maybe by an earlier run, counts for no rate.

    Args:
      what: has become of the bytes, such as `loaded`.
    """

    def __init__(self, what: str):
        super().__init__(
            TextColumn("{task.description}", markup=False),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("left: {task.fields[parameter]}", markup=False),
        )
        self.bytes = self.add_task(what, total=None, parameter="")

    def __call__(self, progress: checkpoint.Progress) -> None:
        """Shows one more part."""
        self.show(self.bytes, total=progress.total_bytes, completed=progress.done_bytes, parameter=progress.parameter)


class _TimeLeft(TimeRemainingColumn):
    """How long the rest takes, as soon as there is a rate to tell it by."""

    def render(self, task: Task) -> Text:
        return Text() if task.time_remaining is None else super().render(task).append(" left")


class BatchProgress(Display):
    """Shows how many results there are, at what rate tokens come, and how long the rest takes.

    The results of an earlier run, and the time before the first token, which goes into compiling, count for no rate.

    Args:
      total: results that there will be.
      doing: what makes them, in one word.
      clock: seconds.
    """

    def __init__(self, total: int, doing: str = "generating", *, clock: Callable[[], float] = time.perf_counter):
        super().__init__(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            _TimeLeft(),
            clock=clock,
        )
        self.doing = doing
        self.results = self.add_task("compiling the first steps", total=total, rate="")
        self.tokens = self.add_task("tokens", total=None, visible=False)

    def __call__(self, done: int, tokens: int) -> None:
        """Shows so many results, and so many tokens of this run."""
        if tokens and not self.tasks[self.tokens].completed:
            self.reset(self.results, completed=done)
        self.update(self.tokens, completed=tokens)
        speed = self.tasks[self.tokens].speed
        self.show(
            self.results,
            completed=done,
            description=self.doing if tokens else "compiling the first steps",
            rate="" if speed is None else f"{speed:.1f} tokens/s",
        )


def table_text(table: Table) -> str:
    """A table as lines of text, as wide as the terminal of standard output, elsewhere as wide as it needs."""
    output = io.StringIO()
    Console(file=output, width=None if sys.stdout.isatty() else _UNBROKEN, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Meanwhile, what the package logs is written to standard error: all but details, unless `set_level` is told."""
    handler, level, propagates = _Lines(), _PACKAGE.level, _PACKAGE.propagate
    _PACKAGE.addHandler(handler)
    _PACKAGE.propagate = False  # a handler of all loggers, which some library may install, would write it again
    set_level(logging.INFO)
    try:
        yield
    finally:
        _PACKAGE.removeHandler(handler)
        _PACKAGE.propagate = propagates
        set_level(level)


def set_level(level: int) -> None:
    """Chooses what is written: from `logging.DEBUG`, `INFO` or `WARNING` on."""
    _PACKAGE.setLevel(level)


def say(text: str) -> None:
    """Writes a line to standard error, unless `--quiet`; of several processes, the first does."""
    _LOGGER.info("%s", text)


def say_error(error: Exception) -> None:
    """Writes an error to standard error, on every process that has one."""
    _LOGGER.error("%s", error)


class _Lines(logging.Handler):
    """Writes what is logged to standard error, a line each; warnings and errors on every process that has one."""

    def emit(self, record: logging.LogRecord) -> None:
        number, is_warning = process_index(), record.levelno >= logging.WARNING
        if is_warning:
            where = f" in process {number}" if number else ""
            STDERR.print(f"grokjax: {record.levelname.lower()}{where}: {record.getMessage()}", soft_wrap=True)
        elif not number:
            STDERR.print(f"grokjax: {record.getMessage()}", soft_wrap=True)


def _has_bars() -> bool:
    return STDERR.is_terminal and not STDERR.is_dumb_terminal
