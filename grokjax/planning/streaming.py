"""`plan_stream`: what a model needs whose weights stream, and how long a pass through its layers takes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.model import abstract_model, layers_that_stay, share_of_experts
from grokjax.planning.costs import step_cost
from grokjax.planning.targets import Target
from grokjax.request import check_integer
from grokjax.sharding import Partitioner
from grokjax.sharding import device_bytes as bytes_on_each_device


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """A pass through all layers, each of which computes while the next one comes, or as few tokens choose its experts.

    Attributes:
      target: the machine.
      num_tokens: that take part in a pass.
      weights_bytes: what the weights take on each device: what stays, and the layers that come and go.
      on_devices: how many layers stay on the devices.
      on_host: how many of the others stay in the host's memory.
      on_disk: how many are read in each pass.
      layer_bytes: of one layer, on all devices together.
      share: of a layer's experts, which is read from the disk: 1, or what few tokens are expected to choose.
      disk_seconds: to read one layer, with that share of its experts.
      host_seconds: to send one layer from the host's memory to the devices; None where that is unknown.
      compute_seconds: of one layer: the longer of reading its weights from the devices' memory and its operations; None
        where one is unknown.
      bound_from: tokens of a pass from which on computing a layer takes longer than reading it from the disk; None
        where the device's operations are unknown.
    """

    target: Target
    num_tokens: int
    weights_bytes: int
    on_devices: int
    on_host: int
    on_disk: int
    layer_bytes: int
    share: float
    disk_seconds: float
    host_seconds: float | None
    compute_seconds: float | None
    bound_from: int | None

    @property
    def fits(self) -> bool | None:
        """Whether the devices have room for the weights; None where their memory is unknown."""
        usable = self.target.accelerator.usable_bytes
        return None if usable is None else self.weights_bytes <= usable

    @property
    def seconds(self) -> float:
        """Of a pass, at best: each layer takes what takes longest of it; what is unknown counts for nothing.

        Where experts are chosen before they are read, one thing comes after the other, and the layer computes twice.
        """
        computing, sending = self.compute_seconds or 0.0, self.host_seconds or 0.0
        all_at_once, in_turn = max(self.disk_seconds, sending, computing), self.disk_seconds + sending + 2 * computing
        return (
            self.on_disk * (all_at_once if self.share == 1 else in_turn)
            + self.on_host * max(sending, computing)
            + self.on_devices * computing
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens that passes take in a second, at best."""
        return self.num_tokens / self.seconds if self.seconds else math.inf


def plan_stream(
    config: GrokConfig,
    target: str | Target,
    *,
    num_tokens: int,
    disk_bandwidth: float,
    host_bandwidth: float | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    device_bytes: int | None = None,
    host_bytes: int = 0,
) -> StreamPlan:
    """What `stream` would need and take on a machine, all of whose devices share the weights. Nothing is compiled.

    Args:
      config: the sizes.
      target: the machine.
      num_tokens: of a pass: of a generation, the rows; of a batch that is scored, all its tokens.
      disk_bandwidth: bytes a second from the disk.
      host_bandwidth: bytes a second from the host's memory to all devices together, such as 5e10 for a GPU on 16 lanes
        of PCIe 5; None where devices are CPUs, or where it is unknown.
      dtype: compute dtype; weights are int8.
      device_bytes: as for `stream`.
      host_bytes: as for `stream`.

    Raises:
      ValueError: A figure is not above 0, or `device_bytes` is too little.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    for name, figure in (("disk_bandwidth", disk_bandwidth), ("host_bandwidth", host_bandwidth)):
        if figure is not None and not 0 < figure < math.inf:
            raise ValueError(f"{name}={figure} must be above 0, and finite: give bytes a second.")
    check_integer("num_tokens", num_tokens, 1)
    mesh = AbstractMesh((1, target.num_devices), ("data", "model"))
    partitioner = Partitioner.create(config, mesh, None)
    one_layer = config.replace(num_layers=1)
    model = abstract_model(one_layer, partitioner, dtype=dtype, quantized=True)
    of_layer = bytes_on_each_device(jax.tree.leaves(model.layers))
    of_outside = bytes_on_each_device(jax.tree.leaves((model.embedding, model.final_norm)))
    layer_bytes = _bytes_of(model.layers)
    num_layers = config.num_layers
    on_devices, at_once = layers_that_stay(num_layers, of_outside, of_layer, device_bytes)
    on_host = min(num_layers - on_devices, host_bytes // layer_bytes)
    cost = step_cost(model, batch_size=1, num_new=num_tokens, filled=num_tokens, cache_dtype=jnp.bfloat16)
    # The logits are of no layer.
    operations = cost.operations - 2 * config.model_dim * config.vocab_size / partitioner.shards("vocab")
    share, feed_forward = share_of_experts(config, num_tokens), model.layers.feed_forward
    unread = (1 - share) * _bytes_of((feed_forward.gate, feed_forward.up, feed_forward.down))
    whole_seconds, flops = layer_bytes / disk_bandwidth, target.accelerator.flops
    return StreamPlan(
        target=target,
        num_tokens=num_tokens,
        weights_bytes=of_outside + at_once * of_layer,
        on_devices=on_devices,
        on_host=on_host,
        on_disk=num_layers - on_devices - on_host,
        layer_bytes=layer_bytes,
        share=share,
        disk_seconds=(layer_bytes - unread) / disk_bandwidth,
        host_seconds=host_bandwidth and layer_bytes / host_bandwidth,
        compute_seconds=_compute_seconds(operations, cost.attention + cost.experts, target),
        bound_from=None if flops is None else math.ceil(whole_seconds * flops * num_tokens / operations),
    )


def _bytes_of(tree: Any) -> int:
    """Bytes of arrays, wherever they lie."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compute_seconds(operations: float, num_bytes: float, target: Target) -> float | None:
    """How long a layer of so many operations and bytes computes at least."""
    flops, bandwidth = target.accelerator.flops, target.accelerator.bandwidth
    return None if flops is None or bandwidth is None else max(operations / flops, num_bytes / bandwidth)
