"""Conversions that are interrupted, anywhere and in any way, and go on."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from builders import SMALL, WrittenCheckpoint, contents
from orbax.checkpoint import v1 as ocp

from grokjax import CheckpointError, Progress, convert, init, keep_checksums, load, plan_conversion, save, verify
from grokjax.checkpoint import EARLIER


class TestInterrupted:
    def test_goes_on_after_an_exception_at_any_unit(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        target, seen = tmp_path / "model", []

        def interrupt(progress) -> None:
            seen.append(progress)
            if len(seen) in (1, 4, 9, 23):
                raise KeyboardInterrupt

        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                convert(source.path, target, source.config, progress=interrupt)
            with pytest.raises(CheckpointError, match="was interrupted"):
                load(target)
        plan = plan_conversion(source.path, target, source.config)
        assert 0 < plan.num_done < plan.num_units
        convert(source.path, target, source.config, progress=seen.append)
        assert seen[-1].done_bytes == seen[-1].total_bytes
        assert contents(target) == contents(converted)
        verify(target, source.path, source.config)

    def test_goes_on_after_being_killed(self, source: WrittenCheckpoint, converted: Path, tmp_path: Path) -> None:
        """kill -9 as soon as the first units are there."""
        target, config = tmp_path / "model", tmp_path / "config.json"
        config.write_text(source.config.to_json())
        command = [sys.executable, "-m", "grokjax", "convert", str(source.path), str(target), "--config", str(config)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((target / "weights").glob("*"))) < 6:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (target / "grokjax.json").exists()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        assert contents(target) == contents(converted)
        assert not list(target.rglob("*orbax-checkpoint-tmp*"))

    def test_files_that_lost_their_bytes_are_written_again(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        """As a power cut leaves them: the folder has its name, the files are empty."""
        target, seen = tmp_path / "model", []

        def interrupt(progress) -> None:
            seen.append(progress)
            if len(seen) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source.path, target, source.config, progress=interrupt)
        max((target / "weights" / "embedding.table").rglob("c/*/*")).write_bytes(b"")
        assert plan_conversion(source.path, target, source.config).num_done == 2
        convert(source.path, target, source.config)
        assert contents(target) == contents(converted)

    def test_other_options_do_not_go_on(self, source: WrittenCheckpoint, tmp_path: Path) -> None:
        target = tmp_path / "model"
        with pytest.raises(KeyboardInterrupt):
            convert(source.path, target, source.config, progress=raise_interrupt)
        with pytest.raises(CheckpointError, match="unfinished conversion, of another source or with other options"):
            convert(source.path, target, source.config, weights="bfloat16")

    def test_what_is_finished_is_not_done_again(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        """Interrupted while it was verified, say; or the source has been moved."""
        target = tmp_path / "model"
        shutil.copytree(converted, target)
        keep_checksums(target, verify(target, source.path, source.config))
        (tmp_path / "moved").symlink_to(source.path)
        before = {file: file.stat().st_mtime_ns for file in target.rglob("*")}
        told: list[Progress] = []
        convert(tmp_path / "moved", target, source.config, progress=told.append)
        assert {file: file.stat().st_mtime_ns for file in target.rglob("*")} == before
        assert [(progress.parameter, progress.done_bytes) for progress in told] == [(EARLIER, told[0].total_bytes)]

    def test_a_damaged_unit_of_a_finished_conversion_is_written_again(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "model"
        shutil.copytree(converted, target)
        shutil.rmtree(target / "weights" / "layers.1")
        convert(source.path, target, source.config)
        assert contents(target) == contents(converted)

    @pytest.mark.parametrize("changed", ["its time", "its bytes"])
    def test_a_source_that_changed_meanwhile_is_refused(
        self, source: WrittenCheckpoint, tmp_path: Path, changed: str
    ) -> None:
        target, release = tmp_path / "model", tmp_path / "release"
        shutil.copytree(source.path, release)
        with pytest.raises(KeyboardInterrupt):
            convert(release, target, source.config, progress=raise_interrupt)
        change(max(release.rglob("tensor*"), key=lambda file: file.stat().st_size), changed)
        with pytest.raises(CheckpointError, match="unfinished conversion, of another source"):
            convert(release, target, source.config)

    @pytest.mark.parametrize("changed", ["its time", "its bytes"])
    def test_a_source_that_changes_under_a_conversion_ends_it(
        self, source: WrittenCheckpoint, tmp_path: Path, changed: str
    ) -> None:
        """The first file, which has been read by then."""
        release = tmp_path / "release"
        shutil.copytree(source.path, release)

        def disturb(progress: Progress) -> None:
            if progress.done_bytes == progress.total_bytes:
                change(min(release.rglob("tensor*")), changed)

        with pytest.raises(CheckpointError, match="its files were changed while they were converted: remove what was"):
            convert(release, tmp_path / "model", source.config, progress=disturb)
        assert not (tmp_path / "model" / "grokjax.json").exists()

    def test_a_unit_that_vanishes_is_noticed_at_the_end(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "model"

        def remove(progress: Progress) -> None:
            if progress.done_bytes == progress.total_bytes:
                shutil.rmtree(target / "weights" / "layers.1")

        with pytest.raises(
            CheckpointError, match=r"1 of its 22 parts, such as weights/layers\.1, were written and have"
        ):
            convert(source.path, target, source.config, progress=remove)
        assert not (target / "grokjax.json").exists()
        convert(source.path, target, source.config)
        assert contents(target) == contents(converted)
        with pytest.raises(
            CheckpointError, match=r"weights/layers\.1, were written .* then remove the folder and save"
        ):
            save(
                load(converted),
                tmp_path / "saved",
                progress=lambda _: shutil.rmtree(tmp_path / "saved" / "weights" / "layers.1", ignore_errors=True),
            )

    def test_goes_on_if_killed_before_it_said_what_it_was(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        for name in ("lock", "unfinished.json.part"):
            (tmp_path / "model").mkdir(exist_ok=True)
            (tmp_path / "model" / name).write_text("")
        convert(source.path, tmp_path / "model", source.config)
        assert contents(tmp_path / "model") == contents(converted)
        assert not (tmp_path / "model" / "lock").exists()

    def test_strange_files_are_removed(self, source: WrittenCheckpoint, tmp_path: Path) -> None:
        """What systems leave stays: some of them do not let it be removed."""
        target = tmp_path / "model"
        with pytest.raises(KeyboardInterrupt):
            convert(source.path, target, source.config, progress=raise_interrupt)
        for name in (".DS_Store", "layers.7", "notes"):
            (target / "weights" / name).write_text("")
        convert(source.path, target, source.config)
        verify(target, source.path, source.config)
        assert (target / "weights" / ".DS_Store").exists()
        assert not (target / "weights" / "notes").exists()

    @pytest.mark.parametrize("name", ["weights", "lock", "unfinished.json.part", "unfinished.json"])
    def test_nothing_is_written_or_removed_through_a_link(
        self, source: WrittenCheckpoint, tmp_path: Path, name: str
    ) -> None:
        target, outside = tmp_path / "model", tmp_path / "outside"
        with pytest.raises(KeyboardInterrupt):
            convert(source.path, target, source.config, progress=raise_interrupt)
        if name == "weights":
            outside.mkdir()
            (outside / "precious").write_text("precious")
            shutil.rmtree(target / name)
        else:
            outside.write_text("precious")
            (target / name).unlink(missing_ok=True)
        (target / name).symlink_to(outside)
        with pytest.raises(CheckpointError, match=rf"{name}: a link, "):
            convert(source.path, target, source.config)
        assert (outside / "precious" if name == "weights" else outside).read_text() == "precious"

    def test_ctrl_c_waits_for_the_unit(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Orbax's threads would wait for minutes for an interrupted call."""
        save, calls = ocp.save, []

        def interrupted(*arguments: object) -> None:
            if not calls:
                signal.raise_signal(signal.SIGINT)
            save(*arguments)
            calls.append(arguments)

        monkeypatch.setattr(ocp, "save", interrupted)
        # A shell starts its jobs in the background with the signal ignored, and with them these tests.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                convert(source.path, tmp_path / "model", source.config)
        finally:
            signal.signal(signal.SIGINT, before)
        assert len(calls) == 1
        assert plan_conversion(source.path, tmp_path / "model", source.config).num_done == 1
        convert(source.path, tmp_path / "model", source.config)
        assert contents(tmp_path / "model") == contents(converted)

    def test_a_second_process_is_refused(self, source: WrittenCheckpoint, tmp_path: Path) -> None:
        def second(_) -> None:
            convert(source.path, tmp_path / "model", source.config)

        with pytest.raises(CheckpointError, match="another process is writing it: wait until it has finished"):
            convert(source.path, tmp_path / "model", source.config, progress=second)


class TestUnwritable:
    """Disks that are full and folders that may not be written: what is there stays, and is gone on from."""

    def test_goes_on_after_a_manifest_that_could_not_be_written(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "model"
        with pytest.raises(KeyboardInterrupt):
            convert(source.path, target, source.config, progress=raise_interrupt)
        before = contents(target)

        def refuse(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            message = (
                r"model/unfinished.json: cannot be written \(No space left on device\): make room or check the perm"
            )
            with pytest.raises(CheckpointError, match=message):
                convert(source.path, target, source.config)
        assert before.items() <= contents(target).items()
        assert plan_conversion(source.path, target, source.config).num_done == 1
        convert(source.path, target, source.config)
        assert contents(target) == contents(converted)

    def test_goes_on_after_a_folder_of_units_that_could_not_be_written(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "model"
        with pytest.raises(KeyboardInterrupt):
            convert(source.path, target, source.config, progress=raise_interrupt)
        (target / "weights").rename(tmp_path / "away")
        (target / "weights").write_text("")
        with pytest.raises(
            CheckpointError, match=r"weights: cannot be written \(File exists\): .* run the same conversion"
        ):
            convert(source.path, target, source.config)
        (target / "weights").unlink()
        (tmp_path / "away").rename(target / "weights")
        assert plan_conversion(source.path, target, source.config).num_done == 1

    def test_no_thread_stays_after_a_unit_that_could_not_be_written(
        self, source: WrittenCheckpoint, tmp_path: Path
    ) -> None:
        """The process would wait for it at its end, five minutes."""
        target, before = tmp_path / "model", set(threading.enumerate())

        def take_away(_: Progress) -> None:
            (target / "weights").rename(tmp_path / "away")
            (target / "weights").write_text("")

        with pytest.raises(CheckpointError, match=r"cannot be written \(.*Not a directory.*run the same conversion"):
            convert(source.path, target, source.config, progress=take_away)
        for thread in set(threading.enumerate()) - before:
            thread.join(5)
            assert thread.daemon or not thread.is_alive()

    def test_an_end_that_could_not_be_written_can_be_made_up_for(
        self, source: WrittenCheckpoint, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The message's advice is good, and so is the same conversion once more."""
        target = tmp_path / "model"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", refuse_the_end)
            with pytest.raises(CheckpointError, match=NO_END):
                convert(source.path, target, source.config)
        by_hand = Path(shutil.copytree(target, tmp_path / "by_hand"))
        (by_hand / "unfinished.json").rename(by_hand / "grokjax.json")
        verify(by_hand, source.path, source.config)
        told: list[Progress] = []
        convert(source.path, target, source.config, progress=told.append)
        assert [progress.parameter for progress in told] == [EARLIER]
        assert contents(target) == contents(converted)

    def test_an_end_of_saving_that_could_not_be_written_can_be_made_up_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", refuse_the_end)
            with pytest.raises(CheckpointError, match=NO_END):
                save(init(SMALL), tmp_path / "model")
        (tmp_path / "model" / "unfinished.json").rename(tmp_path / "model" / "grokjax.json")
        load(tmp_path / "model")


NO_END = (
    r"model/unfinished.json: cannot be renamed to grokjax.json \(Permission denied\): every array is written; check "
    r"the permissions, then rename it\."
)


def refuse_the_end(path: Path, target: Path) -> Path:
    """`Path.replace` where `grokjax.json` may not be written."""
    if target.name == "grokjax.json":
        raise PermissionError(errno.EACCES, "Permission denied")
    path.rename(target)
    return target


def change(file: Path, what: str) -> None:
    """Sets a file's time; or writes bytes in its middle, and sets the time back."""
    before = file.stat()
    if what == "its time":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:
        data = file.read_bytes()
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes(byte ^ 1 for byte in data[middle : middle + 8]) + data[middle + 8 :])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def raise_interrupt(_) -> None:
    raise KeyboardInterrupt
