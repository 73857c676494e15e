"""Text to token ids and back: the released SentencePiece model, a byte tokenizer for random models, and streaming."""

import dataclasses
import itertools
import operator
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer; any object with these members will do."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: `encode` gives and `decode` takes ids in [0, vocab_size)."""

    @property
    def pad_id(self) -> int:
        """Id that fills unused positions."""

    @property
    def bos_id(self) -> int:
        """Id of the beginning of a sequence."""

    @property
    def eos_id(self) -> int:
        """Id that ends a continuation."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with no beginning or end id added."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""


class SentencePieceTokenizer:
    """A SentencePiece model; with the release's `tokenizer.model`, ids 0 to 3 are [PAD], [BOS], [EOS], [UNK].

    Args:
      path: the model file.

    Raises:
      ValueError: There is no such file, it cannot be read, or it is not a SentencePiece model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import sentencepiece  # whoever has other tokens need not wait for it

        self._model = sentencepiece.SentencePieceProcessor()
        content = _read_model(Path(path))
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise ValueError(
                f"{os.fspath(path)!r} is not a SentencePiece model: give the 'tokenizer.model' of the release."
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.pad_id: int = self._model.pad_id()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()

    def encode(self, text: str) -> list[int]:
        """The ids of a text as the release encodes it: no [BOS], and markers in the text become their single id.

        `<|separator|>` in the text is id 47. Text from strangers can therefore forge any marker that a prompt
        format relies on: encode the parts that you did not write with `encode_plain`.

        Raises:
          ValueError: The text has lone surrogates, which no UTF-8 text can hold.
        """
        _check_unicode(text)
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text whose markers mean nothing: `<|separator|>` is encoded as the characters it is made of.

        Markers are the vocabulary's pieces of the form `<|name|>`; text without them encodes as in `encode`, and
        `decode` gives the same text in both cases. The result never has a marker's id: what the model's normaliser
        turns into a marker, such as one in full-width characters, is taken apart too.

        Raises:
          ValueError: The text has lone surrogates, or the model makes a marker of text that is already taken apart.
        """
        ids = self.encode(text)
        markers = self._markers(ids)
        if not markers:
            return ids
        found = self._model.encode(text, return_type="offset_mapping")
        starts = (start for token, (start, _) in zip(found["ids"], found["offsets"], strict=True) if token in markers)
        cuts = [0, *(start + 1 for start in starts), len(text)]
        first, *others = [text[start:end] for start, end in itertools.pairwise(cuts)]
        marker = min(markers)
        plain = [*self.encode(first), *(token for part in others for token in self._encode_behind(marker, part))]
        forged = self._markers(plain)
        if forged:
            raise self._inseparable(min(forged))
        return plain

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids: control ids ([PAD], [BOS], [EOS]) give nothing, the first piece loses its leading space.

        Raises:
          ValueError: An id is outside the vocabulary.
        """
        text: str = self._model.decode(_checked_ids(ids, self.vocab_size))
        return text

    def _markers(self, ids: Iterable[int]) -> set[int]:
        """Those of the ids that are markers."""
        return {token for token in set(ids) if _MARKER.fullmatch(self._model.id_to_piece(token))}

    def _encode_behind(self, marker: int, text: str) -> list[int]:
        # SentencePiece puts a space before every text that it encodes. Behind a marker there is none, and a marker is a
        # piece of its own that no merge crosses, so what stands before the text can be cut off again.
        ids = self.encode(self._model.id_to_piece(marker) + text)
        if marker not in ids:
            raise self._inseparable(marker)
        return ids[ids.index(marker) + 1 :]

    def _inseparable(self, marker: int) -> ValueError:
        return ValueError(
            "the text has what this SentencePiece model encodes as the marker "
            f"{self._model.id_to_piece(marker)!r} even when its characters are taken apart: remove it from the text."
        )


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One id a byte of UTF-8, for models without a tokenizer of their own: byte b is id 3 + b.

    The ids 0, 1, 2 are pad, bos and eos, as in the release. Ids beyond the bytes mean nothing, but a random model
    samples them: `decode` shows id 300 as `<300>`.

    Attributes:
      vocab_size: size of the model's vocabulary, at least 259.

    Raises:
      ValueError: The vocabulary is too small for the bytes.

    Example:
      >>> tokenizer = ByteTokenizer(vocab_size=512)
      >>> tokenizer.encode("hé")
      [107, 198, 172]
      >>> tokenizer.decode([107, 300, 198, 172])
      'h<300>é'
    """

    vocab_size: int
    pad_id: ClassVar[int] = 0
    bos_id: ClassVar[int] = 1
    eos_id: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.vocab_size < _FIRST_BYTE + 256:
            raise ValueError(
                f"a byte tokenizer needs at least {_FIRST_BYTE + 256} tokens (three special ids and 256 bytes), not "
                f"vocab_size={self.vocab_size}: use a larger vocabulary, or a SentencePiece model."
            )

    def encode(self, text: str) -> list[int]:
        """The ids of the text's UTF-8 bytes.

        Raises:
          ValueError: The text has lone surrogates, which no UTF-8 text can hold.
        """
        _check_unicode(text)
        return [_FIRST_BYTE + byte for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids: pad, bos and eos give nothing, ids beyond the bytes show as `<id>`.

        Raises:
          ValueError: An id is outside the vocabulary.
        """
        return b"".join(map(self._bytes, _checked_ids(ids, self.vocab_size))).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        if token < _FIRST_BYTE:
            return b""
        byte = token - _FIRST_BYTE
        return bytes([byte]) if byte < 256 else f"<{token}>".encode()


class StreamDecoder:
    """Turns ids into text one at a time: the pushed texts and the flushed one together are `decode` of all ids.

    A character whose bytes are spread over several ids is held back until it is complete. The cost of a push does not
    grow with the text: only a window of the last ids is decoded again.

    Behind a prompt, `decode` of the prompt and the text that comes are together `decode` of all ids: the text begins
    with a space if the first word does. A character that the prompt ends in the middle of, and which the ids complete,
    is the first of the text.

    Args:
      tokenizer: must decode left to right: later ids change the text of earlier ones only where it ends in U+FFFD.
      prompt_ids: ids before the first; those outside the tokenizer's vocabulary, which a model may have, mean nothing.

    Example:
      >>> tokenizer = ByteTokenizer(vocab_size=512)
      >>> decoder = StreamDecoder(tokenizer, tokenizer.encode("café")[:-1])
      >>> decoder.push(tokenizer.encode("é")[-1])
      'é'
    """

    # The window is cut back to _KEEP ids when it exceeds _WINDOW. At most _HELD characters are pending: an unfinished
    # character has up to three bytes, each of them one U+FFFD (SentencePiece) or all of them one (Python). _KEEP has
    # room for them and for _REPEATS of each special id between, so a cut never changes how pending bytes are read.
    _WINDOW = 32
    _KEEP = 16
    _HELD = 3
    _REPEATS = 2

    _ids: list[int]  # the window: the last ids, from where decoding may start again
    _silent: list[int]  # those at its end that did not change the text
    _text: str  # decode(_ids)
    _emitted: int  # characters of it that were returned, or are the prompt's

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] | np.ndarray = ()) -> None:
        self._tokenizer = tokenizer
        self._clear()
        self._begin_behind(prompt_ids)

    def push(self, token: int) -> str:
        """Takes the next id; returns the text that became certain with it, often one word, sometimes nothing.

        Raises:
          ValueError: The id is outside the tokenizer's vocabulary.
        """
        text = self._tokenizer.decode([*self._ids, token])
        if text == self._text:
            self._add_silent(token)
            return ""
        self._ids.append(token)
        self._silent.clear()
        uncertain = min(self._HELD, len(text) - len(text.rstrip("\ufffd")))
        start = self._emitted
        while not text.startswith(self._text[:start]):  # the prompt ended in the middle of a character
            start -= 1
        self._text = text
        self._emitted = max(start, len(text) - uncertain)
        new = text[start : self._emitted]
        self._cut_window()
        return new

    def flush(self) -> str:
        """Ends the text: returns what was held back, and is then ready for another text, behind no prompt."""
        rest = self._text[self._emitted :]
        self._clear()
        return rest

    def _clear(self) -> None:
        self._ids, self._silent = [], []
        self._text, self._emitted = "", 0

    def _begin_behind(self, prompt_ids: Sequence[int] | np.ndarray) -> None:
        """Takes as much of a prompt's end as has more text than may be pending: what is before it does not matter."""
        taken, vocab_size = 0, self._tokenizer.vocab_size
        while taken < len(prompt_ids) and len(self._text) <= self._HELD:
            taken = max(self._KEEP, 2 * taken)
            self._ids = [int(token) for token in prompt_ids[-taken:] if token < vocab_size]
            self._text = self._tokenizer.decode(self._ids)
        self._emitted = len(self._text)

    def _add_silent(self, token: int) -> None:
        # A silent id may matter later: a control id ends a run of bytes, a first space is dropped, a byte in the middle
        # of a character shows nothing. More than _REPEATS of one id never do, so a flood of padding costs nothing.
        if self._silent.count(token) < self._REPEATS:
            self._silent.append(token)
            self._ids.append(token)

    def _cut_window(self) -> None:
        if len(self._ids) <= self._WINDOW:
            return
        text = self._tokenizer.decode(self._ids[-self._KEEP :])
        pending = len(self._text) - self._emitted
        # The window must begin with text that is out already: at the very start of a text, a space is dropped.
        if len(text) > pending:
            self._ids = self._ids[-self._KEEP :]
            self._text = text
            self._emitted = len(text) - pending


def load_tokenizer(path: str | os.PathLike[str]) -> SentencePieceTokenizer:
    """Reads the SentencePiece model at `path`: the file itself, or a directory that holds `tokenizer.model`.

    Raises:
      ValueError: There is no such file, it cannot be read, or it is not a SentencePiece model.
    """
    try:
        is_folder = Path(path).is_dir()
    except OSError:  # the tokenizer says why it cannot be read
        is_folder = False
    return SentencePieceTokenizer(Path(path) / "tokenizer.model" if is_folder else path)


_FIRST_BYTE = 3
_MARKER = re.compile(r"<\|[^<|>]+\|>")


def _read_model(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"'{path}' is no file: give the path of a SentencePiece model.")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"there is no tokenizer file '{path}': give the path of a SentencePiece model.") from error
    except OSError as error:
        raise ValueError(
            f"the tokenizer file '{path}' cannot be read: {error.strerror}. Allow it, or give another file."
        ) from error


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate at character {error.start}, which UTF-8 cannot hold: decode its bytes with "
            "errors='replace' first."
        ) from error


def _checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    checked = [operator.index(token) for token in ids]
    for token in checked:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"token id {token} is outside the vocabulary of {vocab_size} tokens: give 0 to {vocab_size - 1}."
            )
    return checked
