"""Writes small random checkpoints in the release's on-disk format, for tests and examples.

The pickle is written opcode by opcode. `pickle` itself could not: it refuses to name a class that `__main__` does not
hold, and NumPy 2 calls its own module by a newer name than the released files do.
"""

import dataclasses
import math
import reprlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from grokjax.checkpoint import open_itself, parameter_names, parameter_shapes
from grokjax.config import GrokConfig

Array = np.ndarray[Any, np.dtype[Any]]


class WrittenTensor(NamedTuple):
    """What one file holds: a plain weight, or int8 [..., C, O] with scales [..., Q, O]."""

    weight: Array
    scales: Array | None = None

    def dequantised(self) -> Array:
        """The values that the file stands for, float32, in the shape of the weight."""
        weight = self.weight.astype(np.float32)
        if self.scales is None:
            return weight
        *lead, rows, outputs = weight.shape
        blocks = weight.reshape(*lead, self.scales.shape[-2], -1, outputs)
        return (blocks * self.scales.astype(np.float32)[..., :, None, :]).reshape(*lead, rows, outputs)


def write_release_checkpoint(
    directory: str | Path,
    config: GrokConfig,
    *,
    seed: int = 0,
    scale_blocks: int = 1,
    scale_dtype: str = "bfloat16",
    quantized: bool = True,
    weights: Mapping[str, Array | tuple[Array, Array]] | None = None,
) -> dict[str, WrittenTensor]:
    """Writes a random checkpoint in the release's format; activations and logits stay of order 1.

    Args:
      directory: made if absent; the files `tensorNNNNN_000` go straight into it.
      config: the sizes.
      seed: each file has a stream of its own, so replacing one tensor changes no other.
      scale_blocks: Q of the projections back to D (`attention.output`, `feed_forward.down`), as in the release; the
        other weights have one block.
      scale_dtype: `bfloat16`, as in the release, or `float32`.
      quantized: whether the projections are int8 with scales; otherwise they are float32.
      weights: our parameter path -> what to write instead: an array, or int8 weight and scales.

    Returns:
      Our parameter path -> what its file holds, in the order of the files.

    Raises:
      ValueError: `scale_blocks` does not divide N*H and F, `scale_dtype` is neither of the two, or `weights` names an
        unknown parameter.
    """
    given = weights or {}
    names, shapes = parameter_names(config), parameter_shapes(config)
    unknown = sorted(set(given) - set(shapes))
    if unknown:
        raise ValueError(
            f"weights has the unknown parameters {unknown}: docs/model.md lists them; layers.0 is the first layer."
        )
    layout = _check_layout(config, _Layout(quantized, scale_blocks, scale_dtype))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written: dict[str, WrittenTensor] = {}
    for number, (file, parameter) in enumerate(names.items()):
        if parameter in given:
            value = given[parameter]
            written[parameter] = WrittenTensor(*value) if isinstance(value, tuple) else WrittenTensor(value)
        else:
            rng = np.random.default_rng([seed, number])
            written[parameter] = _draw(rng, parameter, shapes[parameter], layout, config)
        write_tensor(directory / file, *written[parameter])
    return written


def write_tensor(path: str | Path, weight: Array, scales: Array | None = None) -> None:
    """Writes one file of the release: a plain array, or a `QuantizedWeight8bit`.

    Args:
      path: of the file; what is there is overwritten, but no link is followed.
      weight: int8 [..., C, O] with scales; without, float32 or bfloat16 of any shape.
      scales: float32 or bfloat16 [..., Q, O], None for a plain array.
    """
    with open(path, "wb", opener=open_itself) as stream:
        for part in tensor_pickle(weight, scales):
            stream.write(part)


def tensor_pickle(weight: Array, scales: Array | None = None) -> list[bytes | memoryview]:
    """The bytes of one file, byte for byte what CPython's pickler wrote for the release.

    Args:
      weight: int8, float32 or bfloat16, stored in C order.
      scales: of a `QuantizedWeight8bit`, None for a plain array.

    Returns:
      The file in parts, so that no payload of 64 KiB or more is copied: those are memory views.
    """
    pickler = _Pickler()
    pickler.write(b"\x80\x04")
    pickler.start_frame()
    if scales is None:
        pickler.save(_array_call(weight))
    else:
        fields = {"weight": _array_call(weight), "scales": _array_call(scales)}
        pickler.save(_Object(_Global("__main__", "QuantizedWeight8bit"), fields))
    pickler.write(b".")
    pickler.end_frame()
    return pickler.parts


_SCALE_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class _Layout:
    quantized: bool
    scale_blocks: int
    scale_dtype: str


def _check_layout(config: GrokConfig, layout: _Layout) -> _Layout:
    rows = (config.num_heads * config.head_dim, config.ffn_dim)
    blocks = layout.scale_blocks
    if blocks < 1 or any(size % blocks for size in rows):
        raise ValueError(
            f"scale_blocks={reprlib.repr(blocks)} does not divide N*H={rows[0]} and F={rows[1]}: choose a divisor."
        )
    if layout.scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"scale_dtype={layout.scale_dtype!r} is unknown: choose one of {list(_SCALE_DTYPES)}.")
    return layout


def _draw(
    rng: np.random.Generator, parameter: str, shape: tuple[int, ...], layout: _Layout, config: GrokConfig
) -> WrittenTensor:
    if len(shape) == 1:
        return WrittenTensor(rng.uniform(0.5, 1.5, shape).astype(np.float32))
    if parameter == "embedding.table":
        # Normalised features against these rows give logits of standard deviation 2 after the output multiplier.
        std = 2 / (math.sqrt(config.model_dim) * config.output_multiplier)
        return WrittenTensor((std * rng.standard_normal(shape)).astype(np.float32))
    std = 1 / math.sqrt(shape[-2])
    if not layout.quantized or parameter.endswith("router"):
        return WrittenTensor((std * rng.standard_normal(shape)).astype(np.float32))
    blocks = layout.scale_blocks if parameter.endswith(("output", "down")) else 1
    weight = rng.integers(-127, 128, shape, dtype=np.int8)
    # 73.6 is the standard deviation of integers drawn evenly from -127 to 127. Scales that differ by up to 3 make a
    # scale that is taken from the wrong block or column visible.
    scales = std / 73.6 * rng.uniform(0.5, 1.5, (*shape[:-2], blocks, shape[-1]))
    return WrittenTensor(weight, scales.astype(_SCALE_DTYPES[layout.scale_dtype]))


# The pickler. Values are None, bool, int, str, bytes, tuples, and these:


@dataclasses.dataclass(frozen=True)
class _Global:
    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call whose result is then given a state; `key` tells results apart that pickle would write only once."""

    function: _Global
    arguments: tuple[Any, ...]
    state: tuple[Any, ...]
    key: str | None = None


@dataclasses.dataclass(frozen=True)
class _Object:
    cls: _Global
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Payload:
    data: memoryview


def _array_call(array: Array) -> _Call:
    data = np.ascontiguousarray(array)
    state = (1, array.shape, _dtype_call(array.dtype), False, _Payload(data.reshape(-1).view(np.uint8).data))
    reconstruct = _Global("numpy.core.multiarray", "_reconstruct")
    return _Call(reconstruct, (_Global("numpy", "ndarray"), (0,), b"b"), state)


def _dtype_call(dtype: np.dtype[Any]) -> _Call:
    none = (None, None, None)
    code, state = {
        "int8": ("i1", (3, "|", *none, -1, -1, 0)),
        "float32": ("f4", (3, "<", *none, -1, -1, 0)),
        # Source: ml_dtypes; a dtype from outside NumPy carries its size, alignment and flags.
        "bfloat16": (_Global("ml_dtypes", "bfloat16"), (3, "<", *none, 2, 2, 64)),
    }[dtype.name]
    return _Call(_Global("numpy", "dtype"), (code, False, True), state, key=dtype.name)


# Source: CPython, Modules/_pickle.c: frames end at the first value after this many bytes, and payloads of at least
# this size stand between frames.
_FRAME_SIZE = 64 * 1024
_SMALLEST_FRAME = 4  # less is written without a frame


class _Pickler:
    """The part of pickle protocol 4 that the release's files use: memo, frames and all."""

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self._frame: bytearray | None = None
        self._memo: dict[Any, int] = {}
        self._memo_size = 0

    def start_frame(self) -> None:
        self._frame = bytearray()

    def end_frame(self) -> None:
        frame, self._frame = self._frame or b"", None
        if len(frame) >= _SMALLEST_FRAME:
            self.parts.append(b"\x95" + struct.pack("<Q", len(frame)))
        self.parts.append(bytes(frame))

    def write(self, data: bytes | memoryview) -> None:
        if self._frame is None:
            self.parts.append(data)
        else:
            self._frame += data

    def save(self, value: Any) -> None:
        """Writes one value, or the number under which the memo already has it."""
        if self._frame is not None and len(self._frame) >= _FRAME_SIZE:
            self.end_frame()
            self.start_frame()
        key = value.key if isinstance(value, _Call) else value
        memoized = key is not None and isinstance(value, str | bytes | _Global | _Call)
        if memoized and (type(value), key) in self._memo:
            self.write(b"h" + struct.pack("<B", self._memo[type(value), key]))
            return
        self._save_new(value, (type(value), key) if memoized else None)

    def _save_new(self, value: Any, key: Any) -> None:
        match value:
            case None | True | False:
                self.write({None: b"N", True: b"\x88", False: b"\x89"}[value])
            case int():
                self._save_int(value)
            case str():
                data = value.encode()
                self.write(b"\x8c" + struct.pack("<B", len(data)) + data)
                self._memoize(key)
            case bytes():
                self.write(b"C" + struct.pack("<B", len(value)) + value)
                self._memoize(key)
            case _Payload():
                self._save_payload(value.data)
            case tuple():
                self._save_tuple(value)
            case _Global():
                self.save(value.module)
                self.save(value.name)
                self.write(b"\x93")
                self._memoize(key)
            case _Call():
                self.save(value.function)
                self.save(value.arguments)
                self.write(b"R")
                self._memoize(key)
                self.save(value.state)
                self.write(b"b")
            case _Object():
                self._save_object(value)

    def _save_int(self, value: int) -> None:
        if 0 <= value < 2**8:
            self.write(b"K" + struct.pack("<B", value))
        elif 0 <= value < 2**16:
            self.write(b"M" + struct.pack("<H", value))
        else:
            self.write(b"J" + struct.pack("<i", value))

    def _save_payload(self, data: memoryview) -> None:
        size = data.nbytes
        head = b"C" + struct.pack("<B", size) if size < 2**8 else b"B" + struct.pack("<I", size)
        if size < _FRAME_SIZE:
            self.write(head)
            self.write(data)
        else:
            self.end_frame()
            self.write(head)
            self.write(data)
            self.start_frame()
        self._memoize(None)

    def _save_tuple(self, value: tuple[Any, ...]) -> None:
        short = {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(value))
        if short is None:
            self.write(b"(")
        for entry in value:
            self.save(entry)
        self.write(short or b"t")
        self._memoize(None)

    def _save_object(self, value: _Object) -> None:
        self.save(value.cls)
        self.write(b")\x81")
        self._memoize(None)
        self.write(b"}")
        self._memoize(None)
        self.write(b"(")
        for name, entry in value.fields.items():
            self.save(name)
            self.save(entry)
        self.write(b"ub")

    def _memoize(self, key: Any) -> None:
        self.write(b"\x94")
        if key is not None:
            self._memo[key] = self._memo_size
        self._memo_size += 1
