"""Text to ids and back, whole and streamed, for the trained, the byte and the released tokenizer."""

import errno
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
from builders import ROOT

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


def stream(tokenizer: Tokenizer, ids: Iterable[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    decoder = StreamDecoder(tokenizer, prompt_ids)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


def shared(first: str, second: str) -> str:
    """What two texts both begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(letter for letter, _ in pairs)


def random_ids(tokenizer: Tokenizer, first_byte: int) -> st.SearchStrategy[list[int]]:
    """Bytes that begin and continue characters, special ids and anything else, each often."""
    byte = st.sampled_from([0x20, 0x41, 0x82, 0x90, 0xAC, 0xBD, 0xBF, 0xC3, 0xE2, 0xEF, 0xF0, 0xFF])
    bytes_of_character = st.sampled_from(["é", "€", "\ufffd", "😀"]).map(str.encode).map(list)
    of_bytes = st.one_of(byte.map(lambda b: [b]), bytes_of_character).map(lambda bs: [first_byte + b for b in bs])
    other = st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, tokenizer.vocab_size - 1)).map(lambda token: [token])
    return st.lists(st.one_of(of_bytes, other), max_size=80).map(lambda chunks: list(itertools.chain(*chunks)))


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
    ids = data.draw(random_ids(*case))
    assert "".join(stream(case[0], ids)) == case[0].decode(ids)


@property_test
@hypothesis.given(data=st.data())
def test_prompt_and_stream_together_are_decode_of_both(case: tuple[Tokenizer, int], data: st.DataObject) -> None:
    """Where the prompt ends in the middle of a character, the stream has all of it."""
    tokenizer = case[0]
    prompt_ids, ids = data.draw(random_ids(*case)), data.draw(random_ids(*case))
    prompt, both = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *ids])
    assert "".join(stream(tokenizer, ids, prompt_ids)) == both.removeprefix(shared(prompt, both))


@pytest.mark.parametrize(
    ("prompt", "word", "text"),
    [
        ("in the", "License", " License"),
        ("in the ", "License", " License"),
        ("in the<|separator|>", "License", " License"),
        ("", "License", "License"),
        (" ", "License", " License"),
        ("in the\n", "License", " License"),
        ("in the" + "<|mask|>" * 40, "License", " License"),
    ],
    ids=repr,
)
def test_a_first_word_has_its_space_behind_a_prompt(
    prompt: str, word: str, text: str, trained_tokenizer: SentencePieceTokenizer
) -> None:
    """SentencePiece encodes a word at the beginning of a text as it does behind a space, and decodes it without."""
    ids = trained_tokenizer.encode(word)
    prompt_ids = trained_tokenizer.encode(prompt)
    assert "".join(stream(trained_tokenizer, ids, prompt_ids)) == text
    assert prompt + text == trained_tokenizer.decode([*prompt_ids, *ids])
    silent = [0] * 100
    assert "".join(stream(trained_tokenizer, ids, np.array([*prompt_ids, *silent], np.int32))) == text
    unknown = [512, 600] * 20
    assert "".join(stream(trained_tokenizer, ids, [*prompt_ids, *unknown])) == text


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_prompt_begins_is_of_the_text(case: tuple[Tokenizer, int], cut: int) -> None:
    tokenizer, first_byte = case
    character = [first_byte + byte for byte in "😀".encode()]
    prompt = [*tokenizer.encode("a\ufffd"), *character[:cut]]
    assert "".join(stream(tokenizer, [*character[cut:], first_byte + ord("b")], prompt)) == "😀b"
    assert "".join(stream(tokenizer, [first_byte + ord("b")], prompt)) == "b"


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


def train(**options: object) -> bytes:
    """A small SentencePiece model with two markers and the library's own defaults, its normaliser among them."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "LICENSE").read_text().splitlines()),
        model_writer=file,
        vocab_size=400,
        byte_fallback=True,
        user_defined_symbols=["<|separator|>", "<|mask|>"],
        minloglevel=2,
        **options,
    )
    return file.getvalue()


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def normalizing_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("normalizing") / "tokenizer.model"
    path.write_bytes(train(model_type=request.param))
    return load_tokenizer(path)


FULL_WIDTH = "<|mask|>".translate({code: code + 0xFEE0 for code in range(33, 127)})


@pytest.mark.parametrize(
    "text",
    [FULL_WIDTH, f"a {FULL_WIDTH} b", "a <|mask|> b", f"<|mask|>{FULL_WIDTH}<|separator|>", f"{FULL_WIDTH[:3]}ask|> b"],
    ids=ascii,
)
def test_no_marker_is_forged_through_normalisation(normalizing_tokenizer: SentencePieceTokenizer, text: str) -> None:
    markers = {normalizing_tokenizer.encode(marker)[-1] for marker in ("<|separator|>", "<|mask|>")}
    assert markers & set(normalizing_tokenizer.encode(text))
    ids = normalizing_tokenizer.encode_plain(text)
    assert not markers & set(ids)
    assert normalizing_tokenizer.decode(ids) == normalizing_tokenizer.decode(normalizing_tokenizer.encode(text))


def test_a_marker_that_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    """Of a normaliser that makes a marker of one letter."""
    rules = tmp_path / "rules.tsv"
    rules.write_text("E000\t" + " ".join(f"{ord(letter):04X}" for letter in "<|mask|>") + "\n")
    (tmp_path / "tokenizer.model").write_bytes(train(normalization_rule_tsv=str(rules)))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_plain("a <|mask|>")) == "a <|mask|>"
    with pytest.raises(
        ValueError, match=r"encodes as the marker '<\|mask\|>' even when its .* remove it from the text"
    ):
        tokenizer.encode_plain("a \ue000")


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


def test_a_name_that_no_file_can_have_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read|no such file|File name too long"):
        load_tokenizer(tmp_path / ("long" * 100))


def test_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer file '.*nothing': give the path of a SentencePiece"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"there is no tokenizer file '.*tokenizer\.model'"):
        load_tokenizer(tmp_path)


def test_an_unreadable_file_is_a_sentence(
    trained_tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not taken for something else than a SentencePiece model."""
    with pytest.raises(ValueError, match=r"'.*' is no file: give the path of a SentencePiece model"):
        SentencePieceTokenizer(tmp_path)
    refusal = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(refusal))
    with pytest.raises(ValueError, match=r"the tokenizer file '.*' cannot be read: Permission denied\. Allow it, or"):
        load_tokenizer(trained_tokenizer_path)


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
