"""Jobs of `grokjax generate` and `score`: prompts from a file, results as JSON lines, resumed after interruption."""

import codecs
import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import reprlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from grokjax.checkpoint import lock_file, open_itself
from grokjax.engine import Engine, Handle, Metrics
from grokjax.request import Completion, Request, TokenScore

PromptId = str | int

# Seconds between two calls of a job's `progress`: what it shows takes longer to gather than a step may wait.
_PROGRESS_PERIOD = 0.1

_FIELDS = tuple(field.name for field in dataclasses.fields(Request))
_SCORE_FIELDS = tuple(field.name for field in dataclasses.fields(TokenScore))


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
_SURROGATE = re.compile("[\ud800-\udfff]")

# Wrong lines of a file of prompts that are shown.
_MOST_LISTED = 10

# How every line of the output begins; what else stands at the end of a file is not ours to remove.
_LINE_START = b'{"id": '


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
    fields = _parse(line)
    if not isinstance(fields, dict):
        raise ValueError(
            f'{where} is not a JSON object: write {{"prompt": "..."}}, all of it in one line, its numbers finite.'
        )
    key = fields.pop("id", number)
    if not _is_id(key):
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


@dataclasses.dataclass(frozen=True)
class Results:
    """The output of a job, open for more results.

    Attributes:
      file: where they are appended, unbuffered: what is written survives the process.
      failed: the id of each prompt that has a result -> whether that is an error.
    """

    file: FileIO
    failed: dict[PromptId, bool]

    def write(self, prompt: Prompt, samples: Sequence[Completion]) -> None:
        """Appends the result of a prompt that has ended, with all its samples.

        Raises:
          ValueError: It cannot be written, or what has the output's name is no longer this file.
        """
        record = _record(prompt, samples)
        rest = json.dumps(record).encode() + b"\n"
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise ValueError(
                f"--output {self.file.name} cannot be written: {error.strerror}. The results so far are kept, and "
                "the same command goes on after them."
            ) from error
        self._check_place()
        self.failed[prompt.id] = "error" in record

    def _check_place(self) -> None:
        try:
            is_there = os.path.samestat(os.fstat(self.file.fileno()), Path(self.file.name).stat())
        except OSError:
            is_there = False
        if not is_there:
            raise ValueError(
                f"--output {self.file.name} was removed, moved or replaced while its job ran: put it back, if you can, "
                "and give the same command again; it goes on after the results that it finds there."
            )


@contextlib.contextmanager
def open_results(path: Path, prompts: Sequence[Prompt]) -> Iterator[Results]:
    """Opens the output of a job, with the results that are in it; an incomplete last line is removed.

    Raises:
      ValueError: It cannot be written or locked, another process writes it, or it has something else than results of
        these prompts; then it stays as it is.
      KeyboardInterrupt: The block was interrupted; the message says what is there and how to go on.
    """
    with _open(path) as file:
        lock_file(file, path)
        results = Results(file, _take_up(file, path, prompts))
        try:
            yield results
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: {len(results.failed)} of {len(prompts)} results are in {path}, and the same command "
                "goes on after them."
            ) from None


def run_batch(
    engine: Engine,
    prompts: Sequence[Prompt],
    results: Results,
    progress: Callable[[int, int], None],
    is_interrupted: Callable[[], bool] = lambda: False,
    *,
    num_tokens: Callable[[Metrics], int] = lambda measured: measured.new_tokens,
) -> None:
    """Runs the prompts that have no result yet, and writes each result as soon as it is there.

    Args:
      engine: idle.
      prompts: all of them.
      results: of an earlier run, and the place for the others.
      progress: told now and then the number of results and of the engine's tokens.
      is_interrupted: asked before each step.
      num_tokens: which tokens count; those drawn by default.

    Raises:
      ValueError: A result cannot be written.
      KeyboardInterrupt: It is interrupted.
    """
    progress(len(results.failed), 0)
    waiting = collections.deque(prompt for prompt in prompts if prompt.id not in results.failed)
    running: dict[Handle, Prompt] = {}
    told = time.monotonic()
    while waiting or running:
        if is_interrupted():
            raise KeyboardInterrupt
        while waiting and engine.has_room:
            prompt = waiting.popleft()
            running[engine.submit(prompt.request)] = prompt
        for handle in engine.step():
            results.write(running.pop(handle), handle.samples)
        if time.monotonic() - told >= _PROGRESS_PERIOD or not (waiting or running):
            progress(len(results.failed), num_tokens(engine.metrics()))
            told = time.monotonic()


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[threading.Event]:
    """Within it, SIGTERM interrupts this process as Ctrl-C does.

    Gives an event that is set then, too: what is raised while Python collects garbage, as it does when JAX compiles, is
    lost.
    """
    came = threading.Event()

    def interrupt(*_: object) -> None:
        came.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        yield came
        return
    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, handler)


def _open(path: Path) -> FileIO:
    if path.exists() and not path.is_file():
        raise ValueError(f"--output {path} is not a file: results are appended to a file, and read when a job goes on.")
    try:
        return open(path, "a+b", buffering=0, opener=open_itself)
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error.strerror}.") from error


def _take_up(file: FileIO, path: Path, prompts: Sequence[Prompt]) -> dict[PromptId, bool]:
    """Reads the results of an earlier run; the file then ends with a complete line."""
    file.seek(0)
    data = file.read()
    *lines, tail = data.split(b"\n")
    is_cut = _parse(tail) is None and tail[: len(_LINE_START)] == _LINE_START[: len(tail)]
    if not is_cut:
        lines.append(tail)
    known = {prompt.id: prompt for prompt in prompts}
    failed = dict(_read_result(line, f"{path}, line {number}", known) for number, line in enumerate(lines, start=1))
    if is_cut:
        file.truncate(len(data) - len(tail))
    else:
        file.write(b"\n")  # the line is whole and lacks only this
    return failed


def _read_result(line: bytes, where: str, known: Mapping[PromptId, Prompt]) -> tuple[PromptId, bool]:
    """The id of a result and whether it is an error."""
    record = _parse(line)
    if not isinstance(record, dict) or not record.keys() & {"finish_reason", "samples"} or not _is_id(record.get("id")):
        raise ValueError(f"{where} is no result of this command: choose another --output. The file stays as it is.")
    prompt = known.get(record["id"])
    # Compared as they are written: 1, 1.0 and true are equal.
    if prompt is None or _written(record.get("prompt")) != _written(prompt.request.prompt):
        other = "has no prompt" if prompt is None else "has another prompt"
        raise ValueError(
            f"{where} is the result of other prompts: for the id {record['id']!r} the file {other}. Choose another "
            "--output. The file stays as it is."
        )
    return record["id"], "error" in record


def _record(prompt: Prompt, samples: Sequence[Completion]) -> dict[str, Any]:
    """A line of the output. The fields of several samples are a list; any that failed marks the line as well."""
    given = _prompt_record(prompt, samples[0])
    records = [_sample_record(prompt, sample) for sample in samples]
    if len(records) == 1:
        return given | records[0]
    errors = [record["error"] for record in records if "error" in record]
    return given | {"samples": records} | ({"error": errors[0]} if errors else {})


def _prompt_record(prompt: Prompt, sample: Completion) -> dict[str, Any]:
    """What is said of the prompt, which all samples share."""
    record: dict[str, Any] = {
        "id": prompt.id,
        "prompt": json.loads(_written(prompt.request.prompt)),
        "prompt_ids": list(sample.prompt_ids),
    }
    if sample.prompt_logprobs is not None:
        record["prompt_logprobs"] = list(map(_prompt_score, sample.prompt_ids, sample.prompt_logprobs))
    return record


def _sample_record(prompt: Prompt, sample: Completion) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "timings": dataclasses.asdict(sample.timings),
    }
    if sample.error is not None:
        record["error"] = _sentence(prompt.request.prompt, sample.error)
    if sample.logprobs is not None:
        record["logprobs"] = [
            _scored(one.token_id, one.logprob) | {"top": [_scored(*other) for other in one.top]}
            for one in sample.logprobs
        ]
    return record


def _prompt_score(token_id: int, score: TokenScore | None) -> dict[str, Any]:
    """A token of a prompt and what is said of it, null for the first."""
    return dict.fromkeys(_SCORE_FIELDS) | {"token_id": token_id} if score is None else dataclasses.asdict(score)


def _scored(token_id: int, logprob: float) -> dict[str, Any]:
    return {"token_id": token_id, "logprob": logprob}


def _sentence(prompt: object, error: Exception) -> str:
    if isinstance(prompt, str) and _SURROGATE.search(prompt):
        return "the prompt has bytes that are not UTF-8: convert the file, or the line, to UTF-8."
    return str(error) or type(error).__name__


def _parse(text: str | bytes) -> Any:
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


def _written(prompt: object) -> str:
    """A prompt as JSON that every reader takes: what is no Unicode in its text is U+FFFD."""
    return _SURROGATE.sub("\ufffd", json.dumps(prompt, ensure_ascii=False))


def _is_id(value: object) -> bool:
    if isinstance(value, str):
        return not _SURROGATE.search(value)
    return isinstance(value, int) and not isinstance(value, bool)
