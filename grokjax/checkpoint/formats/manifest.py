"""`grokjax.json`, which makes a folder a checkpoint of ours: what it holds, of which model, made from what."""

import dataclasses
import functools
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grokjax.checkpoint.disk import read_json, write_json
from grokjax.checkpoint.parameters import Unit, units_of
from grokjax.checkpoint.sizes import check_count
from grokjax.checkpoint.stored import ArraySpec, CheckpointError, TensorSpec
from grokjax.config import GrokConfig

FORMAT_VERSION = 1
MANIFEST = "grokjax.json"
UNFINISHED = "unfinished.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `grokjax.json` says.

    Attributes:
      config: of the model.
      specs: our parameter path -> shapes and dtypes.
      origin: what it was made from and how; a conversion goes on only where this is the same.
      checksums: `PART/weight` or `PART/scales` -> CRC-32 of the array's bytes; empty until it has been verified.
    """

    config: GrokConfig
    specs: Mapping[str, TensorSpec]
    origin: Mapping[str, Any]
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def units(self) -> dict[str, Unit]:
        """The units by name."""
        return {unit.name: unit for unit in units_of(self.config)}

    def document(self) -> dict[str, Any]:
        """What the file says, as JSON has it."""
        return {
            "format": "grokjax",
            "format_version": FORMAT_VERSION,
            "config": dataclasses.asdict(self.config),
            "origin": dict(self.origin),
            "tensors": {parameter: tensor.document() for parameter, tensor in self.specs.items()},
            "checksums": dict(self.checksums),
        }

    def write(self, folder: Path, name: str) -> None:
        """Writes the file so that it is there whole or not at all; what was there before stays until then.

        Raises:
          CheckpointError: The disk is full, or the folder cannot be written.
        """
        try:
            write_json(folder / name, self.document())
        except OSError as error:
            raise CheckpointError(
                f"{folder / name}: cannot be written ({error.strerror}): make room or check the permissions, then try "
                "again."
            ) from error


def read_manifest(path: Path) -> Manifest:
    """Reads `grokjax.json` or `unfinished.json`.

    Raises:
      CheckpointError: It cannot be read, is not ours, or is of a newer format.
    """
    document = read_json(path, "restore it from a copy or convert again")
    if not isinstance(document, dict) or document.get("format") != "grokjax":
        raise CheckpointError(f"{path}: not the manifest of a grokjax checkpoint: check the path.")
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format version {version!r}, this grokjax reads {FORMAT_VERSION}: "
            "install the version of grokjax that wrote it, or convert again."
        )
    try:
        specs = {parameter: _tensor_spec(entry) for parameter, entry in document["tensors"].items()}
        config = GrokConfig(**document["config"])
        manifest = Manifest(config, specs, dict(document["origin"]), dict(document["checksums"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}): restore it from a copy or convert again.") from error
    check_count(path, config, "num_layers", len(specs), "tensors in it")
    return manifest


def _tensor_spec(entry: Mapping[str, Any]) -> TensorSpec:
    leaves = {name: ArraySpec(_shape(leaf["shape"]), np.dtype(str(leaf["dtype"]))) for name, leaf in entry.items()}
    return TensorSpec(leaves["weight"], leaves.get("scales"))


def _shape(sizes: Sequence[Any]) -> tuple[int, ...]:
    """The sizes of an array's axes, which must not be 64.0 or true."""
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"the shape {reprlib.repr(sizes)} has other sizes than integers of 1 or more")
    return tuple(sizes)
