"""What a command says of the machine that runs its model: devices and mesh, an accelerator that JAX does not see."""

import logging
from pathlib import Path

import jax
from jax.sharding import Mesh

from grokjax.cli.console import say

# Files that drivers leave where there is an accelerator -> the extra of pyproject.toml that brings JAX for it, if any.
_TRACES = {
    "proc/driver/nvidia/version": "cuda",
    "dev/nvidia[0-9]*": "cuda",
    "dev/accel[0-9]*": "tpu",
    "dev/kfd": None,  # of AMD's
}


def say_machine(mesh: Mesh, *, weights: str, dtype: str) -> None:
    """Says what a model is about to run on, and warns where an accelerator stays unused.

    Args:
      mesh: the model's.
      weights: of which kind they are, such as "int8".
      dtype: compute dtype.
    """
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    extents = " x ".join(str(extent) for extent in mesh.shape.values())
    others = "" if mesh.size == jax.device_count() else f" (of {jax.device_count()})"
    say(f"{mesh.size} x {', '.join(kinds)}{others}, mesh {extents}, {weights} weights, {dtype}")
    unseen = describe_unseen()
    if unseen is not None:
        logging.getLogger(__name__).warning("%s", unseen)


def describe_unseen(root: Path = Path("/")) -> str | None:
    """A sentence on an accelerator of this machine where JAX runs on CPUs, though nobody has asked for that; or None.

    Args:
      root: where the system's files lie.
    """
    if jax.config.values["jax_platforms"] or jax.default_backend() != "cpu":
        return None
    for pattern, extra in _TRACES.items():
        found = next(root.glob(pattern), None)
        if found is not None:
            remedy = f"pip install '.[{extra}]' in the checkout" if extra else "install JAX for it"
            return (
                f"this machine has an accelerator ({found}) and JAX sees only CPUs: {remedy}, or set JAX_PLATFORMS=cpu."
            )
    return None
