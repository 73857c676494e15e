"""Compiled programs that the commands keep: found by the next command, bounded, and never in its way."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from builders import TINY_DENSE
from jax.experimental.compilation_cache import compilation_cache

from grokjax.cli import main
from grokjax.cli.programs import kept_programs, programs_folder

# Compiles a program in a process that may write no file of more bytes than it is told, as on a disk that is full.
IN_A_PROCESS = """
import resource, signal, sys
import jax, numpy as np
from grokjax.cli.console import messages
from grokjax.cli.programs import kept_programs
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name == "/jax/compilation_cache/cache_hits"))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
with messages(), kept_programs():
    print(jax.jit(lambda x: x.sum())(np.arange(4.0, dtype=np.float32)), sum(hits))
"""


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a user's caches, who has told JAX nothing of another."""
    own = jax.config.jax_compilation_cache_dir
    use_cache(None)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    use_cache(own)


@pytest.fixture
def run(caches: Path) -> Callable[..., float]:
    """Adds a number to 1 by a program that JAX compiles, as a new command would."""

    def run(number: float = 1.0, **options: int) -> float:
        jax.clear_caches()
        with kept_programs(**options):
            return float(jax.jit(lambda x: x + number)(np.float32(1)))

    return run


def use_cache(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def files(caches: Path) -> list[Path]:
    return [path for path in sorted(caches.rglob("*")) if path.is_file()]


@contextlib.contextmanager
def counted_hits() -> Iterator[list[str]]:
    """The names of JAX's events of its cache, as they come."""
    events: list[str] = []

    def listen(name: str, **_: object) -> None:
        events.append(name.rpartition("/")[2])

    jax.monitoring.register_event_listener(listen)
    yield events
    jax.monitoring.unregister_event_listener(listen)


def test_a_second_command_compiles_nothing(
    caches: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = caches / "config.json"
    config.write_text(TINY_DENSE.replace(max_seq_len=32).to_json())
    command = ["generate", "--random", str(config), "--mesh", "1,1", "--max-new-tokens", "2", "hello"]
    outputs, events = [], []
    for _ in range(2):
        jax.clear_caches()
        with counted_hits() as found:
            assert main(command) == 0
        outputs.append(capsys.readouterr().out)
        events.append(found)
    assert outputs[0] == outputs[1]
    assert "cache_misses" in events[0]
    assert "cache_hits" in events[1]
    assert "cache_misses" not in events[1]
    assert all(path.parent.parent == caches / "grokjax" / "programs" for path in files(caches) if path != config)
    assert jax.config.jax_compilation_cache_dir is None, "a setting of JAX stayed changed"
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches / "none"))
    assert main([*command, "--no-compilation-cache"]) == 0
    assert not (caches / "none").exists()


def test_what_the_user_has_told_jax_stays(
    run: Callable[..., float], caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cache(str(tmp_path / "own"))
    assert run() == 2
    assert {path.parent.name for path in files(caches)} == {"own"}
    use_cache(None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert run(2) == 3
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert run(3) == 4
    assert not (caches / "grokjax").exists()


@pytest.mark.parametrize("damage", [b"", b"not a program", None])
def test_damaged_programs_are_compiled_again(
    damage: bytes | None, run: Callable[..., float], caches: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever lies in their place; JAX alone would warn of each at each start."""
    assert run(1) == 2
    assert run(2) == 3
    for path in files(caches):
        path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    jax.clear_caches()
    with kept_programs():
        assert jax.jit(lambda x: x + 1.0)(np.float32(1)) == 2
    assert re.search(
        r"cannot be read or written \(1, such as 'jit.*': .*\): all are removed, and the next", caplog.text
    )
    assert files(caches) == []
    caplog.clear()
    assert run(1) == 2
    assert len(files(caches)) == 1
    assert caplog.text == ""


def test_a_full_disk_and_other_commands_are_in_nobodys_way(caches: Path) -> None:
    """A program that the disk cuts off is removed; two commands that keep the same one at once both do their work."""

    def start(most_bytes: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", IN_A_PROCESS, str(most_bytes)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    full = start(100).communicate()
    assert full[0] == "6.0 0\n"
    assert "cannot be read or written (1, such as 'jit" in full[1]
    assert "File too large" in full[1]
    assert full[1].count("\n") == 1
    assert files(caches) == []
    both = [process.communicate() for process in [start(1 << 30), start(1 << 30)]]
    assert [output[:3] for output, _ in both] == ["6.0", "6.0"]
    third = start(1 << 30).communicate()
    assert third == ("6.0 1\n", "")


@pytest.mark.parametrize("trouble", ["a file in the way", "no right to write", "others can write", "no home"])
def test_where_nothing_can_be_kept_a_command_says_so_and_runs(
    trouble: str,
    run: Callable[..., float],
    caches: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if trouble == "a file in the way":  # in place of a home that cannot be written, which stops no superuser
        (caches / "grokjax").write_text("")
    elif trouble == "no right to write":
        monkeypatch.setattr(os, "access", lambda *_: False)
    elif trouble == "others can write":
        run()
        files(caches)[0].parent.chmod(0o777)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    before = files(caches)
    with caplog.at_level("INFO", "grokjax"):
        assert run(7) == 8
    assert re.search(r"compiled programs are not kept \(.+\): each start compiles anew\. Name a folder", caplog.text)
    assert files(caches) == before


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_programs_that_were_not_used_for_longest_go_first(run: Callable[..., float], caches: Path) -> None:
    run(1)
    folder = files(caches)[0].parent
    for age in range(4):
        path = folder / f"program-{age}-cache"
        path.write_bytes(b"x" * 1000)
        os.utime(path, (1e9 - age, 1e9 - age))
    run(2, most_bytes=files(caches)[0].stat().st_size + 2500)
    names = {path.name for path in files(caches)}
    assert {"program-0-cache", "program-1-cache"} < names
    assert not {"program-2-cache", "program-3-cache"} & names


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {}, "/home/me/.cache/grokjax/programs"),
        ("linux", {"XDG_CACHE_HOME": "/fast"}, "/fast/grokjax/programs"),
        ("linux", {"XDG_CACHE_HOME": "here"}, "/home/me/.cache/grokjax/programs"),  # to be ignored, by its standard
        ("darwin", {"XDG_CACHE_HOME": "/fast"}, "/home/me/Library/Caches/grokjax/programs"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/grokjax/programs"),
        ("win32", {}, "/home/me/AppData/Local/grokjax/programs"),
    ],
)
def test_programs_lie_where_each_system_keeps_such_files(
    system: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert programs_folder(system) == Path(expected)
