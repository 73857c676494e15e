"""Our own checkpoints on disk: `grokjax.json` beside `weights/`, which holds one Orbax checkpoint for each unit.

A unit (`parameters.Unit`) is one expert's matrix of one layer, the rest of a layer, or a parameter outside the layers.
Orbax commits each by a rename, so a unit is there or it is not, and writing needs the memory of one matrix. The whole
is committed by another rename: while it is written, the manifest is called `unfinished.json`.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grokjax.checkpoint.disk import check_name
from grokjax.checkpoint.formats.manifest import MANIFEST, UNFINISHED, Manifest, read_manifest
from grokjax.checkpoint.formats.orbax_headers import WEIGHTS, Units, read_chunks, unit_fault, unit_names, unit_path
from grokjax.checkpoint.formats.orbax_units import how_to_go_on, read_unit, reason
from grokjax.checkpoint.parameters import Part, parameter_shapes, parts_of
from grokjax.checkpoint.sizes import check_count
from grokjax.checkpoint.stored import (
    Array,
    ArraySpec,
    CheckpointError,
    DamageError,
    Index,
    Shards,
    Wanted,
    find_misfits,
    list_problems,
    read_region,
)
from grokjax.config import GrokConfig

_SAMPLE_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class OrbaxArray:
    """One array of a checkpoint; an expert axis is put together from the experts' units."""

    units: Units
    parameter: str
    leaf: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self._spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """int8, float32 or bfloat16."""
        return self._spec.dtype

    @property
    def _spec(self) -> ArraySpec:
        return self.units.manifest.specs[self.parameter].leaves()[self.leaf]

    def read(self, index: Index = ()) -> Array:
        """A region of the array in memory of its own, as `read_into` reads it."""
        return read_region(self, index)

    def read_into(self, out: Array, index: Index = ()) -> None:
        """Reads a region of the array into `out`, part by part.

        Raises:
          CheckpointError: A unit is missing, damaged, or holds something else.
        """
        parts = parts_of(self.parameter, self.units.manifest.config)
        if parts[0].expert is None:
            self._read_part(parts[0], out, index)
        elif index and isinstance(index[0], int):
            self._read_part(parts[index[0]], out, index[1:])
        else:
            chosen = parts[index[0]] if index else parts
            assert isinstance(chosen, tuple)
            for part, target in zip(chosen, out, strict=True):
                self._read_part(part, target, index[1:])

    def _read_part(self, part: Part, out: Array, index: Index) -> None:
        """Reads a region of a part; by Orbax's own storage library what is not stored as we store it."""
        array = self.units.path(part.unit) / "state" / f"{part.name}.{self.leaf}"
        spec = self.units.manifest.specs[self.parameter].part(part).leaves()[self.leaf]
        if not read_chunks(array, spec, index, out):
            self._read_by_library(array, out, index)

    def _read_by_library(self, array: Path, out: Array, index: Index) -> None:
        import tensorstore  # takes long to import, as Orbax does

        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}
        try:
            stored = tensorstore.open(spec, open=True, read=True).result()
            taken = [
                slice(*entry.indices(size)[:2]) if isinstance(entry, slice) else entry
                for entry, size in zip(index, stored.shape, strict=False)
            ]
            region = stored[tuple(taken)]
            tensorstore.array(out)[...].write(region.translate_to[(0,) * out.ndim]).result()
        except ValueError as error:
            raise CheckpointError(
                f"{array}: cannot be read ({reason(error)}): restore this folder from a copy or convert again."
            ) from error


@dataclasses.dataclass(frozen=True)
class OrbaxTensor:
    """One parameter of a checkpoint."""

    weight: OrbaxArray
    scales: OrbaxArray | None


@dataclasses.dataclass(frozen=True)
class OrbaxCheckpoint:
    """A whole checkpoint of ours.

    Attributes:
      path: its folder.
      manifest: what `grokjax.json` says.
      config: the manifest's.
      tensors: our parameter path -> its arrays.
      layout: `orbax`.
      read_copies: 2: Orbax reads whole chunks and copies them into place.
    """

    path: Path
    manifest: Manifest
    config: GrokConfig
    tensors: Mapping[str, OrbaxTensor]
    layout: str = "orbax"
    read_copies: int = 2

    def read_parts(self, unit: str, wanted: Sequence[Wanted], max_host_bytes: int) -> list[Shards]:
        """Reads parts as `Checkpoint.read_parts` says, all of a unit by one call of Orbax.

        Raises:
          CheckpointError: The unit is missing, damaged, or holds something else.
        """
        targets = {part.name: targets for part, targets in wanted}
        found = read_unit(self.path, self.manifest, unit, targets, max_host_bytes)
        return [found[part.name] for part, _ in wanted]

    def sample(self, part: Part) -> bytes:
        """A few bytes of a part, as `Checkpoint.sample` says: the beginning of the first chunk of each of its arrays.

        Raises:
          CheckpointError: It cannot be read.
        """
        state, sampled = unit_path(self.path, part.unit) / "state", b""
        for leaf, spec in self.manifest.specs[part.parameter].part(part).leaves().items():
            chunk = (state / f"{part.name}.{leaf}" / "c").joinpath(*["0"] * len(spec.shape))
            try:
                with chunk.open("rb") as stream:
                    sampled += stream.read(_SAMPLE_BYTES)
            except OSError as error:
                raise CheckpointError(
                    f"{chunk}: cannot be read ({error.strerror}): restore this folder from a copy or convert again."
                ) from error
        return sampled


def find_orbax(path: str | Path) -> Path | None:
    """`path` if it is a checkpoint of ours, whole or unfinished, else None."""
    folder = Path(path)
    return folder if any((folder / name).exists() for name in (MANIFEST, UNFINISHED)) else None


def open_orbax(path: str | Path) -> OrbaxCheckpoint:
    """Opens the folder that holds `grokjax.json` and checks that all units are there; no array is read.

    Raises:
      CheckpointError: It is not there, unfinished, of a newer format, or damaged.
    """
    folder = Path(path).absolute()
    check_name(folder)
    if find_orbax(folder) is None:
        found = f"a folder without {MANIFEST}" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{path}: {found}: the folder of a checkpoint that grokjax wrote is needed.")
    if not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder / MANIFEST}: the writing of this checkpoint was interrupted: {how_to_go_on(folder)}."
        )
    manifest = read_manifest(folder / MANIFEST)
    check_count(folder, manifest.config, "num_experts", len(unit_names(folder)), f"folders in {WEIGHTS}")
    units = Units(folder, manifest)
    tensors = {parameter: _tensor(units, parameter) for parameter in manifest.specs}
    problems = find_misfits(tensors, parameter_shapes(manifest.config))
    if problems:
        advice = f"Restore {MANIFEST} from a copy or convert again."
        raise CheckpointError(list_problems(folder, problems, advice))
    damaged = _unit_problems(folder, manifest)
    if damaged:
        what, advice = "folders are damaged, missing or surplus", "Restore them from a copy or convert again."
        raise DamageError(list_problems(folder, damaged, advice, what=what))
    return OrbaxCheckpoint(folder, manifest, manifest.config, types.MappingProxyType(tensors))


def _tensor(units: Units, parameter: str) -> OrbaxTensor:
    leaves = units.manifest.specs[parameter].leaves()
    weight, scales = (OrbaxArray(units, parameter, leaf) for leaf in ("weight", "scales"))
    return OrbaxTensor(weight, scales if "scales" in leaves else None)


def _unit_problems(folder: Path, manifest: Manifest) -> list[str]:
    faults = {name: unit_fault(folder, manifest, name) for name in manifest.units}
    problems = [f"{WEIGHTS}/{name}: {fault}" for name, fault in faults.items() if fault is not None]
    return problems + [f"{WEIGHTS}/{name}: surplus" for name in sorted(unit_names(folder) - faults.keys())]
