"""The bytes of one array inside a file of any format that stores plain numbers: read in place, or mapped."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from grokjax.checkpoint.disk import Stamp, read_bytes, unchanged
from grokjax.checkpoint.stored import Array, CheckpointError, Index, UnreadableError, read_region


@dataclasses.dataclass(frozen=True)
class Payload:
    """The bytes of one array inside a file, not read yet.

    Attributes:
      path: the file.
      offset: of the first element, in bytes; need not be aligned to the element size.
      shape: sizes of the axes, C order.
      dtype: int8, float32 or bfloat16.
      stamp: of the file when its header was read.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stamp: Stamp

    @property
    def num_bytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> np.memmap[Any, Any]:
        """Maps the array read-only: pages are read from the disk as they are touched, a slice reads only its own.

        If the file is shortened or its disk fails while a slice is copied, the system ends the process. Reading each
        row of a slice of columns instead, which cannot end so, is 3 to 6 times slower from the page cache.
        """
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)

    def read(self, index: Index = ()) -> Array:
        """A region of the array in memory of its own, as `read_into` reads it."""
        return read_region(self, index)

    def read_into(self, out: Array, index: Index = ()) -> None:
        """Reads a region of the array into `out`; one whose bytes lie side by side is read without a map.

        Raises:
          CheckpointError: The file is no longer the one that was opened, or cannot be read.
        """
        with unchanged(self.path, self.stamp):
            start = self._start(index)
            try:
                if start is None:
                    # As plain integers: NumPy copies those faster than bfloat16.
                    bits = np.dtype(f"u{self.dtype.itemsize}")
                    np.copyto(out.view(bits), self.array().view(bits)[index])
                else:
                    self._read_bytes(out, start)
            except OSError as error:
                raise UnreadableError.of(self.path, error) from error

    def _start(self, index: Index) -> int | None:
        """The number of the first element of a region whose bytes lie side by side; None where they do not."""
        start, is_cut = 0, False
        whole = [slice(None)] * (len(self.shape) - len(index))
        for entry, length in zip((*index, *whole), self.shape, strict=True):
            taken = range(length)[entry if isinstance(entry, slice) else slice(entry, entry + 1)]
            if is_cut and len(taken) < length:
                return None  # several parts of this axis, with what is left out between them
            start = start * length + taken.start
            is_cut |= len(taken) > 1
        return start

    def _read_bytes(self, out: Array, start: int) -> None:
        into = out.reshape(-1).view(np.uint8).data
        with self.path.open("rb", buffering=0) as stream:
            if not read_bytes(stream, self.offset + start * self.dtype.itemsize, into):
                raise CheckpointError(f"{self.path}: the file has become shorter while it was read: download it again.")
