"""What is asked of a disk: room, a folder, a file that is there whole or not at all, one writer at a time."""

import errno
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from humanize import naturalsize

from grokjax.checkpoint.stored import CheckpointError

# What the name of a file ends in until the file is whole.
PARTIAL = ".part"
# The byte that is locked on Windows, where no other program may touch it then: far behind the contents of most files,
# and a position that 31 bits hold, as the C library wants.
_LOCKED_BYTE = (1 << 31) - 2


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


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents.

    Raises:
      CheckpointError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be made ({error.strerror}): choose a path that you may write."
        ) from error


def read_json(path: Path, advice: str) -> object:
    """Reads a JSON file.

    Args:
      path: of the file.
      advice: what to do where it is not JSON, for the error.

    Raises:
      CheckpointError: It cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}): {advice}.") from error


def write_json(path: Path, document: object) -> None:
    """Writes a file so that it is there whole or not at all; what was there before stays until then.

    Raises:
      OSError: The disk is full, or the folder cannot be written; what was written is removed.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(document, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
