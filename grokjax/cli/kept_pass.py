"""How far a pass through layers that stream has come, in a file beside the results: interrupted, it goes on there."""

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grokjax.checkpoint import written_whole
from grokjax.cli.console import say

# How every such file begins: what else has the name is not ours to overwrite.
_START = b'{"grokjax pass": '


@dataclasses.dataclass(frozen=True)
class KeptPass:
    """The file of a job, which holds the pass of one batch at a time: what its last finished layer gave.

    It begins with a line of JSON: which pass it is, how many layers are finished, and the CRC-32 of what follows, begun
    with that number: the bytes of [B, T, D] in C order.

    Attributes:
      path: of the file.
      model: tells the weights and the way they are computed with from all others.
      batch: tells the texts of the batch from all others.
    """

    path: Path
    model: str
    batch: str = ""

    @classmethod
    def beside(cls, output: Path, *what: object) -> "KeptPass":
        """That of the job with this output, whose results depend on `what`, besides the texts.

        Raises:
          ValueError: Something else has the file's name.
        """
        path = output.with_name(f"{output.name}.pass")
        kept = cls(path, _digest(repr((jax.__version__, jax.default_backend(), *what)).encode()))
        if path.exists() and kept._read(len(_START)) != _START:
            raise ValueError(f"{path} has the name of what --keep-pass keeps, and is none: move it away.")
        return kept

    def of(self, *batch: np.ndarray) -> "KeptPass":
        """The same for a batch of these arrays."""
        return dataclasses.replace(self, batch=_digest(*(f"{part.shape}".encode() + part.tobytes() for part in batch)))

    def begin(self, x: jax.Array) -> tuple[int, jax.Array]:
        """Finds how many layers are finished, and what the next one is given: x of the first, if it is that.

        Raises:
          ValueError: The file cannot be read.
        """
        if not self.path.exists():
            return 0, x
        line, _, data = self._read().partition(b"\n")
        try:
            head = json.loads(line)
        except ValueError:
            head = {}
        num_layers = head.get("layers")
        if not isinstance(num_layers, int) or head != self._head(num_layers, data) or len(data) != x.nbytes:
            say(f"{self.path} is damaged, or of other texts or weights: the pass begins with the first layer")
            return 0, x
        say(f"{self.path}: the pass goes on after {num_layers} layers")
        return num_layers, jax.device_put(np.frombuffer(data, x.dtype).reshape(x.shape), x.sharding)

    def keep(self, num_layers: int, x: jax.Array) -> None:
        """Writes that so many layers are finished, and gave x; what was kept before stays until that is whole.

        Raises:
          ValueError: It cannot be written.
        """
        data = np.asarray(x).tobytes()
        try:
            with written_whole(self.path) as file:
                file.write(json.dumps(self._head(num_layers, data)).encode() + b"\n")
                file.write(data)
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written: {error.strerror}. The results so far are kept, and the same command "
                "goes on after them: make room, or leave --keep-pass away."
            ) from error

    def drop(self) -> None:
        """Removes the file of a pass that is done."""
        self.path.unlink(missing_ok=True)

    def _head(self, num_layers: int, data: bytes) -> dict[str, Any]:
        crc32 = zlib.crc32(data, num_layers)
        return {"grokjax pass": f"{self.model} {self.batch}", "layers": num_layers, "crc32": crc32}

    def _read(self, num_bytes: int = -1) -> bytes:
        """So many bytes of the file, from its beginning; all by default."""
        try:
            with self.path.open("rb") as file:
                return file.read(num_bytes)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror}. Move it away.") from error


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]
