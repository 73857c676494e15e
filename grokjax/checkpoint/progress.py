"""How far the work on a checkpoint has come, told part by part: to whoever asks, else to the logger now and then."""

import dataclasses
import logging
import time
from collections.abc import Callable

from humanize import naturaldelta, naturalsize

# What `Progress` calls the units that an interrupted run has left.
EARLIER = "an earlier run"

_LOGGER = logging.getLogger(__name__)
_LINE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far loading, saving, converting, verifying or exporting has come.

    Attributes:
      parameter: the path that was just finished, an expert's number behind it.
      source: the checkpoint's path that it was read from; None where it keeps its fresh value.
      done_bytes: so far, of the checkpoint's bytes.
      total_bytes: in all; of a pass that reads experts as they are chosen, as many as are expected.
    """

    parameter: str
    source: str | None
    done_bytes: int
    total_bytes: int


Report = Callable[[Progress], None]


class LogLines:
    """Tells the logger how far the work has come: at its beginning, every ten seconds, and at its end.

    What is done at the first call, maybe by an earlier run, counts for no rate.

    Args:
      what: has become of the bytes, such as `loaded`.
      clock: seconds.
    """

    def __init__(self, what: str, *, clock: Callable[[], float] = time.monotonic):
        self._what, self._clock = what, clock
        self._first: tuple[float, int] | None = None
        self._told = 0.0

    def __call__(self, progress: Progress) -> None:
        """Takes one more part."""
        now, is_first = self._clock(), self._first is None
        self._first = self._first or (now, progress.done_bytes)
        if is_first or progress.done_bytes == progress.total_bytes or now - self._told >= _LINE_SECONDS:
            self._told = now
            _LOGGER.info("%s", self._line(progress, now, *self._first))

    def _line(self, progress: Progress, now: float, start: float, start_bytes: int) -> str:
        done, total = progress.done_bytes, progress.total_bytes
        line = f"{self._what} {naturalsize(done)} of {naturalsize(total)}"
        rate = (done - start_bytes) / (now - start) if now > start else 0
        if rate:
            line += f", {naturalsize(rate)}/s"
        if rate and done < total:
            line += f", {naturaldelta((total - done) / rate)} left"
        return f"{line}: {progress.parameter}"


class Tally:
    """Counts the bytes that are done, and reports each step.

    Args:
      what: has become of the bytes, such as `loaded`.
      total_bytes: in all.
      report: called with the `Progress` after each step; where nobody asks, the logger is told now and then.
    """

    def __init__(self, what: str, total_bytes: int, report: Report | None):
        self.what, self.total_bytes, self.done_bytes = what, total_bytes, 0
        self.report = LogLines(what) if report is None else report

    def add(self, num_bytes: int, parameter: str, source: str | None) -> None:
        """Counts the bytes of what was just finished, and where it came from: the fields of `Progress`."""
        self.done_bytes += num_bytes
        if source is None:
            _LOGGER.info("%s keeps its fresh value", parameter)
        else:
            renamed = "" if source == parameter else f" from {source}"
            _LOGGER.debug("%s %s%s, %s", self.what, parameter, renamed, naturalsize(num_bytes))
        self.report(Progress(parameter, source, self.done_bytes, self.total_bytes))
