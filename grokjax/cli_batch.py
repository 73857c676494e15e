"""The batch job of `grokjax generate`: prompts from a file, results as JSON lines, resumed after interruption."""

import collections
import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax

from grokjax.engine import Engine
from grokjax.request import Completion, Request
from grokjax.sequence import Handle

PromptId = str | int

# Seconds between two calls of a job's `progress`: what it shows takes longer to gather than a step may wait.
_PROGRESS_PERIOD = 0.1

_FIELDS = tuple(field.name for field in dataclasses.fields(Request))
_SWITCHES = tuple(field.name for field in dataclasses.fields(Request) if isinstance(field.default, bool))

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


def read_prompts(path: Path, settings: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """Reads a prompt file: a prompt a line, or for a name that ends in `.jsonl` a JSON object a line.

    An object has a `prompt`, maybe an `id`, and any other field of `Request`. Blank lines are passed over. What is
    wrong with a prompt as such (too long, not UTF-8) is left to its result.

    Args:
      path: the file.
      settings: fields of the requests where a line does not give them.

    Raises:
      ValueError: The file cannot be read or has no prompts, or a line is not as described; it is named.
    """
    try:
        # Bytes that are no UTF-8 become lone surrogates, which the tokenizer refuses in that prompt alone.
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"--prompts {path} cannot be read: {error.strerror}.") from error
    read = _read_object if path.suffix.lower() == ".jsonl" else _read_text
    lines = enumerate((line.removesuffix("\r") for line in text.split("\n")), start=1)
    prompts = tuple(read(line, number, path, settings) for number, line in lines if line.strip())
    if not prompts:
        raise ValueError(f"--prompts {path} has no prompts: give it at least one line.")
    _check_ids(prompts, path)
    return prompts


def _read_text(line: str, number: int, path: Path, settings: Mapping[str, Any]) -> Prompt:
    del path
    return Prompt(number, number, Request(line, **settings))


def _read_object(line: str, number: int, path: Path, settings: Mapping[str, Any]) -> Prompt:
    where = f"{path}, line {number}"
    fields = _parse(line)
    if not isinstance(fields, dict):
        raise ValueError(f'{where} is not a JSON object: write {{"prompt": "..."}}, all of it in one line.')
    key = fields.pop("id", number)
    if not _is_id(key):
        raise ValueError(f"{where}: id={key!r} must be a text or an integer.")
    _check_fields(fields, where)
    if isinstance(fields.get("logit_bias"), dict):
        fields["logit_bias"] = _token_keys(fields["logit_bias"], where)
    try:
        return Prompt(key, number, Request(**{**settings, **fields}))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{where}: a field has a value of another kind than it takes ({error}).") from error


def _check_fields(fields: dict[str, Any], where: str) -> None:
    unknown = sorted(fields.keys() - set(_FIELDS))
    if unknown:
        raise ValueError(
            f"{where}: {', '.join(unknown)} is no field of a request; these are: id, {', '.join(_FIELDS)}."
        )
    if "prompt" not in fields:
        raise ValueError(f'{where} has no prompt: write {{"prompt": "..."}}.')
    for name in _SWITCHES:
        if not isinstance(fields.get(name, False), bool):
            raise ValueError(f"{where}: {name}={fields[name]!r} must be true or false.")


def _token_keys(bias: dict[str, Any], where: str) -> dict[int, Any]:
    """The keys of an object are text in JSON."""
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise ValueError(f"{where}: the keys of logit_bias must be token ids.") from None


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
      file: where they are appended.
      failed: the id of each prompt that has a result -> whether that is an error.
    """

    file: BinaryIO
    failed: dict[PromptId, bool]

    def write(self, prompt: Prompt, handle: Handle) -> None:
        """Appends the result of a prompt that has ended; a process that is killed afterwards does not take it along."""
        record = _record(prompt, handle)
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        self.failed[prompt.id] = "error" in record


@contextlib.contextmanager
def open_results(path: Path, prompts: Sequence[Prompt]) -> Iterator[Results]:
    """Opens the output of a job, with the results that are in it; an incomplete last line is removed.

    Raises:
      ValueError: It cannot be written, another process writes it, or it has something else than results of these
        prompts; then it stays as it is.
    """
    with _open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process writes {path}: wait for it, or choose another --output.") from error
        yield Results(file, _take_up(file, path, prompts))


def run_batch(
    engine: Engine, prompts: Sequence[Prompt], results: Results, progress: Callable[[int, int], None]
) -> None:
    """Runs the prompts that have no result yet, and writes each result as soon as it is there.

    Args:
      engine: idle.
      prompts: all of them.
      results: of an earlier run, and the place for the others.
      progress: told now and then the number of results and of the tokens drawn by this engine.

    Raises:
      ValueError: A step of the model failed.
    """
    waiting = collections.deque(prompt for prompt in prompts if prompt.id not in results.failed)
    running: dict[Handle, Prompt] = {}
    told = time.monotonic()
    while waiting or running:
        while waiting and engine.has_room:
            prompt = waiting.popleft()
            running[engine.submit(prompt.request)] = prompt
        for handle in _step(engine):
            results.write(running.pop(handle), handle)
        if time.monotonic() - told >= _PROGRESS_PERIOD or not (waiting or running):
            progress(len(results.failed), engine.metrics().new_tokens)
            told = time.monotonic()


def _step(engine: Engine) -> list[Handle]:
    try:
        return engine.step()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"the model failed: {error}. The results so far are kept, and the same command goes on after them; if "
            "memory was short, give it fewer --slots or a smaller --max-len."
        ) from error


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise ValueError(f"--output {path} is not a file: results are appended to a file, and read when a job goes on.")
    try:
        return path.open("a+b")
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error.strerror}.") from error


def _take_up(file: BinaryIO, path: Path, prompts: Sequence[Prompt]) -> dict[PromptId, bool]:
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
    if prompt is None or record.get("prompt") != prompt.request.prompt:
        other = "has no prompt" if prompt is None else "has another prompt"
        raise ValueError(
            f"{where} is the result of other prompts: for the id {record['id']!r} --prompts {other}. Choose another "
            "--output. The file stays as it is."
        )
    return record["id"], "error" in record


def _record(prompt: Prompt, handle: Handle) -> dict[str, Any]:
    """A line of the output. The fields of several samples are a list; any that failed marks the line as well."""
    samples = [_sample_record(prompt, sample) for sample in handle.samples]
    named = {"id": prompt.id, "prompt": prompt.request.prompt}
    if len(samples) == 1:
        return named | samples[0]
    errors = [sample["error"] for sample in samples if "error" in sample]
    return named | {"samples": samples} | ({"error": errors[0]} if errors else {})


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
        record["logprobs"] = [dataclasses.asdict(logprob) for logprob in sample.logprobs]
    if sample.prompt_logprobs is not None:
        record["prompt_logprobs"] = list(sample.prompt_logprobs)
    return record


def _sentence(prompt: object, error: Exception) -> str:
    if not isinstance(prompt, str | list):
        return f"the prompt must be text or a list of token ids, not {prompt!r}."
    return str(error) or type(error).__name__


def _parse(text: str | bytes) -> Any:
    """What JSON says; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)
