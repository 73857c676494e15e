"""What is taken of other people's messages."""

import pytest

from grokjax.errors import first_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("UNAVAILABLE: closed.\nat frame 1\n"), "UNAVAILABLE: closed"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("\n  no\r\nmore"), "no"),
        (MemoryError(), "MemoryError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_first_line_is_what_a_sentence_can_hold(error: Exception, expected: str) -> None:
    assert first_line(error) == expected
