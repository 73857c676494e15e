"""Meshes: made of devices, spread over hosts, and the one that is taken where none is named."""

import math
import reprlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from grokjax.config import GrokConfig
from grokjax.sharding.rules import ShardingRules

MESH_AXES = ("data", "model")


def make_mesh(
    local: tuple[int, int] = (1, 1),
    between_hosts: tuple[int, int] = (1, 1),
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `("data", "model")`, in Auto mode.

    Args:
      local: (data, model) extent over the devices of one host.
      between_hosts: (data, model) extent over hosts; each host is one granule of the mesh.
      devices: devices to use, by default `jax.devices()`; on one host the first `data * model` of them are taken.

    Raises:
      ValueError: An extent is no integer of 1 or more, or there are not as many devices or hosts as the mesh needs.
        Or, where no devices are named, it leaves out all those of a process, which would wait for the others without
        end.

    Source: the release's `runners.py`, `make_mesh`.
    """
    is_chosen = devices is not None
    devices = list(devices if devices is not None else jax.devices())
    for name, extents in (("local", local), ("between_hosts", between_hosts)):
        if not _are_extents(extents):
            raise ValueError(
                f"{name}={reprlib.repr(extents)} must be two integers, 1 or more: the devices or hosts along "
                f"{' and '.join(MESH_AXES)}, such as (1, 8)."
            )
    per_host, hosts = math.prod(local), math.prod(between_hosts)
    if hosts > 1 and per_host * hosts != len(devices):
        raise ValueError(
            f"a mesh of local={local} x between_hosts={between_hosts} needs {per_host * hosts} devices and there are "
            f"{len(devices)}: over several hosts name extents whose product is all of them."
        )
    if per_host * hosts > len(devices):
        raise ValueError(
            f"a mesh of local={local} x between_hosts={between_hosts} needs {per_host * hosts} devices and there are "
            f"{len(devices)}: choose extents whose product is at most that (on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={per_host * hosts} simulates as many)."
        )
    found = len({device.process_index for device in devices})
    if hosts > 1 and hosts != found:
        raise ValueError(
            f"between_hosts={between_hosts} needs {hosts} hosts and the devices belong to {found}: "
            "name extents over hosts whose product is their number, and put the rest into `local`."
        )
    used = devices[: per_host * hosts]
    left_out = {device.process_index for device in devices} - {device.process_index for device in used}
    if left_out and not is_chosen:
        raise ValueError(
            f"a mesh of local={local} leaves out all devices of process {', '.join(map(str, sorted(left_out)))}: "
            f"name the extent over hosts too, such as between_hosts=({found}, 1), or pass the devices to use."
        )
    if hosts == 1:
        grid = mesh_utils.create_device_mesh(local, used, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(local, between_hosts, devices, process_is_granule=True)
    return Mesh(np.asarray(grid), MESH_AXES, axis_types=(AxisType.Auto,) * 2)


def _are_extents(value: object) -> bool:
    """Whether a value can be the extents of a mesh."""
    if not isinstance(value, Sequence) or len(value) != len(MESH_AXES):
        return False
    return all(isinstance(extent, int | np.integer) and extent >= 1 for extent in value)


def spread_over_hosts(data: int, model: int) -> Mesh:
    """A mesh over all hosts: the data axis crosses them if their number divides it, else the model axis.

    Raises:
      ValueError: The hosts cannot share it evenly, or there are not as many devices.
    """
    hosts = jax.process_count()
    if data % hosts == 0:
        return make_mesh((data // hosts, model), (hosts, 1))
    if model % hosts == 0:
        return make_mesh((data, model // hosts), (1, hosts))
    raise ValueError(
        f"{hosts} hosts cannot share a mesh of {data} x {model}: make one of the numbers a multiple of {hosts}."
    )


def default_mesh(config: GrokConfig, rules: ShardingRules | None = None) -> Mesh:
    """The mesh of `init`, `load`, a cache or a command that is given none.

    It has all devices along the model axis, or as many as divide what the rules split there. Over several hosts none is
    left out: what the model axis does not take, the data axis does. If the user has set a default device
    (`jax.default_device`, `jax_default_device`, JAX_DEFAULT_DEVICE), it is that device alone.

    Raises:
      ValueError: The hosts cannot share the devices evenly.
    """
    device = jax.config.values["jax_default_device"]
    if device is not None:
        return make_mesh(devices=[jax.local_devices(backend=device)[0] if isinstance(device, str) else device])
    extents = default_extents(config, rules, jax.device_count(), uses_all=jax.process_count() > 1)
    return spread_over_hosts(*extents)


def default_extents(
    config: GrokConfig, rules: ShardingRules | None, num_devices: int, *, uses_all: bool
) -> tuple[int, int]:
    """The (data, model) extents with the longest model axis that divides what the rules split.

    Args:
      config: the sizes.
      rules: tensor parallel by default.
      num_devices: that there are.
      uses_all: whether the data axis takes what the model axis leaves; else it is 1, and devices may be left out.
    """
    rules = ShardingRules() if rules is None else rules
    lengths = [n for n in range(num_devices, 0, -1) if not uses_all or num_devices % n == 0]
    extents = [(num_devices // n if uses_all else 1, n) for n in lengths]
    for one in extents:
        if not any(rules.find_problems(config, AbstractMesh(one, MESH_AXES))):
            return one
    return extents[-1]  # whoever makes a mesh of it is told why it does not fit either
