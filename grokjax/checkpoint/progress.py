"""How far loading, saving and converting have come, told part by part."""

import dataclasses
from collections.abc import Callable

# What `Progress` calls the units that an interrupted run has left.
EARLIER = "an earlier run"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far loading, saving or converting has come.

    Attributes:
      parameter: the path that was just finished, an expert's number behind it.
      source: the checkpoint's path that it was read from; None where it keeps its fresh value.
      done_bytes: so far, of the checkpoint's bytes.
      total_bytes: in all.
    """

    parameter: str
    source: str | None
    done_bytes: int
    total_bytes: int


Report = Callable[[Progress], None]


class Tally:
    """Counts the bytes that are done, and reports each step.

    Args:
      total_bytes: in all.
      report: called with the `Progress` after each step; None where nobody asks.
    """

    def __init__(self, total_bytes: int, report: Report | None):
        self.total_bytes, self.report, self.done_bytes = total_bytes, report, 0

    def add(self, num_bytes: int, parameter: str, source: str | None) -> None:
        """Counts the bytes of what was just finished, and where it came from: the fields of `Progress`."""
        self.done_bytes += num_bytes
        if self.report is not None:
            self.report(Progress(parameter, source, self.done_bytes, self.total_bytes))
