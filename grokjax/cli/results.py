"""The results of a job: a JSON object a line, which a job that goes on takes up."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from grokjax.checkpoint import lock_file, open_itself
from grokjax.cli.prompts import SURROGATE, Prompt, PromptId, is_id, parse_json
from grokjax.request import Completion, TokenScore

# How every line of the output begins; what else stands at the end of a file is not ours to remove.
_LINE_START = b'{"id": '
_SCORE_FIELDS = tuple(field.name for field in dataclasses.fields(TokenScore) if field.name != "top")


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
    is_cut = parse_json(tail) is None and tail[: len(_LINE_START)] == _LINE_START[: len(tail)]
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
    record = parse_json(line)
    if not isinstance(record, dict) or not record.keys() & {"finish_reason", "samples"} or not is_id(record.get("id")):
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
            _scored(one.token_id, one.logprob) | {"top": _all_scored(one.top)} for one in sample.logprobs
        ]
    return record


def _prompt_score(token_id: int, score: TokenScore | None) -> dict[str, Any]:
    """A token of a prompt and what is said of it, null for the first; the most probable ones if they were asked for."""
    if score is None:
        return dict.fromkeys(_SCORE_FIELDS) | {"token_id": token_id}
    record = {name: getattr(score, name) for name in _SCORE_FIELDS}
    return record | ({"top": _all_scored(score.top)} if score.top else {})


def _scored(token_id: int, logprob: float) -> dict[str, Any]:
    return {"token_id": token_id, "logprob": logprob}


def _all_scored(top: Iterable[tuple[int, float]]) -> list[dict[str, Any]]:
    return [_scored(*one) for one in top]


def _sentence(prompt: object, error: Exception) -> str:
    if isinstance(prompt, str) and SURROGATE.search(prompt):
        return "the prompt has bytes that are not UTF-8: convert the file, or the line, to UTF-8."
    return str(error) or type(error).__name__


def _written(prompt: object) -> str:
    """A prompt as JSON that every reader takes: what is no Unicode in its text is U+FFFD."""
    return SURROGATE.sub("\ufffd", json.dumps(prompt, ensure_ascii=False))
