"""One pass over the layers of a checkpoint, each read while the one before computes, its experts maybe when chosen."""

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from flax import nnx

from grokjax.checkpoint.in_place import allocate_again
from grokjax.checkpoint.layer_reader import LayerReader
from grokjax.checkpoint.progress import Report, Tally
from grokjax.checkpoint.stored import Array, aligned_zeros
from grokjax.context import own_context
from grokjax.model import LayerAtHand, state_with_values
from grokjax.quantization import Weight


class LayerPass:
    """One pass: layers that stay are given as they are, or sent to the devices; the others are read.

    Args:
      reader: of the layers.
      on_device: the first layers, on the devices.
      on_host: the next ones, in the host's memory.
      first: the number of the first layer that will be asked for.
      share: of the experts that is expected to be asked for. At 1 a layer is read whole, while the one before computes.
        Below, all of it but its experts is, and these are read when they are asked for.
      report: whom to tell how far reading has come; None for the logger.
      thread: reads ahead.
    """

    def __init__(
        self,
        reader: LayerReader,
        on_device: Sequence[nnx.State],
        on_host: Sequence[nnx.State],
        *,
        first: int,
        share: float,
        report: Report | None,
        thread: ThreadPoolExecutor,
    ):
        self._reader, self._on_device, self._on_host, self._share = reader, on_device, on_host, share
        self._num_kept, self._thread, self._stop = len(on_device) + len(on_host), thread, threading.Event()
        read = range(max(first, self._num_kept), reader.num_layers)
        self._coming: dict[int, Future[nnx.State]] = {}
        self._ahead: tuple[list[Array], list[Array]] = [], []  # memory of layers with even and with odd numbers
        # Of the layer that computes, which experts have been read; the memory and the arrays of all of them.
        self._layer: nnx.State = nnx.State({})
        self._there: frozenset[int] = frozenset()
        self._held: list[Array] = []
        self._shapes: list[jax.ShapeDtypeStruct] = []
        self._experts: dict[str, Weight] = {}
        self._expected = [self._expected_bytes(number) if number in read else 0 for number in range(reader.num_layers)]
        self._tally = Tally("streamed", sum(self._expected), report)
        self._fetch(max(first, len(on_device)))
        if read:
            self._count(read[0], 0, left=self._expected[read[0]])  # rates count from here

    def take(self, number: int, experts: Collection[int] = ()) -> LayerAtHand:
        """Gives a layer as `TakeLayer` says.

        Raises:
          CheckpointError: A file cannot be read, or is no longer the one that was opened.
        """
        every = range(self._reader.num_experts)
        if number < len(self._on_device):
            return LayerAtHand(self._on_device[number], every)
        if number in self._coming:
            layer = self._coming.pop(number).result()
            if number >= self._num_kept:
                ahead = self._bytes_ahead(number)
                self._count(number, ahead, left=self._expected[number] - ahead)
            self._fetch(number + 1)
            if number < self._num_kept or self._share == 1:
                return LayerAtHand(layer, every)
            self._begin(number, layer)
        self._read_experts(number, frozenset(experts) - self._there)
        return LayerAtHand(state_with_values(self._layer, self._experts), self._there)

    def stop(self) -> None:
        """Ends the reading ahead."""
        self._stop.set()

    def _begin(self, number: int, layer: nnx.State) -> None:
        """Goes on to a layer without its experts; where these are to be, those of the one before stand, or zeros."""
        self._layer, self._there = layer, frozenset()
        shapes = self._reader.expert_shapes(number)
        if shapes != self._shapes:
            self._shapes = shapes
            self._fill_experts(number, ())

    def _read_experts(self, number: int, experts: Collection[int]) -> None:
        if experts:
            self._fill_experts(number, experts)
            self._there |= set(experts)
            self._count(number, len(experts) * self._reader.expert_bytes(number), left=0, of=".feed_forward")

    def _fill_experts(self, number: int, experts: Collection[int]) -> None:
        self._experts = {}  # whose memory is used again
        again = allocate_again(self._held, aligned_zeros)
        self._experts = self._reader.read_experts(number, experts, self._stop, again)

    def _fetch(self, number: int) -> None:
        """Begins to fetch a layer that does not stay on the devices."""
        if len(self._on_device) <= number < self._reader.num_layers:
            self._coming[number] = self._thread.submit(self._read_ahead, number)

    @own_context()
    def _read_ahead(self, number: int) -> nnx.State:
        at = number - len(self._on_device)
        if at < len(self._on_host):
            return jax.block_until_ready(moved(self._on_host[at], "device"))
        read = self._reader.read if self._share == 1 else self._reader.read_but_experts
        return read(number, self._stop, allocate_again(self._ahead[number % 2]))

    def _bytes_ahead(self, number: int) -> int:
        """Bytes of a layer that are read before it computes."""
        unread = 0 if self._share == 1 else self._reader.num_experts * self._reader.expert_bytes(number)
        return self._reader.layer_bytes(number) - unread

    def _expected_bytes(self, number: int) -> int:
        """Bytes of a layer that are expected to be read."""
        whole, ahead = self._reader.layer_bytes(number), self._bytes_ahead(number)
        return ahead + int(self._share * (whole - ahead))

    def _count(self, number: int, num_bytes: int, *, left: int, of: str = "") -> None:
        """Tells of bytes of a layer, or of a part of it, that were read; so many more are expected of it."""
        self._tally.total_bytes = self._tally.done_bytes + num_bytes + left + sum(self._expected[number + 1 :])
        self._tally.add(num_bytes, f"layers.{number}{of}", f"layers.{number}{of}")


def moved(layer: nnx.State, kind: str) -> nnx.State:
    """A layer in that memory of its devices, or of their host; CPUs have but one."""

    def move(leaf: jax.Array) -> jax.Array:
        is_cpu = next(iter(leaf.devices())).platform == "cpu"
        return leaf if is_cpu else jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(move, layer)
