"""The fuzzer of the release's reader: a short run of it, and readers that do wrong, each of which it must catch."""

import contextlib
import dataclasses
import importlib
import pickle
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import fuzz_release
import pytest
from fuzz_release import FILE_NAME, IMPORTS, ORIGINALS, TRAPS, VALID_FILES, ViolationError, check, cut, fuzz, main

from grokjax.checkpoint import CheckpointError
from grokjax.checkpoint.formats import release
from grokjax.checkpoint.formats.release import ReleaseTensor, read_tensor

PLAIN = VALID_FILES[0]


def test_short_run_finds_nothing_wrong(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path, inputs=1000, seed=0)
    kinds = {outcome.refusal for outcome in outcomes}
    assert len(outcomes) == 1000
    assert None in kinds, "some files must be accepted"
    assert len(kinds) > 20, "the mutations must reach what the reader checks last"


@pytest.mark.parametrize("data", VALID_FILES, ids=range(len(VALID_FILES)))
def test_valid_file_is_accepted(tmp_path: Path, data: bytes) -> None:
    assert check(data, tmp_path).refusal is None
    assert b"".join(cut(data)) == data


def test_seeds_give_their_own_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    outcome = check(PLAIN, tmp_path)
    monkeypatch.setattr(fuzz_release, "check", lambda data, _: seen.append(data) or outcome)
    for seed in (0, 0, 1):
        fuzz(tmp_path, inputs=200, seed=seed)
    first, again, other = seen[:200], seen[200:400], seen[400:]
    assert first == again
    assert len(set(first)) > 150
    assert len(set(first) & set(other)) < 20


@pytest.mark.parametrize("mutation", list(dict.fromkeys(fuzz_release.MUTATIONS)))
def test_mutation_takes_anything_and_changes_a_copy(mutation: Callable[..., list[bytes]]) -> None:
    changed = 0
    for number in range(100):
        for pieces in (ORIGINALS[number % len(ORIGINALS)], [b"."], [b"K", b"\x85"]):
            before = list(pieces)
            changed += b"".join(mutation(random.Random(number), pieces)) != b"".join(before)
            assert pieces == before, "the original is shared by all inputs"
    assert changed > 150


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_does_harm(tmp_path: Path, trap: bytes) -> None:
    with contextlib.chdir(tmp_path):
        pickle.loads(b"\x80\x04" + trap + b".")
    assert (tmp_path / "trap").exists()


# Readers that do wrong.


def raise_key_error(_: Path) -> NoReturn:
    raise KeyError("memo entry 7")


def exit_from(_: Path) -> NoReturn:
    raise SystemExit(0)


def recurse(path: Path) -> NoReturn:
    recurse(path)


def hold_memory(path: Path) -> ReleaseTensor:
    bytearray(50 * 2**20)
    return read_tensor(path)


def make_folder(path: Path) -> ReleaseTensor:
    Path("trap").mkdir()
    return read_tensor(path)


def unpickle(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def take_long(path: Path) -> ReleaseTensor:
    begun = time.thread_time()
    while time.thread_time() - begun < 0.05:
        pass
    return read_tensor(path)


def hang(path: Path) -> ReleaseTensor:
    with contextlib.suppress(Exception):
        time.sleep(60)
    return read_tensor(path)


def mumble(path: Path) -> NoReturn:
    raise CheckpointError(f"{path}: bad file")


def shift(path: Path) -> ReleaseTensor:
    tensor = read_tensor(path)
    weight = dataclasses.replace(tensor.weight, offset=tensor.weight.offset + 8)
    return dataclasses.replace(tensor, weight=weight)


def take_another_file(path: Path) -> ReleaseTensor:
    tensor = read_tensor(path)
    return dataclasses.replace(tensor, weight=dataclasses.replace(tensor.weight, path=Path("other")))


class TestViolation:
    @pytest.fixture(autouse=True)
    def limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fuzz_release, "HANG_SECONDS", 0.5)

    @pytest.mark.parametrize(
        ("reader", "message"),
        [
            (raise_key_error, "KeyError: 'memo entry 7'"),
            (exit_from, "SystemExit: 0"),
            (recurse, "RecursionError: maximum recursion depth exceeded"),
            (hold_memory, r"AssertionError: held \d{8} bytes more than the file has; 1048576 are allowed"),
            (make_folder, r"executed something, which left \['trap'\]"),
            (take_long, r"AssertionError: took 0.\d+ s; 0.04 s is allowed"),
            (hang, "Hang: no answer within 0.5 s"),
            (mumble, r"AssertionError: .*bad file' is not of the form 'FILE: found \.\.\. at byte N; what is allowed"),
            (shift, r"AssertionError: an array from byte \d+ to \d+ of 173"),
            (take_another_file, "AssertionError: an array in other"),
        ],
    )
    def test_reader_that_does_wrong_is_caught(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Path], Any], message: str
    ) -> None:
        monkeypatch.setattr(release, "read_tensor", reader)
        if reader is take_long:
            monkeypatch.setattr(fuzz_release, "MOST_SECONDS", 0.04)
        for _ in range(2):  # nothing of the first may hide the second, or stand for it
            with pytest.raises(ViolationError, match=message):
                check(PLAIN, tmp_path)
        monkeypatch.undo()
        assert check(PLAIN, tmp_path).refusal is None

    @pytest.mark.parametrize(("piece", "left"), [(TRAPS[0], "trap"), (IMPORTS[0], "this")])
    def test_unpickler_is_caught(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: bytes, left: str
    ) -> None:
        monkeypatch.setattr(release, "read_tensor", unpickle)
        for _ in range(2):
            with pytest.raises(ViolationError, match=rf"executed something, which left \['{left}'\]"):
                check(b"\x80\x04" + piece + b".", tmp_path)


# Mistakes in the reader that only some inputs show: those that a right one refuses with a certain sentence.


def mistaken(refusal: str, mistake: Callable[[str], Any]) -> Callable[[Path], ReleaseTensor]:
    """A reader that does wrong with what the regular expression finds in its refusal."""

    def read(path: Path) -> ReleaseTensor:
        try:
            return read_tensor(path)
        except CheckpointError as error:
            if found := re.search(refusal, str(error)):
                mistake(found[1])
            raise

    return read


def recall_without_check(index: str) -> NoReturn:
    raise KeyError(int(index))


def prepare_text(length: str) -> None:
    bytearray(min(int(length), 2**24))


MISTAKES = [
    (mistaken(r"found the memo entry (\d+)", recall_without_check), "KeyError: "),
    (mistaken(r"found a text of (\d+) bytes", prepare_text), r"AssertionError: held \d+ bytes more than the file has"),
    (mistaken(r"found the global '(this)\.", importlib.import_module), r"executed something, which left \['this'\]"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_run_finds_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Path], ReleaseTensor], message: str
) -> None:
    monkeypatch.setattr(release, "read_tensor", mistake)
    with pytest.raises(ViolationError, match=message):
        fuzz(tmp_path, inputs=1500, seed=0)
    # The file that is left is the one that failed.
    with pytest.raises(ViolationError, match=message):
        check((tmp_path / FILE_NAME).read_bytes(), tmp_path)


def test_failure_that_does_not_come_again_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10_000))

    def fail_once(path: Path) -> ReleaseTensor:
        if next(calls) == 20:
            raise KeyError("once")
        return read_tensor(path)

    monkeypatch.setattr(release, "read_tensor", fail_once)
    with pytest.raises(ViolationError, match="KeyError: 'once'; not so when it was repeated"):
        fuzz(tmp_path, inputs=50, seed=0)


class TestCommand:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def test_a_run_without_violations_succeeds_and_leaves_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--inputs", "40", "--seed", "3"]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"\n40 inputs, \d+ a second: \d+ accepted, \d+ refused \(\d+ kinds of message\); at", printed)
        assert not list(tmp_path.iterdir())

    def test_violation_can_be_repeated(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        mistake, message = MISTAKES[0]
        monkeypatch.setattr(release, "read_tensor", mistake)
        assert main(["--inputs", "1500"]) == 1
        found = re.search(
            rf"Violation: {message}.*\nRepeat it: python tests/fuzz_release.py --input (\S+)\n", capsys.readouterr().out
        )
        assert found is not None
        assert main(["--input", found[1]]) == 1
        assert f"Violation: {message}" in capsys.readouterr().out
        monkeypatch.setattr(release, "read_tensor", read_tensor)
        assert main(["--input", found[1]]) == 0

    def test_no_inputs_are_too_few(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--inputs", "0"])
        assert "--inputs 0 is too few: pass 1 or more" in capsys.readouterr().err
