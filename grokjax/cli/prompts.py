"""The prompts of a file: a text a line, or a JSON object a line."""

import codecs
import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grokjax.request import Request

PromptId = str | int

_FIELDS = tuple(field.name for field in dataclasses.fields(Request))


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What JSON gives for a field that is neither a number nor true or false.

    Attributes:
      types: of the value.
      words: the same for people.
      items: of the entries, if it is a list.
    """

    types: tuple[type, ...]
    words: str
    items: type = object

    def has(self, value: object) -> bool:
        """Whether a value is of this kind."""
        return isinstance(value, self.types) and (
            not isinstance(value, list) or all(isinstance(item, self.items) for item in value)
        )


# `Request` itself names those that are of another kind.
_KINDS = {
    "stop": _Kind((str, list), "a text or a list of texts", str),
    "stop_ids": _Kind((list,), "a list of token ids", int),
    "allowed_tokens": _Kind((list, type(None)), "a list with true or false for each token", int),
    "logit_bias": _Kind((dict, type(None)), 'an object such as {"42": -1.5}'),
}

# What stands in a text for bytes that are no UTF-8, and which no UTF-8 text can hold.
SURROGATE = re.compile("[\ud800-\udfff]")

# Wrong lines of a file of prompts that are shown.
_MOST_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A line of the prompt file.

    Attributes:
      id: that of the line, by default its number.
      line: its number, from 1.
      request: what is asked for.
    """

    id: PromptId
    line: int
    request: Request


def read_prompts(path: Path, default: Request) -> tuple[Prompt, ...]:
    """Reads a prompt file: a prompt a line, or for a name that ends in `.jsonl` a JSON object a line.

    An object has a `prompt`, maybe an `id`, and any other field of `Request`. Blank lines are passed over. What is
    wrong with a prompt as such (too long, not UTF-8) is left to its result.

    Args:
      path: the file.
      default: whose fields a line's request has where the line does not give them.

    Raises:
      ValueError: The file cannot be read, is UTF-16 or has no prompts, or lines are not as described; they are named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise ValueError(f"{path} is UTF-16 or no text: give it in UTF-8, as `iconv -f UTF-16 -t UTF-8` converts it.")
    # Bytes that are no UTF-8 become lone surrogates, which the tokenizer refuses in that prompt alone.
    text = content.decode("utf-8-sig", errors="surrogateescape")
    read = _read_object if path.suffix.lower() == ".jsonl" else _read_text
    lines = enumerate((line.removesuffix("\r") for line in text.split("\n")), start=1)
    prompts, problems = [], []
    for number, line in lines:
        if line.strip():
            try:
                prompts.append(read(line, number, path, default))
            except ValueError as error:
                problems.append(str(error))
    if problems:
        more = f"\n... and {len(problems) - _MOST_LISTED} line(s) more." if len(problems) > _MOST_LISTED else ""
        raise ValueError("\n".join(problems[:_MOST_LISTED]) + more)
    if not prompts:
        raise ValueError(f"{path} has no prompts: give it at least one line.")
    _check_ids(prompts, path)
    return tuple(prompts)


def _read_text(line: str, number: int, path: Path, default: Request) -> Prompt:
    del path
    return Prompt(number, number, dataclasses.replace(default, prompt=line))


def _read_object(line: str, number: int, path: Path, default: Request) -> Prompt:
    where = f"{path}, line {number}"
    fields = parse_json(line)
    if not isinstance(fields, dict):
        raise ValueError(
            f'{where} is not a JSON object: write {{"prompt": "..."}}, all of it in one line, its numbers finite.'
        )
    key = fields.pop("id", number)
    if not is_id(key):
        raise ValueError(f"{where}: id={reprlib.repr(key)} must be a text in UTF-8 or an integer.")
    _check_fields(fields, where)
    if fields.get("logit_bias"):
        fields["logit_bias"] = _token_keys(fields["logit_bias"], where)
    try:
        return Prompt(key, number, dataclasses.replace(default, **fields))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_fields(fields: dict[str, Any], where: str) -> None:
    unknown = sorted(fields.keys() - set(_FIELDS))
    if unknown:
        raise ValueError(
            f"{where}: {', '.join(unknown)} is no field of a request; these are: id, {', '.join(_FIELDS)}."
        )
    if "prompt" not in fields:
        raise ValueError(f'{where} has no prompt: write {{"prompt": "..."}}.')
    for name, kind in _KINDS.items():
        if name in fields and not kind.has(fields[name]):
            raise ValueError(f"{where}: {name}={reprlib.repr(fields[name])} must be {kind.words}.")


def _token_keys(bias: dict[str, Any], where: str) -> dict[int, Any]:
    """The keys of an object are text in JSON."""
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise ValueError(f'{where}: the keys of logit_bias must be token ids, such as "42".') from None


def _check_ids(prompts: Sequence[Prompt], path: Path) -> None:
    first: dict[PromptId, int] = {}
    for prompt in prompts:
        line = first.setdefault(prompt.id, prompt.line)
        if line != prompt.line:
            raise ValueError(
                f"{path}: lines {line} and {prompt.line} have the id {prompt.id!r}: give each its own. A line without "
                "one has its number."
            )


def parse_json(text: str | bytes) -> Any:
    """What JSON says; None where it is no JSON, as with NaN, or has a number beyond those of float64."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number.")
    return number


def is_id(value: object) -> bool:
    """Whether a value of JSON may be the id of a prompt: an integer, or a text that UTF-8 can hold."""
    if isinstance(value, str):
        return not SURROGATE.search(value)
    return isinstance(value, int) and not isinstance(value, bool)
