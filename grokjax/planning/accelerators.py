"""Known accelerators: what a device holds, reads, computes and sends, each figure with its source."""

import dataclasses
from typing import Literal

GIB = 1 << 30

# What a plan leaves to the driver, the runtime and fragmentation.
_RESERVE = 0.05

_TPU_SOURCE = "docs.cloud.google.com/tpu/docs/"
_NVIDIA_SOURCE = "NVIDIA data sheet, "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device, as JAX counts them; peak figures of its maker, which no program quite reaches.

    Attributes:
      name: as in `--target`.
      kind: "cpu", "gpu" or "tpu".
      memory_bytes: of the device; None where it is unknown.
      bandwidth: bytes a second from its memory; None where it is unknown.
      flops: bfloat16 operations a second with dense operands; None where it is unknown.
      link_bandwidth: bytes a second that it sends to the devices of its group; None where it is unknown.
      host_bandwidth: bytes a second that it sends beyond; None where the group is all there is.
      group_size: neighbouring devices on the fast links; None if all devices of a system are.
      source: where the figures stand.
    """

    name: str
    kind: Literal["cpu", "gpu", "tpu"]
    memory_bytes: int | None = None
    bandwidth: float | None = None
    flops: float | None = None
    link_bandwidth: float | None = None
    host_bandwidth: float | None = None
    group_size: int | None = None
    source: str = ""

    @property
    def usable_bytes(self) -> int | None:
        """What weights, cache and programs may take: 95% of the memory."""
        return None if self.memory_bytes is None else int(self.memory_bytes * (1 - _RESERVE))


def _gpu(
    name: str, *, gib: float, terabytes_s: float, teraflops: float, nvlink: float, network: float, source: str
) -> Accelerator:
    """Eight in a host on NVLink, of which `nvlink` GB/s both ways together; a network card of `network` Gb/s each."""
    return Accelerator(
        name=name,
        kind="gpu",
        memory_bytes=int(gib * GIB),
        bandwidth=terabytes_s * 1e12,
        flops=teraflops * 1e12,
        link_bandwidth=nvlink * 1e9 / 2,
        host_bandwidth=network * 1e9 / 8,
        group_size=8,
        source=_NVIDIA_SOURCE + source,
    )


def _tpu(name: str, *, gib: float, gigabytes_s: float, teraflops: float, links: float, source: str) -> Accelerator:
    """All of a slice on one torus, of which `links` GB/s both ways together."""
    return Accelerator(
        name=name,
        kind="tpu",
        memory_bytes=int(gib * GIB),
        bandwidth=gigabytes_s * 1e9,
        flops=teraflops * 1e12,
        link_bandwidth=links * 1e9 / 2,
        source=_TPU_SOURCE + source,
    )


# The memory of GPUs is what their driver reports, a little below the round number of the data sheet. A network card of
# the DGX system of each generation is counted for each GPU. TPU7x counts two devices a chip.
_TABLE = (
    Accelerator(name="cpu", kind="cpu", source="this machine"),
    _gpu("a100-40g", gib=39.4, terabytes_s=1.555, teraflops=312, nvlink=600, network=200, source="A100 40GB SXM"),
    _gpu("a100-80g", gib=79.2, terabytes_s=2.039, teraflops=312, nvlink=600, network=200, source="A100 80GB SXM"),
    _gpu("h100-80g", gib=79.1, terabytes_s=3.35, teraflops=989, nvlink=900, network=400, source="H100 SXM"),
    _gpu("h200", gib=139.8, terabytes_s=4.8, teraflops=989, nvlink=900, network=400, source="H200 SXM"),
    _gpu("b200", gib=178.3, terabytes_s=8.0, teraflops=2250, nvlink=1800, network=400, source="DGX B200"),
    _tpu("v5e", gib=16, gigabytes_s=819, teraflops=197, links=400, source="v5e"),
    _tpu("v5p", gib=95, gigabytes_s=2765, teraflops=459, links=1200, source="v5p"),
    _tpu("v6e", gib=32, gigabytes_s=1638, teraflops=918, links=800, source="v6e"),
    _tpu("tpu7x", gib=96, gigabytes_s=3690, teraflops=1153.5, links=600, source="tpu7x"),
)
ACCELERATORS = {accelerator.name: accelerator for accelerator in _TABLE}
_OTHER_NAMES = {"a100": "a100-80g", "h100": "h100-80g"}


def find_accelerator(name: str) -> Accelerator:
    """The accelerator of a name, in capitals or not.

    Raises:
      ValueError: It is not in the table.
    """
    known = name.lower()
    known = _OTHER_NAMES.get(known, known)
    if known not in ACCELERATORS:
        raise ValueError(f"{name!r} is no accelerator of the table; these are: {', '.join(ACCELERATORS)}.")
    return ACCELERATORS[known]
