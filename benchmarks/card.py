"""What every benchmark prints: a card of what must move, the machine's ceiling, and last one JSON line."""

import json
import os
import platform
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grokjax.kernels import product_dtype


def read_bandwidth(mesh: Mesh, num_bytes: int | None = None) -> float:
    """Bytes a second at which all devices of the mesh together read arrays of `num_bytes` each, best of 20 sums.

    By default the arrays are far larger than any cache, and long enough to read that a call's own time is small: 512
    MiB on CPUs, 4 GiB on others.
    """
    if num_bytes is None:
        num_bytes = 1 << (29 if _platform(mesh) == "cpu" else 32)
    shape = (mesh.size, num_bytes // 4)
    array = jnp.ones(shape, jnp.float32, device=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    return array.nbytes / min(seconds(lambda: total(array)) for _ in range(20))


def matmul_rate(mesh: Mesh, dtype: jnp.dtype, size: int | None = None) -> float:
    """Operations a second of all devices of the mesh together in square products of `dtype`, best of 20.

    By default of 2048 rows on CPUs, of 8192 on others. On CPUs that imitate products of `dtype`, in those that they are
    given instead.
    """
    if _platform(mesh) == "cpu":
        dtype = product_dtype(dtype)
    size = size or (2048 if _platform(mesh) == "cpu" else 8192)
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    # Of random numbers: chips that lower their clock to save power are faster on ones.
    numbers = jax.jit(lambda: jax.random.normal(jax.random.key(0), (mesh.size, size, size), dtype), out_shardings=place)
    array = numbers()
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    product(array).block_until_ready()
    return 2 * mesh.size * size**3 / min(seconds(lambda: product(array)) for _ in range(20))


def peak_memory(mesh: Mesh) -> int:
    """The most bytes that this process has held so far: of the machine's memory on CPUs, else of the fullest device."""
    if _platform(mesh) == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(device.memory_stats()["peak_bytes_in_use"] for device in mesh.devices.flat)


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, its results waited for."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def environment() -> dict[str, object]:
    """Device, versions and the compiler's flags, for the JSON line."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def print_rows(title: str, rows: dict[str, str]) -> None:
    """A titled list of names and values."""
    print(title)
    for name, value in rows.items():
        print(f"  {name:<34} {value}")


def print_json(record: dict[str, object]) -> None:
    """The last line of every benchmark."""
    print(json.dumps(record))
