"""Layers of a checkpoint read for a model that streams: whole, or without the experts that no token chose."""

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError

import jax
from flax import nnx

from grokjax.checkpoint.assembly import Builder
from grokjax.checkpoint.in_place import Allocate
from grokjax.checkpoint.progress import Progress, Tally
from grokjax.checkpoint.stacks import Stack, stack_shapes
from grokjax.checkpoint.stored import CheckpointError, TensorSpec, UnreadableError, aligned_empty
from grokjax.model import state_with_values
from grokjax.quantization import Weight


class LayerReader:
    """Reads layers of a checkpoint: whole ones, or all of one but its experts, or some of these.

    Args:
      builder: reads the parts of the checkpoint.
      empty: the state of one layer, of shapes.
      stacks: what each layer is made of.
    """

    def __init__(self, builder: Builder, empty: nnx.State, stacks: Sequence[Sequence[Stack]]):
        self._builder, self._empty, self._stacks = builder, empty, stacks
        self.num_layers, self.num_experts = len(stacks), builder.checkpoint.config.num_experts

    def read(self, number: int, stop: threading.Event, allocate: Allocate = aligned_empty) -> nnx.State:
        """A whole layer.

        Args:
          number: of the layer.
          stop: whether to end early, by a `CancelledError`.
          allocate: gives the memory.

        Raises:
          CheckpointError: A file cannot be read, or is no longer the one that was opened.
        """
        return state_with_values(self._empty, self._read(number, self._stacks[number], stop, allocate))

    def read_but_experts(self, number: int, stop: threading.Event, allocate: Allocate) -> nnx.State:
        """A layer of whose experts there are only the shapes; arguments and errors are those of `read`."""
        others = [stack for stack in self._stacks[number] if not stack.has_experts]
        return state_with_values(self._empty, self._read(number, others, stop, allocate))

    def read_experts(
        self, number: int, experts: Collection[int], stop: threading.Event, allocate: Allocate
    ) -> dict[str, Weight]:
        """The values of a layer's experts by name, of which these are read; the memory of others stays as it is given.

        The other arguments and errors are those of `read`.
        """
        return self._read(number, self._experts_of(number), stop, allocate, experts)

    def read_stacks(
        self,
        stacks: Sequence[Stack],
        stop: threading.Event,
        allocate: Allocate = aligned_empty,
        experts: Collection[int] | None = None,
    ) -> dict[str, Weight]:
        """The values of some stacks by name; of stacks of experts only some are read, if they are named."""

        def check(_: Progress) -> None:
            if stop.is_set():
                raise CancelledError

        found = self._builder.build_in_place(stacks, Tally("read", 0, check), allocate, experts=experts)
        return jax.block_until_ready(found)

    def _read(
        self,
        number: int,
        stacks: Sequence[Stack],
        stop: threading.Event,
        allocate: Allocate,
        experts: Collection[int] | None = None,
    ) -> dict[str, Weight]:
        """The values of some stacks by their names in a layer, whose number an error tells."""
        try:
            values = self.read_stacks(stacks, stop, allocate, experts)
        except UnreadableError as error:
            raise CheckpointError(
                f"{self._builder.checkpoint.path}: layer {number} cannot be read ({error.reason}). Look "
                "after the disk; the model stays as it is, and its next pass reads all layers again."
            ) from error
        return {name.removeprefix("layers."): value for name, value in values.items()}

    def layer_bytes(self, number: int) -> int:
        """Bytes of a layer in the checkpoint."""
        return self.bytes_of(self._stacks[number])

    def expert_bytes(self, number: int) -> int:
        """Bytes of one expert of a layer in the checkpoint."""
        return self.bytes_of(self._experts_of(number)) // self.num_experts

    def expert_shapes(self, number: int) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays that `read_experts` makes."""
        tensors, partitioner = self._builder.checkpoint.tensors, self._builder.partitioner
        return jax.tree.leaves([stack_shapes(stack, tensors, partitioner) for stack in self._experts_of(number)])

    def bytes_of(self, stacks: Sequence[Stack]) -> int:
        """Bytes of some stacks in the checkpoint."""
        names = [name for stack in stacks for name in stack.sources if name is not None]
        return sum(TensorSpec.of(self._builder.checkpoint.tensors[name]).num_bytes for name in names)

    def _experts_of(self, number: int) -> list[Stack]:
        return [stack for stack in self._stacks[number] if stack.has_experts]
