"""All of a CPU: a device for each physical core that a process may use, and wide vectors, where that is faster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from grokjax.cli import main
from grokjax.kernels import count_cores

# The devices and the flags that JAX would start with, for each of some machines, all in one process.
IN_A_PROCESS = """
import json, os, sys
from pathlib import Path
import jax
from grokjax.cli import use_every_core
found = []
for count, before, flags, root in json.loads(sys.argv[1]):
    jax.config.update("jax_num_cpu_devices", before)
    os.environ["XLA_FLAGS"] = flags
    use_every_core(count, root=Path(root))
    found.append((jax.config.jax_num_cpu_devices, os.environ["XLA_FLAGS"]))
jax.devices()
os.environ["XLA_FLAGS"] = "late"
use_every_core(found[-1][0] + 1, root=Path(root))
print(json.dumps([*found, (len(jax.devices()), os.environ["XLA_FLAGS"])]))
"""


def write_machine(root: Path, *, features: str = "", threads: int = 1, cpu_max: str | None = None) -> Path:
    """The files in which Linux tells of 8 logical processors."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {features}\n")
    (root / "proc" / "self" / "cgroup").write_text("0::/box/mine\n")
    for number in range(8):
        topology = root / "sys" / "devices" / "system" / "cpu" / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        core = number // threads * threads
        (topology / "core_cpus_list").write_text(f"{core}-{core + threads - 1}\n")
    if cpu_max is not None:
        box = root / "sys" / "fs" / "cgroup" / "box"
        box.mkdir(parents=True)
        (box / "cpu.max").write_text(cpu_max)
    return root


@pytest.mark.parametrize(
    ("threads", "allowed", "cpu_max", "expected"),
    [
        (1, range(8), None, 8),
        (2, range(8), None, 4),
        (2, {0, 1, 2}, None, 2),
        (2, {5}, None, 1),
        (1, range(8), "max 100000\n", 8),
        (1, range(8), "350000 100000\n", 3),
        (1, range(8), "50000 100000\n", 1),
    ],
)
def test_cores_are_those_that_a_process_may_use(
    threads: int,
    allowed: set[int],
    cpu_max: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(allowed))
    assert count_cores(write_machine(tmp_path, threads=threads, cpu_max=cpu_max)) == expected


def test_where_linux_says_nothing_each_processor_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3})
    assert count_cores(tmp_path) == 2


def test_other_systems_are_asked_for_their_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(psutil, "cpu_count", lambda *, logical: None if logical else 6)
    assert count_cores(tmp_path) == 6


def test_all_of_a_cpu_is_used_only_where_that_is_faster_and_nobody_says_otherwise(tmp_path: Path) -> None:
    usable = len(os.sched_getaffinity(0))
    fast, slow, unknown = (
        str(write_machine(tmp_path / name, features=features))
        for name, features in (("fast", "avx2 avx512f"), ("slow", "avx2"), ("unknown", "asimd"))
    )
    four, narrow, wide = (
        f"--xla_{flag}"
        for flag in (
            "force_host_platform_device_count=4",
            "cpu_prefer_vector_width=128",
            "cpu_prefer_vector_width=512",
        )
    )
    cases = [
        (None, -1, "", fast, min(8, usable), wide),
        (None, -1, narrow, fast, min(8, usable), narrow),
        (None, -1, "", slow, -1, ""),
        (None, -1, "", unknown, -1, ""),
        (3, -1, "", slow, 3, ""),
        (None, 5, "", fast, 5, ""),
        (None, -1, four, fast, -1, four),
        (2, 5, four, fast, 2, f"{four} {wide}"),
    ]
    command = [sys.executable, "-c", IN_A_PROCESS, json.dumps([case[:4] for case in cases])]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    *devices_and_flags, late = json.loads(found.stdout)
    assert devices_and_flags == [[*case[4:]] for case in cases]
    assert late == [2, "late"], "where JAX runs already"


def test_no_devices_at_all_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--random", "tiny", "--cpu-devices", "0", "hello"]) == 2
    assert "--cpu-devices=0 must be an integer, 1 or more." in capsys.readouterr().err
