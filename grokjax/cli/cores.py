"""All of a CPU: a simulated device for each core and vectors of full width, on processors where that is faster.

One device hardly gains from a second core where a batch has few rows; two devices, each with half of the heads and of
every expert, do. XLA by itself keeps to vectors of 256 bits. See benchmarks/notebook/device-per-core.md.
"""

import os
from pathlib import Path

import jax

from grokjax.kernels import by_feature, count_cores, processor_features

# Feature of processors, as Linux names it -> whether a device for each core was measured to be faster than one. The
# first that a processor has decides; what has not been measured keeps one device.
_GAINS = {
    "avx512f": True,  # decode steps of bench_1b with 1 and 8 rows took 0.88 of the time on an EPYC with two cores
    "avx2": False,  # one row gained nothing
}
_VECTOR_FLAG = "--xla_cpu_prefer_vector_width"


def use_every_core(count: int | None, *, root: Path = Path("/")) -> None:
    """Simulates devices on the CPU, before JAX has started; where it runs already, those that it has must do.

    With them XLA uses vectors of 512 bits where the CPU has them, unless XLA_FLAGS names a width.

    Args:
      count: how many; None leaves all to JAX_NUM_CPU_DEVICES or XLA_FLAGS, and where they say nothing takes one for
        each core, if that is faster on this machine.
      root: where the system's files lie.
    """
    description = root / "proc/cpuinfo"
    if count is None and not _is_chosen() and by_feature(_GAINS, False, description):
        count = count_cores(root)
    if count is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it runs already
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if "avx512f" in processor_features(description) and _VECTOR_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_VECTOR_FLAG}=512".lstrip()


def _is_chosen() -> bool:
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return in_flags or jax.config.values["jax_num_cpu_devices"] >= 0
