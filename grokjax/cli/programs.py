"""Compiled programs, kept for the next command: where they lie, how many, and what becomes of damaged ones.

JAX's persistent compilation cache does the work. It never removes anything without another package, and an entry that
it cannot read, such as one that a full disk has cut off, it would find again at each start: both are seen to here.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

from grokjax.cli.console import say
from grokjax.engine import persistent_cache
from grokjax.kernels import processor_features

# Bytes that all programs may take; those of the tiny model take 0.7 MB.
_MOST_BYTES = 1 << 30
# How JAX begins its warnings of an entry that it cannot read or write.
_FAILURE = "Error (reading|writing) persistent compilation cache entry"


@contextlib.contextmanager
def kept_programs(*, is_wanted: bool = True, most_bytes: int = _MOST_BYTES) -> Iterator[None]:
    """Meanwhile, JAX keeps everything that it compiles for the next command, and takes what an earlier one has kept.

    Nothing changes where the user has told JAX what to do, by JAX_COMPILATION_CACHE_DIR or
    JAX_ENABLE_COMPILATION_CACHE, nor for one of several processes: those of one run must not find different programs.

    Args:
      is_wanted: else nothing changes either.
      most_bytes: of the programs kept; at the start those go that were not used for longest.
    """
    config = jax.config.values
    is_chosen = config["jax_compilation_cache_dir"] is not None or not config["jax_enable_compilation_cache"]
    if is_chosen or not is_wanted or jax.process_count() > 1:
        yield
        return
    try:
        folder = programs_folder() / _machine()
        _prepare(folder)
        _make_room(folder.parent, most_bytes)
    except (OSError, RuntimeError) as error:  # the second where there is no home
        say(
            f"compiled programs are not kept ({error}): each start compiles anew. Name a folder in "
            "JAX_COMPILATION_CACHE_DIR, or give --no-compilation-cache."
        )
        yield
        return
    with _noting_failures(folder), persistent_cache(folder):
        yield


def programs_folder(system: str = sys.platform) -> Path:
    """Where the user's compiled programs lie, as each system has it.

    Raises:
      RuntimeError: There is no home.
    """
    if system == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif system == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        caches = named if named.is_absolute() else Path.home() / ".cache"
    return caches / "grokjax" / "programs"


def _machine() -> str:
    """A name of what this machine's processors can do: in a home that several machines share, each has its programs."""
    features = " ".join(sorted(processor_features()))
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _prepare(folder: Path) -> None:
    """Makes the folder, or checks that nobody else can write to it: what lies there is run.

    Raises:
      OSError: It cannot be made or written, or others can write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    if hasattr(os, "getuid") and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
        raise PermissionError(f"others than you can write to {folder}")


def _make_room(folder: Path, most_bytes: int) -> None:
    """Removes the files that were not used for longest, until the others take no more than so many bytes.

    Another command may do the same at the same time.
    """
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            if path.is_file():
                # Some systems do not note when a file is read: there the oldest go.
                files.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    surplus = sum(size for _, size, _ in files) - most_bytes
    for _, size, path in sorted(files):
        if surplus <= 0:
            return
        path.unlink(missing_ok=True)
        surplus -= size


@contextlib.contextmanager
def _noting_failures(folder: Path) -> Iterator[None]:
    """Says once, instead of JAX's warning for each, that programs cannot be read or written, and removes all."""
    failures: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_FAILURE)
        show_others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if re.match(_FAILURE, str(message)):
                failures.append(re.sub(f"{_FAILURE} for ", "", str(message).splitlines()[0]))
            else:
                show_others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        try:
            yield
        finally:
            if failures:
                logging.getLogger(__name__).warning(
                    "%s: compiled programs there cannot be read or written (%d, such as %s): all are removed, and the "
                    "next start compiles anew.",
                    *(folder, len(failures), failures[0]),
                )
                shutil.rmtree(folder, ignore_errors=True)
