"""What is asked of a disk: room, folders, files that are themselves, unchanged, and whole or absent; one writer.

Nothing is written or removed through a link. Of what is read, only the files of the public layouts may be links.
"""

import contextlib
import errno
import importlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from humanize import naturalsize

from grokjax.checkpoint.stored import CheckpointError

# What the name of a file ends in until the file is whole.
PARTIAL = ".part"
# The byte that is locked on Windows, where no other program may touch it then: far behind the contents of most files,
# and a position that 31 bits hold, as the C library wants.
_LOCKED_BYTE = (1 << 31) - 2
# Opens what has a name and not what a link there leads to, and does not wait for the other end of a pipe.
_ITSELF = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
# What a path may not have in it -> how that is called. Source: TensorStore takes a backslash for a separator everywhere
# and keeps `.__lock` for itself; Orbax turns `gs:/` into the address of a bucket.
_UNUSABLE = {
    r"\\": "a backslash",
    r"gs:(/|$)": "a folder whose name ends in gs:",
    r"\.__lock(/|$)": "a folder whose name ends in .__lock",
    r"[\ud800-\udfff]": "a character that is not UTF-8",
}


class Stamp(NamedTuple):
    """What tells that a file is no longer the one that it was.

    Attributes:
      num_bytes: its size.
      written_ns: when it was last written, in nanoseconds.
      number: of the file on its disk, which one that takes its place does not have.
    """

    num_bytes: int
    written_ns: int
    number: int


def free_bytes(folder: Path) -> int:
    """The bytes that are free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuses to begin what the disk has no room for.

    Raises:
      CheckpointError: So many bytes are not free.
    """
    free = free_bytes(folder)
    if num_bytes > free:
        raise CheckpointError(
            f"{folder}: {naturalsize(num_bytes)} are to be written and {naturalsize(free)} are free: "
            "make room or choose another disk."
        )


def check_name(folder: Path) -> None:
    """Refuses a folder whose path the storage library does not take as it is: its arrays would come to lie elsewhere.

    Raises:
      CheckpointError: It is such a path.
    """
    path = str(folder) if os.sep == "/" else folder.as_posix()
    for pattern, what in _UNUSABLE.items():
        if re.search(pattern, path):
            shown = path.encode(errors="backslashreplace").decode()
            raise CheckpointError(
                f"{shown}: the library that stores arrays cannot use a path with {what}: choose another path, or "
                "rename the folder."
            )


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents.

    Raises:
      CheckpointError: It cannot be made, or its path cannot be used.
    """
    check_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be made ({error.strerror}): choose a path that you may write."
        ) from error


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in order, without what systems leave there: `.DS_Store`, `._x`, `.snapshot`, `@eaDir`."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "@")))


def files_below(folder: Path) -> Iterator[Path]:
    """What is no folder in a folder and in those below it, in order, without what systems leave; links stay links."""
    for entry in entries(folder):
        if entry.is_dir() and not entry.is_symlink():
            yield from files_below(entry)
        else:
            yield entry


def is_regular(path: Path) -> bool:
    """Whether a file is there, and no link, pipe, device or folder in its place."""
    return path.is_file() and not path.is_symlink()


def read_json(path: Path, advice: str) -> Any:
    """Reads a JSON file, with or without a byte-order mark.

    Args:
      path: of the file.
      advice: what to do where it is not JSON, for the error.

    Raises:
      CheckpointError: It cannot be read, is a link, a pipe or a folder, or is not JSON.
    """
    if path.exists() and not is_regular(path):
        raise CheckpointError(
            f"{path}: a link, a pipe or a folder, and a file of its own is needed: put the file itself there."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}): {advice}.") from error


def read_bytes(stream: io.RawIOBase, start: int, into: memoryview) -> bool:
    """Reads a part of a file into memory, without a copy on the way; returns whether all of it was there."""
    stream.seek(start)
    while into:
        count = stream.readinto(into)
        if not count:
            return False
        into = into[count:]
    return True


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file, or of that to which a link leads.

    Raises:
      CheckpointError: It is not there.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): put the file back.") from error
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


@contextlib.contextmanager
def unchanged(path: Path, stamp: Stamp) -> Iterator[None]:
    """Stands around what reads a file that was opened earlier, and got its stamp then.

    Raises:
      CheckpointError: Before or after the reading it is another file, or has been written.
    """
    _check_stamp(path, stamp)
    yield
    _check_stamp(path, stamp)


def _check_stamp(path: Path, stamp: Stamp) -> None:
    if stamp_of(path) != stamp:
        raise CheckpointError(f"{path}: the file was changed or replaced after it had been opened: open it again.")


def check_no_link(path: Path) -> None:
    """Refuses a link where something is to be written or removed.

    Raises:
      CheckpointError: It is a link.
    """
    if path.is_symlink():
        raise CheckpointError(
            f"{path}: a link, and nothing is written or removed through one: remove the link, then try again."
        )


def open_itself(path: str, flags: int) -> int:
    """The `opener` for the built-in `open`, to write a file: never what a link leads to.

    Raises:
      CheckpointError: It is a link, of either kind, a pipe or the like.
      OSError: It cannot be opened.
    """
    check_no_link(Path(path))
    descriptor = os.open(path, flags & ~os.O_TRUNC | _ITSELF, 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise CheckpointError(
            f"{path}: not a file with this name alone: put a copy in its place, or remove it, then try again."
        )
    if flags & os.O_TRUNC:
        os.ftruncate(descriptor, 0)
    return descriptor


def open_to_write(path: Path) -> IO[str]:
    """Opens a text file by `open_itself`, empty."""
    return open(path, "w", encoding="utf-8", opener=open_itself)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that is there whole after the block, or not at all; what was there before stays until then.

    Raises:
      CheckpointError: A link has the name that the file has until it is whole.
      OSError: The disk is full, or the folder cannot be written; what was written is removed.
    """
    partial = path.with_name(path.name + PARTIAL)
    with contextlib.ExitStack() as on_failure:
        with open(partial, "wb", opener=open_itself) as stream:
            on_failure.callback(partial.unlink, missing_ok=True)
            yield stream
        partial.replace(path)
        on_failure.pop_all()


def write_json(path: Path, document: object) -> None:
    """Writes a file by `written_whole`, which is on the disk before it has its name."""
    with written_whole(path) as stream:
        stream.write(f"{json.dumps(document, indent=2)}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())


def lock_file(file: IO[Any], path: Path) -> None:
    """Locks an open file until it is closed, against every process that locks it too.

    Args:
      file: open for writing.
      path: what it stands for, to name in errors: the file itself, or the folder that it guards.

    Raises:
      CheckpointError: Another process has locked it, or its disk cannot lock files.
    """
    try:
        _lock(file)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise CheckpointError(
                f"{path}: another process is writing it: wait until it has finished, or choose another path."
            ) from error
        raise CheckpointError(
            f"{path}: its disk cannot lock files ({error.strerror}): choose a path on another disk."
        ) from error


def _lock(file: IO[Any]) -> None:
    """Locks the file, or raises at once: EWOULDBLOCK, or on Windows EACCES, where another process has it."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:
        msvcrt: Any = importlib.import_module("msvcrt")
        position = file.seek(0, os.SEEK_CUR)
        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(position)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
