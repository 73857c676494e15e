"""What the commands share of their options: configuration files, meshes, the processes of several hosts."""

import argparse
import contextlib
import re
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jax.sharding import Mesh

from grokjax import checkpoint
from grokjax.cli.console import say
from grokjax.config import GrokConfig
from grokjax.distributed import DistributedError, find_meeting, initialize
from grokjax.sharding import default_mesh, spread_over_hosts

T = TypeVar("T")

# Along one axis of a mesh.
_MOST_DEVICES = 1 << 15

# What is given by hand -> the argument of `initialize`.
_BY_HAND = {"coordinator": "coordinator_address", "num_processes": "num_processes", "process_id": "process_id"}


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Adds the compute dtype."""
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")


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


def join_processes(arguments: argparse.Namespace, check: Callable[[], T]) -> T:
    """Checks what a process can alone, then joins the others, if the options of `add_processes` say so.

    A process whose check fails tells the others, and they end as it does.

    Returns:
      What `check` returns.

    Raises:
      ValueError: The options are incomplete; or what `check` raises.
      DistributedError: The processes cannot be joined, or another cannot go on.
    """
    given = _how_to_join(arguments)
    if given is None:
        return check()
    try:
        checked = check()
    except (ValueError, OSError) as error:
        _refuse(given, str(error))
        raise
    initialize(**given)
    return checked


def tell_of_options(argv: Sequence[str] | None) -> None:
    """Where the command line of this process cannot be read, tells the others, if it says how to join them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_processes(parser)
    with contextlib.suppress(argparse.ArgumentError, ValueError):
        given = _how_to_join(parser.parse_known_args(argv)[0])
        if given is not None:
            _refuse(given, "its options are wrong: see its message.")


def _refuse(given: dict[str, Any], reason: str) -> None:
    """Tells the other processes why this one cannot go on, if it is known who they are."""
    address, count, number = (given[name] for name in _BY_HAND.values())
    meeting = find_meeting(address, count, number, refusal=reason)
    if meeting is not None:
        with contextlib.suppress(DistributedError):  # nobody has come to be told
            meeting.hold()


def _how_to_join(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of `initialize`; None where this process is alone."""
    by_hand = {name: getattr(arguments, option) for option, name in _BY_HAND.items()}
    is_alone = set(by_hand.values()) == {None}
    if is_alone and not arguments.distributed:
        if arguments.heartbeat is not None:
            raise ValueError("--heartbeat is of several processes: give --distributed or --coordinator, too.")
        return None
    if None in by_hand.values() and not is_alone:
        raise ValueError("--coordinator, --num-processes and --process-id go together: give all three.")
    heartbeat = {} if arguments.heartbeat is None else {"heartbeat_timeout_seconds": arguments.heartbeat}
    return by_hand | heartbeat


def read_config(option: str, path: Path) -> GrokConfig:
    """Reads a configuration file that the command's `option` names.

    Raises:
      ValueError: It cannot be read or is no configuration.
    """
    try:
        return checkpoint.read_config(path, "give a JSON configuration")
    except checkpoint.CheckpointError as error:
        raise ValueError(f"{option} {error}") from error


def checkpoint_config(path: Path | None, folder: Path) -> GrokConfig | None:
    """The configuration that `--config` names; None leaves it to the checkpoint, and to the file beside it, if any.

    Raises:
      ValueError: The file cannot be read or is no configuration.
    """
    if path is not None:
        return read_config("--config", path)
    beside = checkpoint.find_config(folder)
    if beside is not None:
        say(f"the configuration is that of {beside}")
    return None


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
      ValueError: It is anything else, or more devices than any machine has.
    """
    try:
        data, model = (int(part) for part in text.split(","))
    except ValueError:
        data = model = 0
    if not 1 <= min(data, model) <= max(data, model) <= _MOST_DEVICES:
        raise ValueError(f"--mesh {reprlib.repr(text)}: give two numbers between 1 and {_MOST_DEVICES}, such as 1,8.")
    return data, model


def choose_mesh(text: str | None, config: GrokConfig) -> Mesh:
    """The mesh of a `--mesh` option, or that of `default_mesh`.

    Raises:
      ValueError: There are not as many devices, or the hosts cannot share them evenly.
    """
    return default_mesh(config) if text is None else spread_over_hosts(*read_extents(text))


def add_budgets(command: Any) -> None:
    """Adds the options that say what weights that stream may take, which `read_bytes` reads, to a command or group."""
    command.add_argument(
        "--device-memory", metavar="SIZE", help="for weights on each device, such as 20GiB (default: the least)"
    )
    command.add_argument("--host-memory", metavar="SIZE", help="for further layers on the host (default: none)")


_UNITS = {"": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def read_bytes(option: str, text: str | None) -> int | None:
    """`20GiB` as a number of bytes; None where the option is not given.

    Raises:
      ValueError: It is anything else.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    if not found or found[2] not in _UNITS:
        raise ValueError(f"{option} {reprlib.repr(text)}: give bytes as a number and a unit, such as 20GiB or 20GB.")
    return int(float(found[1]) * _UNITS[found[2]])
