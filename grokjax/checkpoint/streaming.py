"""Models larger than the memory: their layers stay in the checkpoint's files and are read in each pass."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from grokjax.checkpoint.assembly import Builder
from grokjax.checkpoint.layer_reader import LayerReader
from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.likeness import check_same_weights
from grokjax.checkpoint.loading import HOST_BYTES
from grokjax.checkpoint.mapping import map_sources
from grokjax.checkpoint.passes import LayerPass, moved
from grokjax.checkpoint.progress import Report, Tally
from grokjax.checkpoint.stacks import Stack, bytes_of_stacks, stacks_of
from grokjax.checkpoint.stored import Checkpoint
from grokjax.config import GrokConfig
from grokjax.context import own_context
from grokjax.memory import check_fits
from grokjax.model import (
    Grok,
    StreamedLayers,
    TakeLayer,
    abstract_model,
    check_dtype,
    layers_that_stay,
    with_quantized_table,
    with_values,
)
from grokjax.quantization import Weight
from grokjax.request import check_integer
from grokjax.sharding import Partitioner, ShardingRules


@own_context()
def stream(
    path: str | Path | Checkpoint,
    config: GrokConfig | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    quantized_table: bool = False,
    rules: ShardingRules | None = None,
    layers: Sequence[int] | None = None,
    rename: Sequence[tuple[str, str]] = (),
    device_bytes: int | None = None,
    host_bytes: int = 0,
    progress: Report | None = None,
    allow_oom: bool = False,
) -> Grok:
    """A model of a checkpoint of any layout, larger than the memory: its layers are read in each pass, and let go.

    While a layer computes, the next one is read and sent to the devices, so that no more than two of them are there
    beside those that stay. The model goes to `forward`, `score`, `prefill`, `decode`, `generate`, `observe`, an
    `Engine` or a `TextGenerator`, and gives what a loaded one does; see docs/small_machines.md. Each call of them, or
    each token of a generation, is a pass through all layers: many rows cost little more than one. Of few tokens a pass
    reads only the experts that they choose, once a layer has chosen; then nothing else is done meanwhile. A pass that
    fails loses its cache, if it has one, and nothing else.

    Args:
      path: as for `load`. Weights stay as they are in the checkpoint: int8 ones have their scales.
      config: as for `load`.
      mesh: as for `load`.
      dtype: as for `load`.
      quantized_table: as for `load`.
      rules: as for `load`.
      layers: as for `load`.
      rename: as for `load`.
      device_bytes: what the weights may take on each device; as many of the first layers stay there as fit beside two
        that come and go. By default none stays.
      host_bytes: what further layers may take in the host's memory, in which they then stay. Where the devices are
        CPUs, that is the same memory.
      progress: called after each layer that is read, those that stay now, and the others in each pass, which it is told
        of when it begins, too; of few tokens also after the experts of a layer, and of as many bytes in all as are
        expected. Without it the logger is told now and then.
      allow_oom: try it even where the devices have too little memory left.

    Raises:
      CheckpointError: As for `load`. In the course of a pass: a file cannot be read, or is no longer the one that was
        opened.
      ValueError: As for `load`, or `device_bytes` is too little.
    """
    check_dtype(dtype)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, config)
    config, sources = map_sources(checkpoint, config, layers, rename, ())
    partitioner = Partitioner.create(config, mesh, rules)
    check_same_weights(checkpoint, together=partitioner.mesh.is_multi_process)
    abstract = abstract_model(config, partitioner, dtype=dtype, quantized=False)
    stacks = stacks_of(abstract, sources, quantized=True)
    outside = [stack for stack in stacks if not stack.is_layered]
    by_layer = [[stack.of_layer(number) for stack in stacks if stack.is_layered] for number in range(config.num_layers)]
    of_outside, of_layer = (bytes_of_stacks(some, checkpoint.tensors, partitioner) for some in (outside, by_layer[0]))
    num_on_device, at_once = layers_that_stay(config.num_layers, of_outside, of_layer, device_bytes)
    one_layer = abstract_model(config.replace(num_layers=1), partitioner, dtype=dtype, quantized=False).layers
    reader = LayerReader(Builder(checkpoint, partitioner, HOST_BYTES), nnx.split(one_layer)[1], by_layer)
    fit = check_integer("host_bytes", host_bytes, 0) // reader.layer_bytes(0)
    num_on_host = min(config.num_layers - num_on_device, fit)
    if not allow_oom:
        if partitioner.platform == "cpu":  # whose memory is the host's
            at_once = min(config.num_layers, at_once + num_on_host)
        remedy = "give less device_bytes and host_bytes"
        check_fits("the model", of_outside + at_once * of_layer, partitioner.mesh, remedy=remedy)
    files = LayerFiles(reader, progress)
    values = files.keep(outside, num_on_device=num_on_device, num_on_host=num_on_host)
    abstract.layers = StreamedLayers(one_layer, config.num_layers, files)
    model = with_values(abstract, values)
    return with_quantized_table(model) if quantized_table else model


class LayerFiles:
    """The layers of a checkpoint, as a model takes them in each pass: the first ones stay in memory.

    Args:
      reader: reads them.
      report: whom to tell how far reading has come; None for the logger.
    """

    def __init__(self, reader: LayerReader, report: Report | None):
        self._reader, self._report = reader, report
        self._on_device: list[nnx.State] = []
        self._on_host: list[nnx.State] = []

    def keep(self, outside: Sequence[Stack], *, num_on_device: int, num_on_host: int) -> dict[str, Weight]:
        """Reads what stays: the values of `outside`, which it gives back, and the first layers.

        Args:
          outside: what is no layer.
          num_on_device: how many layers stay on the devices.
          num_on_host: how many of the next ones stay in the host's memory.
        """
        num_kept, of_outside = num_on_device + num_on_host, self._reader.bytes_of(outside)
        total_bytes = of_outside + sum(map(self._reader.layer_bytes, range(num_kept)))
        tally, never = Tally("loaded", total_bytes, self._report), threading.Event()
        values = self._reader.read_stacks(outside, never)
        tally.add(of_outside, "embedding", "embedding")
        for number in range(num_kept):
            layer = self._reader.read(number, never)
            if number < num_on_device:
                self._on_device.append(layer)
            else:
                self._on_host.append(moved(layer, "pinned_host"))
            tally.add(self._reader.layer_bytes(number), f"layers.{number}", f"layers.{number}")
        return values

    @contextlib.contextmanager
    def open_pass(self, first: int, share: float) -> Iterator[TakeLayer]:
        """See `LayerSource`; a thread reads ahead until the pass ends, be it by an error.

        Raises:
          CheckpointError: A file cannot be read, or is no longer the one that was opened.
        """
        with ThreadPoolExecutor(1) as thread:
            begun = LayerPass(
                self._reader,
                self._on_device,
                self._on_host,
                first=first,
                share=share,
                report=self._report,
                thread=thread,
            )
            try:
                yield begun.take
            finally:
                begun.stop()
