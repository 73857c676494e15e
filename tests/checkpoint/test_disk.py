"""What is asked of a disk: paths, the lock in its two forms, and files that are there whole or not at all."""

import errno
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import WrittenCheckpoint

from grokjax import CheckpointError, convert, export, load, load_parameters
from grokjax.checkpoint import open_checkpoint
from grokjax.checkpoint.disk import check_name, lock_file, write_json

ANOTHER = "model: another process is writing it: wait until it has finished, or choose another path"


class FakeMsvcrt(types.ModuleType):
    """Windows' locks of bytes: a byte that one open file has locked is refused to any other."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.locked: list[tuple[int, int]] = []

    def locking(self, descriptor: int, mode: int, num_bytes: int) -> None:
        assert (mode, num_bytes) == (self.LK_NBLCK, 1)
        at = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        if at in self.locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        self.locked.append(at)


@pytest.fixture(params=["fcntl", "msvcrt"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module that locks: that of Unix, or that of Windows, where the other is absent."""
    if request.param == "msvcrt":
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", FakeMsvcrt())
    return request.param


@pytest.mark.usefixtures("form")
class TestLock:
    def test_a_second_writer_is_refused_and_what_is_written_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "model"
        path.write_bytes(b"first\n")
        with path.open("a+b", buffering=0) as one, path.open("a+b", buffering=0) as other:
            lock_file(one, path)
            with pytest.raises(CheckpointError, match=ANOTHER):
                lock_file(other, path)
            assert one.read() == b""  # where it stood, at the end
            one.write(b"second\n")
        assert path.read_bytes() == b"first\nsecond\n"

    def test_two_files_have_two_locks(self, tmp_path: Path) -> None:
        with (tmp_path / "a").open("w") as one, (tmp_path / "b").open("w") as other:
            lock_file(one, tmp_path)
            lock_file(other, tmp_path)


@pytest.mark.parametrize("form", ["fcntl", "msvcrt"], indirect=True)
def test_a_disk_without_locks_is_refused(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    function = {"fcntl": "flock", "msvcrt": "locking"}[form]
    monkeypatch.setattr(f"{form}.{function}", refuse)
    message = r"model: its disk cannot lock files \(No locks available\): choose a path on another disk"
    with (tmp_path / "lock").open("w") as file, pytest.raises(CheckpointError, match=message):
        lock_file(file, tmp_path / "model")


def test_the_package_and_its_commands_are_imported_where_there_is_no_fcntl() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import grokjax, grokjax.cli, grokjax.testing"
    # What JAX says where somebody has installed filelock, which it takes then.
    command = [sys.executable, "-W", "ignore:only soft file lock is available", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_file_is_not_written_through_a_link(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    (tmp_path / "precious").write_text("precious")
    link(tmp_path / "precious", tmp_path / "a.json.part")
    with pytest.raises(
        CheckpointError, match=r"a\.json\.part: (a link, and nothing is written|not a file with this name)"
    ):
        write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/disk/D:\\grok\\out", "a backslash"),
        ("/disk/gs:/out", "a folder whose name ends in gs:"),
        ("/disk/logs:", "a folder whose name ends in gs:"),
        ("/disk/a.__lock", r"a folder whose name ends in \.__lock"),
        ("/disk/caf\udce9", "a character that is not UTF-8"),
    ],
)
def test_paths_that_the_storage_library_would_read_otherwise_are_refused(path: str, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot use a path with {what}: choose another path") as caught:
        check_name(Path(path))
    str(caught.value).encode()


def test_other_unusual_paths_are_taken() -> None:
    check_name(Path("/disk/D:/x y/é|?#%20/gs/file:/a\nb/__lock"))


@pytest.mark.parametrize("layout", ["release", "safetensors"])
def test_a_disk_that_fails_while_it_is_read_is_named(
    layout: str, source: WrittenCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source.path
    if layout == "safetensors":
        path = tmp_path / layout
        export(source.path, path, source.config)
    checkpoint = open_checkpoint(path, source.config)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    uses: list[Callable[[], object]] = [
        lambda: load(checkpoint),
        lambda: load_parameters(path, ["final_norm.scale"], source.config),
        lambda: convert(path, tmp_path / "converted", source.config),
    ]
    with monkeypatch.context() as patch:
        patch.setattr("grokjax.checkpoint.formats.payload.read_bytes", fail)
        for use in uses:
            with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error\): look after the disk"):
                use()
    assert load(checkpoint).config == source.config
