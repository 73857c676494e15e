"""What the processors of this machine can multiply, and how many cores there are: what XLA is asked for follows it."""

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_T = TypeVar("_T")
_DESCRIPTION = Path("/proc/cpuinfo")

# As Linux names what multiplies bfloat16 numbers: on x86 the first two, on Arm the last.
_BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}

# Feature of processors, as Linux names it -> of how many rows of bfloat16 activations products with int8 weights are
# faster in planes (see `planes`). The first that a processor has decides. Measured with an expert of bench_1b, jax 0.10
# and 0.12; what was not measured stays as it is.
_PLANE_ROWS = {
    "amx_int8": range(8, 129),  # a Xeon: 0.94 and 0.73 of the time at 8 rows, 0.65 and 0.73 at 128, 1.4 and 0.9 at 256
    "avx512_vnni": range(0),  # an EPYC: 1.5 and 1.0 of the time at 8 rows, 2.2 and 1.15 at 128
    "avx_vnni": range(0),  # not measured
    "avx2": range(0),  # an older EPYC: slower but for one of the matrices, by at most a fifth
    "i8mm": range(0),  # Arm, not measured
}

# The same for products that are sums, weight row by weight row: of how many rows at most, where each device has a core.
# Where it has several, they would share out such a sum badly, and more than two rows cost more.
_FEWEST_SUMMED_ROWS = 2
_SUMMED_ROWS = {
    "amx_int8": _FEWEST_SUMMED_ROWS,  # not measured
    "avx512f": 4,  # an EPYC: a step of bench_1b with 8 rows took 0.85 and 0.88 of the time
}

# The same for an int8 table: how many rows of activations at most are multiplied with it as integers. More are
# multiplied with blocks of it that are cast, which several cores would share out badly, too.
_MOST_INTEGER_ROWS = 16
_INTEGER_ROWS = {
    "amx_int8": _MOST_INTEGER_ROWS,
    "avx512_bf16": 4,  # an EPYC: casting took 0.64 and 1.03 of the time at 8 rows, 0.50 and 0.96 at 16
}


def product_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which CPUs should multiply numbers of `dtype`.

    Where processors have no instruction for it, XLA imitates products of bfloat16 at a ninth to a half of the speed of
    float32, in which they are exact too. See benchmarks/notebook/cpu-without-bfloat16.md.
    """
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if dtype == jnp.bfloat16 and not has_bfloat16() else dtype


@functools.cache
def has_bfloat16(description: Path = _DESCRIPTION) -> bool:
    """Whether the processors multiply bfloat16 numbers; taken as no where there is no description, as on macOS."""
    return not _BFLOAT16_FEATURES.isdisjoint(processor_features(description))


def takes_planes(num_rows: int, dtype: DTypeLike) -> bool:
    """Whether CPUs should multiply so many rows of activations of `dtype` with int8 weights in planes.

    See `planes` and benchmarks/notebook/cpu-planes.md.
    """
    return jnp.dtype(dtype) == jnp.bfloat16 and num_rows in plane_rows()


def plane_rows(description: Path = _DESCRIPTION) -> range:
    """The numbers of rows of bfloat16 activations that the processors multiply faster in planes."""
    return by_feature(_PLANE_ROWS, range(0), description)


def summed_rows(description: Path = _DESCRIPTION) -> int:
    """Most rows of activations for which a product with weights is faster as a sum, weight row by weight row.

    See benchmarks/notebook/device-per-core.md.
    """
    return by_feature(_SUMMED_ROWS if has_core_for_each_device() else {}, _FEWEST_SUMMED_ROWS, description)


def integer_rows(description: Path = _DESCRIPTION) -> int:
    """Most rows of activations that are multiplied with an int8 table as integers, where more are not in planes.

    See benchmarks/notebook/unembedding.md.
    """
    return by_feature(_INTEGER_ROWS if has_core_for_each_device() else {}, _MOST_INTEGER_ROWS, description)


@functools.cache
def has_core_for_each_device() -> bool:
    """Whether the CPU is several devices, one for each of its cores."""
    try:
        count = jax.local_device_count("cpu")
    except RuntimeError:  # JAX was told to use other platforms alone
        return False
    return 1 < count == count_cores()


def by_feature(table: Mapping[str, _T], otherwise: _T, description: Path = _DESCRIPTION) -> _T:
    """What a table says of the first of its features that the processors have.

    Args:
      table: feature, as `processor_features` names it -> what was measured to be best with it.
      otherwise: where they have none of these.
      description: the system's of its processors.
    """
    features = processor_features(description)
    return next((found for feature, found in table.items() if feature in features), otherwise)


@functools.cache
def processor_features(description: Path = _DESCRIPTION) -> frozenset[str]:
    """What the processors can do, in the names that Linux has for it, such as `avx512f`, `amx_int8`, `i8mm`.

    Args:
      description: the system's of its processors; where there is none, as on macOS, no feature is known.
    """
    lines = description.read_text().splitlines() if description.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(features.partition(":")[2].split())


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
