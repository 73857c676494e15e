"""What the commands say: messages and progress on standard error, tables for standard output."""

import io
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from grokjax import checkpoint
from grokjax.distributed import is_first

# One for messages and bars, so that a message is written above a bar and not into it.
STDERR = Console(stderr=True, markup=False, emoji=False, highlight=False)

# Characters of a bar, few so that what follows it fits into 80; and seconds between two lines where there is none.
_BAR = 12
_LINE_PERIOD = 10.0
# Seconds over which a rate is measured: prompts of a file end in bursts.
_RATE_PERIOD = 300.0
# Columns of a table that nobody looks at in a terminal: no line of it is ever broken.
_UNBROKEN = 10_000


class Display(Progress):
    """Progress of one task: a bar and its texts in a terminal, elsewhere the texts alone, a line now and then.

    It is a context, at whose end the bar stays as it is. Of several processes, the first shows it.

    Args:
      texts: columns of text; the bar stands after the first.
      clock: seconds.
    """

    def __init__(self, *texts: ProgressColumn, clock: Callable[[], float] = time.perf_counter):
        self.texts, self.said = texts, -math.inf
        self.has_bar = STDERR.is_terminal and not STDERR.is_dumb_terminal
        super().__init__(
            texts[0],
            BarColumn(bar_width=_BAR),
            *texts[1:],
            console=STDERR,
            get_time=clock,
            speed_estimate_period=_RATE_PERIOD,
            redirect_stdout=False,
            disable=not (self.has_bar and is_first()),
        )

    def show(self, task: TaskID, **changes: Any) -> None:
        """Changes the task as `Progress.update` does; without a bar, says so at the end and every ten seconds."""
        self.update(task, **changes)
        now, shown = self.get_time(), self.tasks[task]
        if not self.has_bar and (shown.finished or now - self.said >= _LINE_PERIOD):
            self.said = now
            say(" ".join(filter(None, (str(text.render(shown)) for text in self.texts))))


class ByteProgress(Display):
    """Shows how many bytes of a checkpoint are done, at what rate, and how long the rest takes.

    What is done at the first call, maybe by an earlier run, counts for no rate.

    Args:
      what: the work, such as `loaded`.
      clock: seconds.
    """

    def __init__(self, what: str, *, clock: Callable[[], float] = time.perf_counter):
        super().__init__(
            TextColumn("{task.description}", markup=False),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("left: {task.fields[parameter]}", markup=False),
            clock=clock,
        )
        self.bytes = self.add_task(what, total=None, parameter="")

    def __call__(self, progress: checkpoint.Progress) -> None:
        """Shows one more part; renamed and fresh parameters are always named."""
        if progress.source is None:
            say(f"{progress.parameter} keeps its fresh value")
        elif progress.source != progress.parameter:
            say(f"{progress.parameter} from {progress.source}")
        self.show(self.bytes, total=progress.total_bytes, completed=progress.done_bytes, parameter=progress.parameter)


class BatchProgress(Display):
    """Shows how many results there are, at what rate tokens come, and how long the rest takes.

    Args:
      total: results that there will be.
      clock: seconds.
    """

    def __init__(self, total: int, *, clock: Callable[[], float] = time.perf_counter):
        super().__init__(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            clock=clock,
        )
        self.results = self.add_task("compiling the first steps", total=total, rate="")
        self.tokens = self.add_task("tokens", total=None, visible=False)

    def __call__(self, done: int, tokens: int) -> None:
        """Shows so many results, and so many tokens of this run."""
        self.update(self.tokens, completed=tokens)
        speed = self.tasks[self.tokens].speed
        self.show(
            self.results,
            completed=done,
            description="generating" if tokens else "compiling the first steps",
            rate="" if speed is None else f"{speed:.1f} tokens/s",
        )


def table_text(table: Table) -> str:
    """A table as lines of text, as wide as the terminal of standard output, elsewhere as wide as it needs."""
    output = io.StringIO()
    Console(file=output, width=None if sys.stdout.isatty() else _UNBROKEN, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def say(text: str) -> None:
    """Writes a line to standard error; of several processes, the first does."""
    if is_first():
        STDERR.print(f"grokjax: {text}", soft_wrap=True)


def say_error(error: Exception) -> None:
    """Writes an error to standard error, on every process that has one."""
    where = "" if is_first() else f" in process {jax.process_index()}"
    STDERR.print(f"grokjax: error{where}: {error}", soft_wrap=True)
