"""Machines to compile for that need not be there: their names, and devices that only a compiler sees."""

import dataclasses
import importlib.util
import math
import re
import reprlib
from collections.abc import Sequence

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from grokjax.errors import first_line
from grokjax.planning.accelerators import Accelerator, find_accelerator
from grokjax.sharding import make_mesh

_FORMS = "cpu:8 or h200:8 (a number of devices), or v5p:2x2x2 (the shape of a TPU slice)"

# The largest slice of a TPU has some nine thousand chips.
_MOST_DEVICES = 1 << 15
# A TPU chip is one device but for this one.
_DEVICES_PER_CHIP = {"tpu7x": 2}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine: some devices of one kind.

    Attributes:
      accelerator: what each device is.
      num_devices: how many.
      topology: chips along each axis of a TPU slice; empty for others.
    """

    accelerator: Accelerator
    num_devices: int
    topology: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Target":
        """`cpu`, `cpu:8`, `h200:8`, `v5p:2x2x2`.

        Raises:
          ValueError: The text has another form, or the accelerator is unknown.
        """
        name, _, count = text.partition(":")
        accelerator = find_accelerator(name)
        pattern = r"\d+(x\d+)+" if accelerator.kind == "tpu" else r"\d+"
        if not re.fullmatch(pattern, count or "1"):
            raise ValueError(f"the target {text!r} is not of the form {_FORMS}.")
        extents = tuple(int(extent) for extent in (count or "1").split("x"))
        num_devices = math.prod(extents) * _DEVICES_PER_CHIP.get(accelerator.name, 1)
        if not 1 <= num_devices <= _MOST_DEVICES:
            raise ValueError(f"the target {reprlib.repr(text)} must have 1 to {_MOST_DEVICES} devices.")
        return cls(accelerator, num_devices, extents if accelerator.kind == "tpu" else ())

    def __str__(self) -> str:
        """The target's name, as `parse` takes it."""
        return f"{self.accelerator.name}:{'x'.join(map(str, self.topology)) or self.num_devices}"

    @property
    def compiler(self) -> str:
        """The platform of the compiler that is here for this target: its own, or "cpu" in its place."""
        return self.accelerator.kind if self._is_compiler_present() else "cpu"

    @property
    def missing(self) -> str | None:
        """The extra of this package that would bring the target's own compiler; None if it is here."""
        return None if self._is_compiler_present() else _COMPILERS[self.accelerator.kind][1]

    def mesh(self, extents: tuple[int, int]) -> Mesh:
        """A mesh of (data, model) devices of `compiler`, in the order that suits the machine.

        Raises:
          ValueError: It is not the number of devices, or as many CPU devices are not simulated.
        """
        if math.prod(extents) != self.num_devices:
            raise ValueError(
                f"a mesh of {extents[0]} x {extents[1]} devices is not the {self.num_devices} of {self}: "
                "choose a mesh or a target of as many."
            )
        return make_mesh(extents, devices=self._devices())

    def _is_compiler_present(self) -> bool:
        try:
            return importlib.util.find_spec(_COMPILERS[self.accelerator.kind][0]) is not None
        except ModuleNotFoundError:  # the folder of all plugins is missing
            return False

    def _devices(self) -> Sequence[jax.Device]:
        if self.compiler == "cpu":
            return jax.devices("cpu")
        if self.compiler == "gpu":
            return _describe_gpus(self)
        return _describe_tpus(self)


# Kind -> module that brings its compiler, and the extra that installs it.
_COMPILERS = {
    "cpu": ("jaxlib", None),
    "gpu": ("jax_plugins.xla_cuda13", "plan-gpu"),
    "tpu": ("libtpu", "tpu"),
}


def _describe_tpus(target: Target) -> Sequence[jax.Device]:
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=str(target)).devices
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error):
            raise ValueError(
                f"the TPU compiler serves one process at a time ({first_line(error)}): try again when the other one "
                "has ended."
            ) from error
        raise ValueError(
            f"the TPU compiler knows no slice {target} ({first_line(error)}): choose another shape."
        ) from error


def _describe_gpus(target: Target) -> Sequence[jax.Device]:
    group = target.accelerator.group_size or target.num_devices
    hosts, rest = divmod(target.num_devices, group)
    topology = f"1x{hosts}x{group}" if hosts and not rest else f"1x1x{target.num_devices}"
    description = _GPU_DESCRIPTION.format(
        memory=target.accelerator.memory_bytes,
        bandwidth=int(target.accelerator.bandwidth or 0),
        **_GPU_FACTS[target.accelerator.name],
    )
    try:
        return topologies.get_topology_desc("", platform="cuda", target_config=description, topology=topology).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # the second where the plugin has not loaded
        raise ValueError(
            f"the GPU compiler does not take {target} ({first_line(error)}): install jax-cuda13-plugin and "
            "jax-cuda13-pjrt for this version of jax and what they need, or uninstall them, and the compiler for CPUs "
            "stands in."
        ) from error


_HOPPER = {
    "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
    "name": "NVIDIA H100",
    "cores": 132,
    "fpus": 128,
    "clock": 1.98,
    "l2": 52428800,
    "shared": 233472,
    "shared_optin": 232448,
}
_AMPERE = {
    "capability": "major: 8",
    "name": "NVIDIA A100",
    "cores": 108,
    "fpus": 64,
    "clock": 1.41,
    "l2": 41943040,
    "shared": 167936,
    "shared_optin": 166912,
}
_BLACKWELL = _HOPPER | {
    "capability": "major: 10 feature_extension: ACCELERATED_FEATURES",
    "name": "NVIDIA B200",
    "cores": 148,
    "clock": 1.965,
    "l2": 132120576,
}
# What XLA's compiler asks of a GPU. Source: CUDA programming guide, compute capabilities; NVIDIA's data sheets.
_GPU_FACTS = {
    "a100-40g": _AMPERE,
    "a100-80g": _AMPERE,
    "h100-80g": _HOPPER,
    "h200": _HOPPER | {"name": "NVIDIA H200"},
    "b200": _BLACKWELL,
}
_GPU_DESCRIPTION = """
gpu_device_info {{
  name: "{name}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ {capability} }}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: {l2}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: {shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared_optin}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
"""
