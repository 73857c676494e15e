"""What the processors of this machine can multiply, as far as it decides which products XLA is asked for."""

import functools
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

# As Linux names what multiplies bfloat16 numbers: on x86 the first two, on Arm the last.
_BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


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


def processor_features(description: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the processors can do, in the names that Linux has for it, such as `avx512f`, `amx_int8`, `i8mm`.

    Args:
      description: the system's of its processors; where there is none, as on macOS, no feature is known.
    """
    lines = description.read_text().splitlines() if description.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(features.partition(":")[2].split())
