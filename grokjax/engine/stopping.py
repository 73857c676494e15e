"""When a continuation ends, and what of its text may be shown before that is known. Plain Python."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class CheckedText:
    """Text that is certain, and whether a stop string followed it."""

    text: str
    stopped: bool


class StopFilter:
    """Lets text through up to the stop string that is complete first, and holds back what may become one.

    Whatever the pieces in which a text comes, the same part of it is let through.

    Args:
      stop: the stop strings, none of them empty.

    Raises:
      ValueError: A stop string is empty.

    Example:
      >>> stop = StopFilter(["END"])
      >>> stop.push("the E"), stop.push("ND of it")
      (CheckedText(text='the ', stopped=False), CheckedText(text='', stopped=True))
    """

    def __init__(self, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("a stop string is empty, which would end every text at once: give it some characters.")
        self._stop = tuple(stop)
        self._pending = ""

    def push(self, text: str) -> CheckedText:
        """Takes more text; returns what is certain now. After a stop string, nothing may follow."""
        text = self._pending + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._pending = ""
            _, at = min(found)  # the one that ends first, as if the text came character by character
            return CheckedText(text[:at], stopped=True)
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[certain:]
        return CheckedText(text[:certain], stopped=False)

    def flush(self) -> str:
        """Ends the text: what was held back is no stop string."""
        rest, self._pending = self._pending, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that a stop string may begin with."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
