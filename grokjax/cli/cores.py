"""A simulated device for each core of a CPU: on which processors that is faster, and how many cores there are.

One device hardly gains from a second core where a batch has few rows; two devices, each with half of the heads and of
every expert, do. See benchmarks/notebook/device-per-core.md.
"""

import contextlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import jax

from grokjax.kernels import processor_features

# Feature of processors, as Linux names it -> whether a device for each core was measured to be faster than one. The
# first that a processor has decides; what has not been measured keeps one device.
_GAINS = {
    "avx512f": True,  # decode steps of bench_1b with 1 and 8 rows took 0.88 of the time on an EPYC with two cores
    "avx2": False,  # one row gained nothing
}


def use_every_core(count: int | None, *, root: Path = Path("/")) -> None:
    """Simulates devices on the CPU, before JAX has started; where it runs already, those that it has must do.

    Args:
      count: how many; None leaves it to JAX_NUM_CPU_DEVICES or XLA_FLAGS, and where they say nothing takes one for each
        core, if that is faster on this machine.
      root: where the system's files lie.
    """
    if count is None and not _is_chosen() and is_faster(processor_features(root / "proc/cpuinfo")):
        count = count_cores(root)
    if count is not None:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def _is_chosen() -> bool:
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return in_flags or jax.config.values["jax_num_cpu_devices"] >= 0


def is_faster(features: Collection[str]) -> bool:
    """Whether a device for each core was measured to be faster on processors that have these features."""
    return next((gains for feature, gains in _GAINS.items() if feature in features), False)


def count_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use: two threads of a core are one, and the limit of a container counts.

    Args:
      root: where the system's files lie.
    """
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        import psutil  # whoever runs on Linux need not wait for it

        return psutil.cpu_count(logical=False) or 1
    cores = _cores_of(os.sched_getaffinity(0), root / "sys/devices/system/cpu")
    return max(1, min([len(cores), *_control_group_limits(root)]))


def _cores_of(processors: Iterable[int], folder: Path) -> set[str]:
    """The cores of some logical processors, each named by all of its processors, as in `0,64`."""
    files = {number: folder / f"cpu{number}" / "topology" / "core_cpus_list" for number in processors}
    return {file.read_text() if file.exists() else str(number) for number, file in files.items()}


def _control_group_limits(root: Path) -> list[int]:
    """Whole processors' worth of time that each of the control groups allows that limit this process."""
    file = root / "proc/self/cgroup"
    lines = file.read_text().splitlines() if file.exists() else []
    top = root / "sys/fs/cgroup"
    limits = []
    for own in [top / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for limit in [group / "cpu.max" for group in (own, *own.parents) if group.is_relative_to(top)]:
            most, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
            limits += [int(most) // int(period)] if most.isdecimal() else []
    return limits
