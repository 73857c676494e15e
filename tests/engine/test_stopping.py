"""Stop strings: found wherever the pieces of a text are cut, and never shown in part."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grokjax.engine.stopping import StopFilter

LETTERS = st.text("abc", max_size=12)


def through(pieces: list[str], stop: list[str]) -> tuple[list[str], bool]:
    """What is let through after each piece, and whether a stop string ended it."""
    stop_filter, shown = StopFilter(stop), []
    for piece in pieces:
        checked = stop_filter.push(piece)
        shown.append(checked.text)
        if checked.stopped:
            return shown, True
    return [*shown, stop_filter.flush()], False


def cut_by_definition(text: str, stop: list[str]) -> tuple[str, bool]:
    """The stop string that is complete first wins; of those that end together, the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(pieces=st.lists(LETTERS, max_size=8), stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@example(pieces=["abcd"], stop=["abcd", "bc"])
@example(pieces=["abc", "d"], stop=["abcd", "bc"])
@example(pieces=["aab"], stop=["ab"])
@example(pieces=["aa", "b"], stop=["aab"])
def test_the_same_text_for_any_pieces(pieces: list[str], stop: list[str]) -> None:
    shown, stopped = through(pieces, stop)
    assert ("".join(shown), stopped) == cut_by_definition("".join(pieces), stop)


@given(pieces=st.lists(LETTERS, max_size=8), stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_nothing_is_held_back_without_need(pieces: list[str], stop: list[str]) -> None:
    """Before its end, all of a text is out but an ending that a stop string begins with."""
    stop_filter, given_text, shown = StopFilter(stop), "", ""
    for piece in pieces:
        checked = stop_filter.push(piece)
        if checked.stopped:
            return
        given_text += piece
        shown += checked.text
        held = given_text[len(shown) :]
        assert not held or any(s.startswith(held) and s != held for s in stop)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopFilter(["a", ""])
