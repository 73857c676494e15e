"""What the processors of this machine can multiply, as far as it decides which products XLA is asked for."""

import functools
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

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


def product_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which CPUs should multiply numbers of `dtype`.

    Where processors have no instruction for it, XLA imitates products of bfloat16 at a ninth to a half of the speed of
    float32, in which they are exact too. See benchmarks/notebook/cpu-without-bfloat16.md.
    """
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if dtype == jnp.bfloat16 and not has_bfloat16() else dtype


@functools.cache
def has_bfloat16(description: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processors multiply bfloat16 numbers; taken as no where there is no description, as on macOS."""
    return not _BFLOAT16_FEATURES.isdisjoint(processor_features(description))


def takes_planes(num_rows: int, dtype: DTypeLike) -> bool:
    """Whether CPUs should multiply so many rows of activations of `dtype` with int8 weights in planes.

    See `planes` and benchmarks/notebook/cpu-planes.md.
    """
    return jnp.dtype(dtype) == jnp.bfloat16 and num_rows in plane_rows()


@functools.cache
def plane_rows(description: Path = Path("/proc/cpuinfo")) -> range:
    """The numbers of rows of bfloat16 activations that the processors multiply faster in planes."""
    features = processor_features(description)
    return next((rows for feature, rows in _PLANE_ROWS.items() if feature in features), range(0))


def processor_features(description: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the processors can do, in the names that Linux has for it, such as `avx512f`, `amx_int8`, `i8mm`.

    Args:
      description: the system's of its processors; where there is none, as on macOS, no feature is known.
    """
    lines = description.read_text().splitlines() if description.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(features.partition(":")[2].split())
