"""Reads checkpoints of the safetensors format: the public conversions of the release, and what we export.

A checkpoint is opened by reading the headers of its files; an array is read slice by slice. `safetensors_names` says
which tensor is which parameter.
"""

import dataclasses
import itertools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from grokjax.checkpoint.formats.payload import Payload
from grokjax.checkpoint.formats.safetensors_headers import Header, find_safetensors, read_headers
from grokjax.checkpoint.formats.safetensors_names import (
    CONFIG,
    HPCAI,
    INDEX,
    KEYFAN,
    TIED,
    Scheme,
    is_transposed,
    read_config,
)
from grokjax.checkpoint.parameters import Part, parameter_shapes, parts_of
from grokjax.checkpoint.sizes import check_count, recognise
from grokjax.checkpoint.stored import (
    ANOTHER_CONFIG,
    Array,
    ArraySpec,
    CheckpointError,
    Index,
    Shards,
    TensorSpec,
    Wanted,
    list_problems,
    mismatches,
    read_region,
    read_slices,
    sample_rows,
)
from grokjax.config import GrokConfig

_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Of a matrix that is stored the other way round, so much is read at once: from a disk in one go.
STRIPE_ROWS, STRIPE_BYTES = 512, 8 << 20
# Columns that are transposed at once. With the rows of a stripe they stay in the processor's cache, where the numbers
# of a column would displace each other if a row were a multiple of 4 KiB long, as whole rows often are.
BLOCK_COLUMNS = 352


@dataclasses.dataclass(frozen=True)
class SafetensorsArray:
    """A parameter in our orientation: one stored tensor, or the stored matrices of all experts.

    Attributes:
      sources: one, or one for each expert.
      shape: [V, D], [D], [C, O] or [E, C, O].
      dtype: float32 or bfloat16.
      is_transposed: whether the matrices are stored [O, C].
    """

    sources: tuple[Payload, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_transposed: bool

    def read(self, index: Index = ()) -> Array:
        """A region of the array in memory of its own, as `read_into` reads it."""
        return read_region(self, index)

    def read_into(self, out: Array, index: Index = ()) -> None:
        """Reads a region of the array into `out`; besides it, 8 MiB or one stored row is held.

        Raises:
          CheckpointError: A file is no longer the one that was opened, or cannot be read.
        """
        entries = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        bounds = [_bounds(entry, size) for entry, size in zip(entries, self.shape, strict=True)]
        target = out.reshape([len(bound) for bound in bounds])
        if len(self.shape) < 3:
            _fill(target, self.sources[0], bounds, self.is_transposed)
        else:
            for matrix, expert in zip(target, bounds[0], strict=True):
                _fill(matrix, self.sources[expert], bounds[1:], self.is_transposed)


@dataclasses.dataclass(frozen=True)
class SafetensorsTensor:
    """One parameter; never quantised."""

    weight: SafetensorsArray
    scales: None = None


@dataclasses.dataclass(frozen=True)
class SafetensorsCheckpoint:
    """A checkpoint whose tensors all fit its configuration.

    Attributes:
      path: the folder.
      config: the configuration that the tensors were checked against.
      tensors: our parameter path -> its tensor, layers in numeric order.
      layout: `safetensors`.
      read_copies: 1: slices are read into the place where they are used.
    """

    path: Path
    config: GrokConfig
    tensors: Mapping[str, SafetensorsTensor]
    layout: str = "safetensors"
    read_copies: int = 1

    def read_parts(self, unit: str, wanted: Sequence[Wanted], max_host_bytes: int) -> list[Shards]:
        """Reads parts as `Checkpoint.read_parts` says; one slice at a time is in flight, whatever is allowed."""
        return read_slices(self.tensors, wanted)

    def sample(self, part: Part) -> bytes:
        """A few bytes of a part, as `Checkpoint.sample` says."""
        return sample_rows(self.tensors, part)


def open_safetensors(path: str | Path, config: GrokConfig | None = None) -> SafetensorsCheckpoint:
    """Opens a checkpoint and checks names, shapes and dtypes against the configuration; no array is read.

    Args:
      path: the folder of the files (see `find_safetensors`).
      config: what the checkpoint was made with; by default what `config.json` beside the files says, and without that
        file Grok-1's if the shapes are.

    Raises:
      CheckpointError: There is no checkpoint, its configuration is not known, the package `safetensors` is absent, or
        files or tensors are missing, surplus, damaged or of the wrong shape or dtype; all of them are listed.
    """
    folder = find_safetensors(path)
    if folder is None:
        raise CheckpointError(f"{path}: found no *.safetensors files and no {INDEX}: pass the folder that holds them.")
    headers = read_headers(folder)
    scheme = _find_scheme(folder, headers)
    if config is None:
        config = _find_config(folder, scheme, headers)
    for field in ("num_layers", "num_experts"):
        check_count(folder, config, field, len(headers), "tensors in its files")
    tensors: dict[str, SafetensorsTensor] = {}
    problems: list[str] = []
    used = {TIED}
    for parameter, shape in parameter_shapes(config).items():
        names = [scheme.find(part, headers) for part in parts_of(parameter, config)]
        used.update(names)
        sources = tuple(headers[name] for name in names if name in headers)
        faults = [f"{name}: missing" for name in names if name not in headers]
        faults += _faults(sources, parameter, shape)
        problems += faults
        if not faults:
            array = _array(sources, shape, is_transposed(parameter))
            tensors[parameter] = SafetensorsTensor(array)
    problems += [f"{name}: surplus" for name in headers if name not in used]
    problems += _tied_faults(headers, tensors.get("embedding.table"), (config.vocab_size, config.model_dim))
    if problems:
        raise CheckpointError(list_problems(folder, problems, ANOTHER_CONFIG))
    return SafetensorsCheckpoint(folder, config, types.MappingProxyType(tensors))


def _array(sources: Sequence[Header], shape: tuple[int, ...], transposed: bool) -> SafetensorsArray:
    """An array of our `shape` that is stored in one dtype."""
    dtype = _DTYPES[sources[0].dtype]
    payloads = (Payload(source.file, source.start, source.shape, dtype, source.stamp) for source in sources)
    return SafetensorsArray(tuple(payloads), shape, dtype, transposed)


def _bounds(entry: int | slice, size: int) -> range:
    """What an index takes of an axis."""
    if isinstance(entry, slice):
        assert entry.step in (None, 1), "slices of a stored array have no steps"
        return range(size)[entry]
    number = range(size)[entry]
    return range(number, number + 1)


def _fill(target: Array, source: Payload, bounds: Sequence[range], transposed: bool) -> None:
    """Reads a region of one stored tensor into `target`; one to be transposed in stripes of whole stored rows."""
    if not target.size:
        return
    if not transposed:
        source.read_into(target, _slices(bounds))
        return
    columns, rows = bounds
    num_rows = max(1, min(STRIPE_ROWS, STRIPE_BYTES // (len(columns) * target.itemsize)))
    stripe = np.empty((min(num_rows, len(rows)), len(columns)), source.dtype)
    # As plain integers: NumPy copies those faster than bfloat16.
    bits = np.dtype(f"u{target.itemsize}")
    target = target.view(bits)
    for start in range(0, len(rows), num_rows):
        taken = rows[start : start + num_rows]
        source.read_into(stripe[: len(taken)], _slices((taken, columns)))
        numbers = stripe[: len(taken)].view(bits)
        for column in range(0, len(columns), BLOCK_COLUMNS):
            block = numbers[:, column : column + BLOCK_COLUMNS].copy()
            target[column : column + BLOCK_COLUMNS, start : start + num_rows] = block.T


def _slices(bounds: Sequence[range]) -> tuple[slice, ...]:
    return tuple(slice(bound.start, bound.stop) for bound in bounds)


def _find_scheme(folder: Path, headers: Mapping[str, Header]) -> Scheme:
    keyfan, hpcai = (sum(name.startswith(scheme.prefix) for name in headers) for scheme in (KEYFAN, HPCAI))
    if not keyfan and not hpcai:
        raise CheckpointError(
            f"{folder}: holds {', '.join(sorted(headers)[:3]) or 'no tensors'}; names that begin with "
            f"{KEYFAN.prefix} (as in keyfan/grok-1-hf) or {HPCAI.prefix} (as in hpcai-tech/grok-1) are known: "
            "check the path."
        )
    return KEYFAN if keyfan >= hpcai else HPCAI


def _faults(sources: Sequence[Header], parameter: str, shape: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with the stored tensors of one parameter of that `shape`."""
    stored = shape[-2:][::-1] if is_transposed(parameter) else shape
    for source in sources:
        if source.dtype not in _DTYPES:
            yield f"{source.name}: the dtype is {source.dtype}; {' and '.join(_DTYPES)} are allowed: convert it first"
            continue
        spec = TensorSpec(ArraySpec(source.shape, _DTYPES[source.dtype]), None)
        yield from (f"{source.name}: {text}" for text in mismatches(spec, parameter, stored))
    dtypes = sorted({source.dtype for source in sources})
    if len(dtypes) > 1:
        yield f"{parameter}: its experts are stored as {' and '.join(dtypes)}; one dtype for all is allowed"


def _tied_faults(
    headers: Mapping[str, Header], table: SafetensorsTensor | None, shape: tuple[int, int]
) -> Iterator[str]:
    """What is wrong with a second copy of the embedding table; a trained head of its own differs in every row."""
    if TIED not in headers:
        return
    head = headers[TIED]
    if head.shape != shape:
        yield f"{TIED}: the weight has the shape {list(head.shape)}, the embedding {list(shape)}; Grok ties them"
    elif table is not None and head.dtype in _DTYPES:
        copy = _array((head,), shape, transposed=False)
        narrow = min(copy.dtype, table.weight.dtype, key=lambda dtype: dtype.itemsize)
        for row in (0, shape[0] // 2, shape[0] - 1):
            ours, theirs = (array.read((row,)).astype(narrow) for array in (table.weight, copy))
            if ours.tobytes() != theirs.tobytes():
                yield f"{TIED}: row {row} is not that of the embedding; Grok ties them, and this head would be lost"
                return


def _find_config(folder: Path, scheme: Scheme, headers: Mapping[str, Header]) -> GrokConfig:
    if (folder / CONFIG).exists():
        return read_config(folder / CONFIG)
    return recognise(folder, _infer_sizes(folder, scheme, headers), f"put the model's {CONFIG} beside them, or pass")


def _infer_sizes(folder: Path, scheme: Scheme, headers: Mapping[str, Header]) -> dict[str, int]:
    """The sizes that names and shapes tell; numbers of heads only as products with the head size."""
    parameters = ("embedding.table", "layers.0.attention.query", "layers.0.attention.key", "layers.0.feed_forward.gate")
    shapes: list[tuple[int, ...]] = []
    for name in (scheme.name(Part(parameter)) for parameter in parameters):
        shapes.append(headers[name].shape if name in headers else ())
        if len(shapes[-1]) != 2:
            raise CheckpointError(
                f"{folder}: found no matrix {name}, which tells sizes of the model: download the missing files, or put "
                f"the model's {CONFIG} beside them."
            )
    table, query, key, gate = shapes
    of_layer = re.escape(scheme.layer_prefix) + r"(\d{1,6})\."
    layers = {int(found[1]) for name in headers if (found := re.match(of_layer, name))}
    gates = (scheme.name(Part(parameters[-1], expert)) for expert in itertools.count())
    return {
        "vocab_size": table[0],
        "model_dim": table[1],
        "num_layers": max(layers) + 1,
        "num_experts": sum(1 for _ in itertools.takewhile(headers.__contains__, gates)),
        "ffn_dim": gate[0],
        "num_heads*head_dim": query[0],
        "num_kv_heads*head_dim": key[0],
    }
