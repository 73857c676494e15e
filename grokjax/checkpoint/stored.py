"""What every checkpoint layout has in common: parameters by our paths, arrays that are read slice by slice.

A layout (`release`, `safetensors`, `orbax`) opens a checkpoint by reading names, shapes and dtypes only.
Its arrays are then read in parts: a parameter of the model or of one layer, or the matrix of one expert of one layer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np

from grokjax.checkpoint.parameters import Part, Unit, find_parameter
from grokjax.config import GrokConfig

Array = np.ndarray[Any, np.dtype[Any]]
Index = tuple[int | slice, ...]


class CheckpointError(ValueError):
    """A checkpoint cannot be used as it is; the message names the file, what was found, what is allowed, what to do."""


class DamageError(CheckpointError):
    """Files of a checkpoint are damaged: no configuration would fit them."""


class UnreadableError(CheckpointError):
    """The system cannot read a file of a checkpoint that was opened before.

    Attributes:
      reason: what the system says.
    """

    reason = ""

    @classmethod
    def of(cls, path: Path, error: OSError) -> "UnreadableError":
        """The error of a file."""
        reason = error.strerror or str(error)
        found = cls(
            f"{path}: cannot be read ({reason}): look after the disk and the file's permissions, or put the file back "
            "from a copy."
        )
        found.reason = reason
        return found


# The arrays of a part by name, `weight` and where there are any `scales`: as what to read each, and what was read.
Targets = Mapping[str, jax.ShapeDtypeStruct]
Shards = Mapping[str, jax.Array]
Wanted = tuple[Part, Targets]


class Shaped(Protocol):
    """Anything with a shape and a dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """int8, float32 or bfloat16."""


class StoredArray(Shaped, Protocol):
    """An array on disk, of which nothing has been read."""

    def read(self, index: Index = ()) -> Array:
        """A region of the array in memory of its own, in C order; `index` is as NumPy's, without steps."""

    def read_into(self, out: Array, index: Index = ()) -> None:
        """Reads a region of the array into `out`, of the region's shape and the array's dtype, in C order."""


class StoredTensor(Protocol):
    """A plain weight, or an int8 weight [..., C, O] with scales [..., Q, O] (see `QuantizedArray`)."""

    @property
    def weight(self) -> StoredArray:
        """The values, or the int8 values."""

    @property
    def scales(self) -> StoredArray | None:
        """Scales of int8 values; None for a plain weight."""


@runtime_checkable
class Checkpoint(Protocol):
    """A checkpoint whose tensors all fit its configuration."""

    @property
    def layout(self) -> str:
        """`release`, `safetensors` or `orbax`."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def config(self) -> GrokConfig:
        """The configuration that the tensors were checked against."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Our parameter path -> its tensor."""

    @property
    def read_copies(self) -> int:
        """How often the bytes of what is read are held on the host: 2 where they are copied into place."""

    def read_parts(self, unit: str, wanted: Sequence[Wanted], max_host_bytes: int) -> list[Shards]:
        """Reads parts of one unit (`Part.unit`) onto the devices: each reads its own shards, cast to their dtype.

        Args:
          unit: the name of the unit.
          wanted: parts of it, and as what to read the arrays of each.
          max_host_bytes: what may be in flight on the host at once; a single array is always allowed.

        Returns:
          The arrays of each part.
        """

    def sample(self, part: Part) -> bytes:
        """A few of the bytes of a part's arrays, which tell it from that of another checkpoint of the same layout."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shapes and dtypes of a plain weight, or of int8 values and their scales."""

    weight: ArraySpec
    scales: ArraySpec | None

    @classmethod
    def of(cls, tensor: "StoredTensor") -> "TensorSpec":
        """The shapes and dtypes of a stored tensor."""
        scales = None if tensor.scales is None else ArraySpec(tensor.scales.shape, tensor.scales.dtype)
        return cls(ArraySpec(tensor.weight.shape, tensor.weight.dtype), scales)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(leaf.num_bytes for leaf in self.leaves().values())

    def leaves(self) -> dict[str, ArraySpec]:
        """The arrays by name."""
        return {"weight": self.weight} | ({} if self.scales is None else {"scales": self.scales})

    def document(self) -> dict[str, dict[str, Any]]:
        """The shape and dtype of each array, as JSON has them."""
        return {name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for name, leaf in self.leaves().items()}

    def part(self, part: Part) -> "TensorSpec":
        """The shapes and dtypes of one part of it."""
        skipped = len(part.index)
        leaves = {name: ArraySpec(leaf.shape[skipped:], leaf.dtype) for name, leaf in self.leaves().items()}
        return TensorSpec(leaves["weight"], leaves.get("scales"))


_FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_MOST_LINES = 20
# What to do with files whose parameters are not those of a configuration.
ANOTHER_CONFIG = "Pass the configuration that the checkpoint was made with, or download these files again."
_SAMPLE_VALUES = 256
_ALIGNMENT = 64


def read_region(array: StoredArray, index: Index) -> Array:
    """A region of an array in memory of its own, which a CPU device may use as it is."""
    out = aligned_empty(region_shape(array.shape, index), array.dtype)
    array.read_into(out, index)
    return out


def region_shape(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """The shape of what an index takes of an array of some shape."""
    entries = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple(
        len(range(size)[entry]) for entry, size in zip(entries, shape, strict=True) if isinstance(entry, slice)
    )


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Memory for an array that begins where XLA's CPU devices want theirs to: such an array they use without a copy."""
    return _aligned(np.empty, shape, dtype)


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The same with zeros, of which large ones take no memory until they are used."""
    return _aligned(np.zeros, shape, dtype)


def _aligned(make: Callable[[int, type[np.uint8]], Array], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = make(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def read_slices(tensors: Mapping[str, StoredTensor], wanted: Sequence[Wanted]) -> list[Shards]:
    """Reads parts onto the devices as `Checkpoint.read_parts` does, each shard by `StoredArray.read`."""
    return [
        {leaf: _read_array(getattr(tensors[part.parameter], leaf), part, target) for leaf, target in targets.items()}
        for part, targets in wanted
    ]


def _read_array(array: StoredArray, part: Part, target: jax.ShapeDtypeStruct) -> jax.Array:
    def read(index: Any) -> Array:
        whole = all(taken in (slice(None), slice(0, size)) for taken, size in zip(index, target.shape, strict=True))
        data = array.read(part.index if whole else (*part.index, *index))
        return data.astype(target.dtype, copy=False)

    return jax.make_array_from_callback(target.shape, target.sharding, read)


def sample_rows(tensors: Mapping[str, StoredTensor], part: Part) -> bytes:
    """Samples a part as `Checkpoint.sample` does: the beginning of the middle row of each of its arrays."""
    tensor = tensors[part.parameter]
    return b"".join(_sample_row(array, part) for array in (tensor.weight, tensor.scales) if array is not None)


def _sample_row(array: StoredArray, part: Part) -> bytes:
    between = array.shape[len(part.index) : -1]
    return array.read((*part.index, *(size // 2 for size in between), slice(0, _SAMPLE_VALUES))).tobytes()


def specs_of(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Our parameter path -> the shapes and dtypes of its arrays."""
    return {name: TensorSpec.of(tensor) for name, tensor in checkpoint.tensors.items()}


def unit_bytes(specs: Mapping[str, TensorSpec], unit: Unit) -> int:
    """Bytes of the arrays of a unit, by the specs of the parameters that it is of."""
    return sum(specs[part.parameter].part(part).num_bytes for part in unit.parts)


def find_misfits(
    tensors: Mapping[str, StoredTensor] | Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """A sentence for each parameter that is missing or surplus, or is not that of its shape."""
    problems = [f"{parameter}: missing" for parameter in shapes if parameter not in tensors]
    problems += [f"{parameter}: surplus" for parameter in tensors if parameter not in shapes]
    for parameter in [parameter for parameter in shapes if parameter in tensors]:
        problems += [f"{parameter}: {text}" for text in mismatches(tensors[parameter], parameter, shapes[parameter])]
    return problems


def mismatches(tensor: StoredTensor | TensorSpec, parameter: str, shape: tuple[int, ...]) -> Iterator[str]:
    """A sentence for each way in which a tensor is not the parameter of that `shape`."""
    weight: Shaped = tensor.weight
    scales: Shaped | None = tensor.scales
    if weight.shape != shape:
        yield f"the weight has the shape {list(weight.shape)}, the configuration asks for {list(shape)}"
    if scales is None:
        if weight.dtype not in _FLOATS:
            yield f"the weight is {weight.dtype.name} without scales; only float32 and bfloat16 go without"
        return
    if len(weight.shape) < 2 or not find_parameter(parameter).is_quantizable:
        yield "the weight is quantised; only attention and feed-forward weights are, in a release"
        return
    if weight.dtype != np.int8 or scales.dtype not in _FLOATS:
        yield (
            f"the weight is {weight.dtype.name} with {scales.dtype.name} scales; "
            "int8 with float32 or bfloat16 scales is allowed"
        )
    # Against the weight as found: if its own shape is wrong, that is one problem and not two.
    *lead, rows, outputs = weight.shape
    same_axes = len(scales.shape) == len(weight.shape) and (*scales.shape[:-2], scales.shape[-1]) == (*lead, outputs)
    if not same_axes or 0 in scales.shape or rows % scales.shape[-2]:
        allowed = ", ".join(map(str, [*lead, "Q", outputs]))
        yield f"the scales have the shape {list(scales.shape)}; [{allowed}] is allowed, Q any divisor of {rows}"


def list_problems(
    path: Path, problems: Sequence[str], advice: str, *, what: str = "the files do not fit the configuration"
) -> str:
    """One message for all that is wrong with a checkpoint, the first twenty in full; `what` says what it is."""
    shown = "".join(f"\n  {problem}" for problem in problems[:_MOST_LINES])
    hidden = len(problems) - _MOST_LINES
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return f"{path}: {what}, {count}:{shown}{f'{chr(10)}  and {hidden} more' if hidden > 0 else ''}\n{advice}"
