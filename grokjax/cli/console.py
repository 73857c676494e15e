"""What the commands share: messages on standard error, progress, configuration files, meshes."""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import jax
from jax.sharding import Mesh

from grokjax.checkpoint import EARLIER, Progress
from grokjax.config import GrokConfig
from grokjax.distributed import initialize, is_first
from grokjax.sharding import divides, make_mesh


class ProgressLine:
    """Says once a second how many bytes are done, at what rate, and how long the rest takes.

    Args:
      what: the work, such as `loaded`.
    """

    def __init__(self, what: str):
        self.what, self.start, self.said = what, time.perf_counter(), 0.0
        self.first_bytes: int | None = None

    def __call__(self, progress: Progress) -> None:
        """Says it for one more piece; renamed and fresh parameters are always named."""
        now, done, total = time.perf_counter(), progress.done_bytes, progress.total_bytes
        if self.first_bytes is None:
            # What an earlier run has done took this one no time.
            self.first_bytes = done if progress.parameter == progress.source == EARLIER else 0
        if progress.source is None:
            say(f"{progress.parameter} keeps its fresh value")
        elif progress.source != progress.parameter:
            say(f"{progress.parameter} from {progress.source}")
        if now - self.said < 1 and done < total:
            return
        self.said = now
        state = f"{self.what} {size(done)} of {size(total)}"
        if done > self.first_bytes:
            rate = (done - self.first_bytes) / (now - self.start)
            state += f", {size(rate)}/s, {duration((total - done) / rate)} left"
        say(f"{state}: {progress.parameter}")


# Characters of a bar, few so that what follows it fits into 80; and seconds between two lines where there is none.
_BAR = 12
_LINE_PERIOD = 10.0


class BatchProgress:
    """Says how many results there are, at what rate tokens come, and how long the rest takes.

    In a terminal it is a bar, elsewhere a line every ten seconds. It is a context, at whose end the bar's line ends.

    Args:
      total: results that there will be.
      clock: seconds.
    """

    def __init__(self, total: int, *, clock: Callable[[], float] = time.perf_counter):
        self.total, self.clock, self.said = total, clock, -math.inf
        # When there were tokens, how many, and how many results: before that, steps were compiled.
        self.first: tuple[float, int, int] | None = None
        self.has_bar = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.has_bar:
            print(file=sys.stderr, flush=True)

    def __call__(self, done: int, tokens: int) -> None:
        """Says it, for so many results and so many tokens of this run."""
        now = self.clock()
        if self.first is None and tokens:
            self.first = now, tokens, done
        if sys.stderr.isatty():
            self._draw(done, self._state(done, tokens, now))
        elif now - self.said >= _LINE_PERIOD:
            self.said = now
            say(self._state(done, tokens, now))

    def _state(self, done: int, tokens: int, now: float) -> str:
        state = f"{done} of {self.total} done"
        if self.first is None:
            return state if done == self.total else f"{state}, compiling the first steps"
        start, first_tokens, first_done = self.first
        if now > start:
            state += f", {(tokens - first_tokens) / (now - start):.1f} tokens/s"
        if first_done < done < self.total:
            state += f", {duration((self.total - done) * (now - start) / (done - first_done))} left"
        return state

    def _draw(self, done: int, state: str) -> None:
        filled = _BAR * done // self.total
        line = f"grokjax: [{'#' * filled}{'.' * (_BAR - filled)}] {state}"
        # A line that fills the terminal would begin a second one; the last characters clear what was longer.
        print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", file=sys.stderr, flush=True)
        self.has_bar = True


def size(num_bytes: float) -> str:
    """`845 kB`, `1.61 GB`: three digits in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """`42 s`, `7 min` or `1 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def say(text: str) -> None:
    """Writes a line to standard error; of several processes, the first does."""
    if is_first():
        print(f"grokjax: {text}", file=sys.stderr, flush=True)


def say_error(error: Exception) -> None:
    """Writes an error to standard error, on every process that has one."""
    where = "" if is_first() else f" in process {jax.process_index()}"
    print(f"grokjax: error{where}: {error}", file=sys.stderr, flush=True)


def add_processes(command: argparse.ArgumentParser) -> None:
    """Adds the options that join the processes of several hosts."""
    group = command.add_argument_group("several hosts", "the same command on each, see docs/distributed.md")
    group.add_argument("--distributed", action="store_true", help="started by SLURM, Open MPI, Kubernetes or Cloud TPU")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="started by hand: where process 0 runs, a free port")
    group.add_argument("--num-processes", metavar="N", type=int, help="how many")
    group.add_argument("--process-id", metavar="I", type=int, help="which of them this is, from 0")
    group.add_argument(
        "--heartbeat", metavar="SECONDS", type=int, help="after how long a silent process counts as dead (default: 100)"
    )


def join_processes(arguments: argparse.Namespace) -> None:
    """Does what the options of `add_processes` say, before anything else.

    Raises:
      ValueError: They are incomplete.
    """
    by_hand = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    is_alone = by_hand == (None, None, None)
    if is_alone and not arguments.distributed:
        if arguments.heartbeat is not None:
            raise ValueError("--heartbeat is of several processes: give --distributed or --coordinator, too.")
        return
    if None in by_hand and not is_alone:
        raise ValueError("--coordinator, --num-processes and --process-id go together: give all three.")
    options = {} if arguments.heartbeat is None else {"heartbeat_timeout_seconds": arguments.heartbeat}
    initialize(*by_hand, **options)


def read_config(option: str, path: Path) -> GrokConfig:
    """Reads a configuration file that the command's `option` names.

    Raises:
      ValueError: It cannot be read or is no configuration.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not a text file: give a JSON configuration.") from error
    return GrokConfig.from_json(text)


def named_config(option: str, name: str) -> GrokConfig:
    """The configuration of a name, or of a file.

    Raises:
      ValueError: It is neither a name nor a file, or the file holds no configuration.
    """
    presets = {"tiny": GrokConfig.tiny, "bench_1b": GrokConfig.bench_1b, "grok_1": GrokConfig.grok_1}
    if name in presets:
        return presets[name]()
    if not Path(name).is_file():
        raise ValueError(f"{option} {name}: neither a file nor one of {', '.join(presets)}.")
    return read_config(option, Path(name))


def read_extents(text: str) -> tuple[int, int]:
    """`1,8` as numbers.

    Raises:
      ValueError: It is anything else.
    """
    try:
        data, model = (int(part) for part in text.split(","))
    except ValueError:
        data = model = 0
    if min(data, model) < 1:
        raise ValueError(f"--mesh {text}: give two numbers of 1 or more, such as 1,8.")
    return data, model


def choose_mesh(text: str | None, config: GrokConfig) -> Mesh:
    """The mesh of a `--mesh` option, or the widest model axis that fits the configuration and the devices.

    Over several hosts, the data axis crosses them if it can, else the model axis.

    Raises:
      ValueError: There are not as many devices, or the hosts cannot share them evenly.
    """
    hosts, num_devices = jax.process_count(), jax.device_count()
    if text is not None:
        data, model = read_extents(text)
    else:
        model = max(n for n in range(1, num_devices + 1) if divides(config, n) and (hosts == 1 or num_devices % n == 0))
        data = 1 if hosts == 1 else num_devices // model
    if data % hosts == 0:
        return make_mesh((data // hosts, model), (hosts, 1))
    if model % hosts == 0:
        return make_mesh((data, model // hosts), (1, hosts))
    raise ValueError(f"--mesh {text}: {hosts} hosts cannot share it: make one of the numbers a multiple of {hosts}.")
