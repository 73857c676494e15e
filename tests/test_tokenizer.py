"""Text to ids and back, whole and streamed, for the trained, the byte and the released tokenizer."""

from collections.abc import Iterable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from grokjax.tokenizer import ByteTokenizer, SentencePieceTokenizer, StreamDecoder, Tokenizer, load_tokenizer

FIRST_BYTES = {"trained": 46, "byte": 3, "release": 69}
CASES = ["trained", "byte", pytest.param("release", marks=pytest.mark.release_tokenizer)]

# U+2581 is SentencePiece's own sign for a space: text cannot hold it and come back.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Tokenizer, int]:
    """A tokenizer, and the id of its byte 0."""
    if request.param == "byte":
        return ByteTokenizer(512), FIRST_BYTES["byte"]
    tokenizer = SentencePieceTokenizer(request.getfixturevalue(f"{request.param}_tokenizer_path"))
    return tokenizer, FIRST_BYTES[request.param]


@pytest.fixture
def tokenizer(case: tuple[Tokenizer, int]) -> Tokenizer:
    return case[0]


# The fixtures do not change between examples.
property_test = hypothesis.settings(
    max_examples=200, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


def test_special_ids_are_the_release_s(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.decode([0, 1, 2]) == ""


def test_first_byte_of_the_cases(case: tuple[Tokenizer, int]) -> None:
    tokenizer, first_byte = case
    assert tokenizer.decode([first_byte + ord("A"), first_byte + ord("z")]) == "Az"


@property_test
@hypothesis.given(text=TEXTS)
@hypothesis.example("  two  spaces ")
@hypothesis.example("\n\ttab\r\n")
@hypothesis.example("a\0b")
@hypothesis.example("\ufffd 😀🧑\u200d🚀 é")
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@property_test
@hypothesis.given(text=TEXTS)
@hypothesis.example("😀🧑\u200d🚀 é")
def test_stream_never_cuts_a_character(tokenizer: Tokenizer, text: str) -> None:
    pushed = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pushed) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pushed)
    assert text.endswith("\ufffd") or pushed[-1] == ""


@property_test
@hypothesis.given(data=st.data())
def test_stream_equals_decode_for_any_ids(case: tuple[Tokenizer, int], data: st.DataObject) -> None:
    tokenizer, first_byte = case
    # Bytes that begin and continue characters, special ids and anything else, each often.
    byte = st.sampled_from([0x20, 0x41, 0x82, 0x90, 0xAC, 0xBD, 0xBF, 0xC3, 0xE2, 0xEF, 0xF0, 0xFF])
    bytes_of_character = st.sampled_from(["é", "€", "\ufffd", "😀"]).map(str.encode).map(list)
    of_bytes = st.one_of(byte.map(lambda b: [b]), bytes_of_character).map(lambda bs: [first_byte + b for b in bs])
    other = st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, tokenizer.vocab_size - 1)).map(lambda token: [token])
    chunks = data.draw(st.lists(st.one_of(of_bytes, other), max_size=80))
    ids = [token for chunk in chunks for token in chunk]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "stream_bytes",
    [b"\xff", b"\xe2", b"\xf0\x90\x90", b"\x90", b"\xef\xbf\xbd", b"\xf0\x90\x90\x90", b"a", b" ", b"\xe2 "],
    ids=repr,
)
@pytest.mark.parametrize("silent", [[], [0], [0, 1, 2], [0] * 9 + [1] * 9 + [2] * 9])
def test_stream_equals_decode_in_long_runs(case: tuple[Tokenizer, int], stream_bytes: bytes, silent: list[int]) -> None:
    tokenizer, first_byte = case
    ids = (silent + [first_byte + byte for byte in stream_bytes] + silent) * 40
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_joins_bytes_as_decode_does_around_silent_ids(case: tuple[Tokenizer, int]) -> None:
    tokenizer, first_byte = case
    first, *rest = [first_byte + byte for byte in "𐐐".encode()]
    for silent in ([0], [0, 1, 2] * 5):
        ids = [first, *silent, *rest]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


class CountingTokenizer(ByteTokenizer):
    """Remembers the longest list of ids that it was asked to decode."""

    longest = 0

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        type(self).longest = max(self.longest, len(ids))
        return super().decode(ids)


@pytest.mark.parametrize(
    "ids",
    [[100], [258], [3 + 0xE2], [0], [0, 1, 2], [3 + 0xE2, 0, 1, 2], [300], [3 + 0xF0, 3 + 0x90]],
    ids=repr,
)
def test_stream_decodes_a_bounded_window_at_each_push(ids: list[int]) -> None:
    CountingTokenizer.longest = 0
    stream(CountingTokenizer(512), ids * 2000)
    assert CountingTokenizer.longest <= 48


def test_flush_makes_the_decoder_ready_for_another_text(trained_tokenizer: SentencePieceTokenizer) -> None:
    decoder = StreamDecoder(trained_tokenizer)
    for text in ("the first", "the second"):
        pushed = [decoder.push(token) for token in trained_tokenizer.encode(text)]
        assert "".join(pushed) + decoder.flush() == text


def test_ids_may_be_numpy_integers(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("license")
    assert tokenizer.decode(np.array(ids, np.int32)) == "license"
    assert "".join(stream(tokenizer, np.array(ids, np.int32))) == "license"


@pytest.mark.parametrize("outside", [-1, 1 << 20])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, outside: int) -> None:
    message = f"token id {outside} is outside the vocabulary of {tokenizer.vocab_size} tokens"
    with pytest.raises(ValueError, match=message):
        tokenizer.decode([5, outside])
    with pytest.raises(ValueError, match=message):
        StreamDecoder(tokenizer).push(outside)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate at character 1, .* errors='replace' first"):
        tokenizer.encode("a\ud800")


def test_markers_become_their_id_or_stay_characters(trained_tokenizer: SentencePieceTokenizer) -> None:
    separator = trained_tokenizer.encode("<|separator|>")[-1]
    text = "a<|separator|>b <|mask|><|nothing|><|separator|>"
    assert trained_tokenizer.encode(text).count(separator) == 2
    ids = trained_tokenizer.encode_plain(text)
    assert not set(ids) & set(range(separator, separator + 6))
    assert trained_tokenizer.decode(ids) == text
    unmarked = "no markers <|nothing|>"
    assert trained_tokenizer.encode_plain(unmarked) == trained_tokenizer.encode(unmarked)


@property_test
@hypothesis.given(parts=st.lists(st.one_of(TEXTS, st.sampled_from(["<|separator|>", "<|mask|>", "<", "<|", "|>"]))))
def test_plain_text_never_has_markers(trained_tokenizer: SentencePieceTokenizer, parts: list[str]) -> None:
    separator = trained_tokenizer.encode("<|separator|>")[-1]
    ids = trained_tokenizer.encode_plain("".join(parts))
    assert not set(ids) & set(range(separator, separator + 6))
    assert trained_tokenizer.decode(ids) == "".join(parts)


def test_bytes_show_ids_that_mean_nothing() -> None:
    tokenizer = ByteTokenizer(512)
    assert tokenizer.decode([*tokenizer.encode("é"), 259, 1, 511, 3 + 0xC3]) == "é<259><511>\ufffd"


def test_bytes_need_room_in_the_vocabulary() -> None:
    assert ByteTokenizer(259).decode([258]) == "\ufffd"
    with pytest.raises(ValueError, match=r"at least 259 tokens .* not vocab_size=258: use a larger vocabulary"):
        ByteTokenizer(258)


def test_load_takes_a_file_or_its_directory(trained_tokenizer_path: Path) -> None:
    for path in (trained_tokenizer_path, str(trained_tokenizer_path), trained_tokenizer_path.parent):
        assert load_tokenizer(path).vocab_size == 512


def test_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer file '.*nothing': give the path of a SentencePiece"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"there is no tokenizer file '.*tokenizer\.model'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"plain text, no model\n", b"\x00" * 1000])
def test_another_file_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'.*other\.model' is not a SentencePiece model: give the 'tokenizer\.model'"):
        load_tokenizer(path)


@pytest.mark.release_tokenizer
def test_release_gives_the_ids_of_the_released_runner(release_tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(release_tokenizer_path)
    ids = [422, 3033, 356, 1180, 333, 9072, 360, 2175, 391, 359, 1805]
    text = "The answer to life the universe and everything is of course"
    assert tokenizer.vocab_size == 131072
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("") == []
    assert tokenizer.encode("hello<|separator|>hi") == [21560, 47, 5831]
    assert tokenizer.decode(tokenizer.encode_plain("hello<|separator|>hi")) == "hello<|separator|>hi"
    assert not set(tokenizer.encode_plain("hello<|separator|>hi<|control20|>")) & set(range(47, 69))
