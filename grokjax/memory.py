"""Memory: what devices and their host have left, and whether what is about to be made fits into it."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from humanize import naturalsize
from jax.sharding import AbstractMesh, Mesh

from grokjax.context import is_traced


def check_fits(what: str, num_bytes: int, mesh: Mesh | AbstractMesh, *, remedy: str) -> None:
    """Checks, before anything is made, that this process's devices have room for it.

    Nothing is refused where what is left is unknown, nor where only shapes are asked for.

    Args:
      what: is about to be made, such as "a model".
      num_bytes: that it needs on each device, as from `device_bytes`.
      mesh: where it would lie.
      remedy: what would need less, such as "take fewer rows".

    Raises:
      ValueError: A device has less left.
    """
    if isinstance(mesh, AbstractMesh) or is_traced():
        return
    devices = mesh.local_devices
    left = bytes_left(devices)
    if left is None or num_bytes <= left:
        return
    needed, there = (naturalsize(size, binary=True) for size in (num_bytes, left))
    count, kind = len(devices), devices[0].device_kind
    where = f"on each of {count} devices ({kind})" if count > 1 else f"on one device ({kind})"
    withheld = "; JAX holds a quarter of a GPU back unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 is set"
    raise ValueError(
        f"{what} needs {needed} {where}, and {there} is left there: {remedy}, or give allow_oom=True (--allow-oom) to "
        f"try all the same{withheld if devices[0].platform == 'gpu' else ''}."
    )


def bytes_left(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that every one of some devices of this process can still allocate; None if that is unknown.

    Those of CPUs share what the host has left.
    """
    if not devices:
        return None
    if devices[0].platform == "cpu":
        return host_bytes_left() // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in one and "bytes_in_use" in one for one in stats):
        return None
    return min(one["bytes_limit"] - one["bytes_in_use"] for one in stats)


def host_bytes_left(root: Path = Path("/")) -> int:
    """Bytes that this process can still allocate on its host, without swapping.

    It is what the machine has, or what a limit on a control group leaves, such as that of a container.

    Args:
      root: where the system's files lie.
    """
    import psutil  # whoever asks for no memory need not wait for it

    return min([psutil.virtual_memory().available, *_control_groups_left(root)])


@dataclasses.dataclass(frozen=True)
class _ControlGroups:
    """How control groups tell their limits: in which folder, and files of each.

    Attributes:
      folder: that holds the groups.
      limit: file of the most bytes that a group's processes may hold.
      usage: file of the bytes that they hold.
      pages: entries of `memory.stat`, bytes of pages of files, which the kernel gives up where memory is short.
    """

    folder: str
    limit: str
    usage: str
    pages: tuple[str, ...]

    def left(self, group: Path) -> Iterator[int]:
        """What the limit of a group leaves, if it has one."""
        most, used = _read(group / self.limit).strip(), _read(group / self.usage).strip()
        if most.isdecimal() and used.isdecimal():  # "max" is no limit
            stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines())
            yield max(0, int(most) - int(used) + sum(int(stat.get(name, 0)) for name in self.pages))


# By the controllers that a line of /proc/self/cgroup names: none in version 2, of which there is one hierarchy.
_CONTROL_GROUPS = {
    "": _ControlGroups("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": _ControlGroups(
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def _control_groups_left(root: Path) -> Iterator[int]:
    """What the limits of the control groups leave that this process is in, and of those around them."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for kind in [_CONTROL_GROUPS[name] for name in controllers.split(",") if name in _CONTROL_GROUPS]:
            top = root / kind.folder
            own = top / path.lstrip("/")
            for group in (own, *own.parents):
                if group.is_relative_to(top):
                    yield from kind.left(group)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
