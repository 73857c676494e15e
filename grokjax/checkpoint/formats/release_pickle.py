"""Finds the arrays inside one pickled file of the release, without unpickling it.

A pickle is a program, and `pickle.load` runs it. The files of the release use a small fixed part of that language, so
this module walks the opcodes over symbolic values: globals are names that are compared and never imported, array
payloads are offsets that are skipped and never read. Whatever the release does not use is refused.

Nothing here grows with the file: at most `_MAX_OPCODES` opcodes are read, and texts of at most `_MAX_TEXT` bytes.
"""

import dataclasses
import math
import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np


class PickleFormatError(ValueError):
    """The bytes are not what the release's pickler wrote; the message says where, what and what to do."""


@dataclasses.dataclass(frozen=True)
class ArrayHeader:
    """Where one C-ordered array lies in its file.

    Attributes:
      offset: of the first element, in bytes from the start of the file.
      shape: sizes of the axes, each 1 or more; `shape` and `dtype` account for every byte of the payload.
      dtype: int8, float32 or bfloat16, little-endian.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """The array or arrays of one file; `scales` is None for a plain array."""

    weight: ArrayHeader
    scales: ArrayHeader | None


def parse_tensor(stream: BinaryIO, size: int) -> TensorHeader:
    """Walks one pickle and returns where its arrays are.

    Args:
      stream: seekable binary file, at its start.
      size: length of the file in bytes.

    Raises:
      PickleFormatError: The file is anything but one array or one `QuantizedWeight8bit`, ending with the file.
    """
    return _Walker(stream, size).run()


# A file of the release takes about 130 opcodes; the bound only keeps a hostile file from being walked for hours.
_MAX_OPCODES = 1000
_MAX_TEXT = 255
# The release needs 3 and NumPy can have 64. The sizes' product is printed: Python refuses that beyond 4300 digits.
_MAX_AXES = 8

_QUANTIZED = "__main__.QuantizedWeight8bit"
_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NDARRAY = "numpy.ndarray"
_DTYPE = "numpy.dtype"
_BFLOAT16 = "ml_dtypes.bfloat16"
_ALLOWED_GLOBALS = (_QUANTIZED, *_RECONSTRUCT, _NDARRAY, _DTYPE, _BFLOAT16)

# What `numpy.dtype` is called with -> the byte order that must follow, and the dtype.
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "i1": ("|", np.dtype(np.int8)),
    "f4": ("<", np.dtype(np.float32)),
    _BFLOAT16: ("<", np.dtype(ml_dtypes.bfloat16)),
}

_NAMES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}

_MARK = object()

# Opcodes that differ only in the width of their argument. Protocol 3 uses the wider ones where 4 has a short form.
_LITERALS = {"MARK": _MARK, "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_INTEGERS = {"BININT1": "<B", "BININT2": "<H", "BININT": "<i"}
_TEXTS = {"SHORT_BINUNICODE": "<B", "BINUNICODE": "<I"}
_PAYLOADS = {"SHORT_BINBYTES": "<B", "BINBYTES": "<I", "BINBYTES8": "<Q"}
_GETS = {"BINGET": "<B", "LONG_BINGET": "<I"}
_PUTS = {"BINPUT": "<B", "LONG_BINPUT": "<I"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True)
class _Bytes:
    offset: int
    length: int


@dataclasses.dataclass(eq=False)
class _Dtype:
    code: str
    built: bool = False


@dataclasses.dataclass(eq=False)
class _Array:
    header: ArrayHeader | None = None


@dataclasses.dataclass(eq=False)
class _Quantized:
    header: TensorHeader | None = None


class _Walker:
    """The stack machine: `stack` and `memo` as in pickle, holding symbolic values only."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self._position = 0
        self._opcode_at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> TensorHeader:
        if self._size == 0:
            self._damaged("an empty file", "a pickled array was expected")
        head = self._take(2)
        if head[0] != 0x80 or head[1] not in (3, 4, 5):
            self._damaged(f"the first bytes {head!r}", "a pickle of protocol 4 begins with b'\\x80\\x04'")
        for _ in range(_MAX_OPCODES):
            name = self._opcode()
            if name == "STOP":
                return self._result()
            self._step(name)
        self._foreign(f"no end after {_MAX_OPCODES} opcodes", "the release needs about 130")

    def _step(self, name: str) -> None:
        if name in _LITERALS:
            self._stack.append(_LITERALS[name])
        elif name in _INTEGERS:
            self._stack.append(self._number(_INTEGERS[name]))
        elif name in _TEXTS:
            self._stack.append(self._text(self._number(_TEXTS[name])))
        elif name in _PAYLOADS:
            self._stack.append(self._skip(self._number(_PAYLOADS[name])))
        elif name in _TUPLES:
            self._stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in _GETS:
            self._stack.append(self._recall(self._number(_GETS[name])))
        elif name in _PUTS:
            self._memo[self._number(_PUTS[name])] = self._top()
        elif name in _OPCODES:
            _OPCODES[name](self)
        else:
            self._foreign(f"the opcode {name}", "the release's pickles do without it")

    def _result(self) -> TensorHeader:
        value = self._pop(1)[0]
        if self._stack:
            self._foreign(f"{len(self._stack)} values left over at the end", "one object is allowed")
        if self._position != self._size:
            self._damaged(f"{self._size - self._position} trailing bytes", "a file ends with its pickle")
        if isinstance(value, _Array) and value.header is not None:
            return TensorHeader(value.header, None)
        if isinstance(value, _Quantized) and value.header is not None:
            return value.header
        self._foreign(f"a pickle of {_describe(value)}", "only a numpy.ndarray or QuantizedWeight8bit is allowed")

    # Reading bytes: names and numbers are read, at most _MAX_TEXT bytes at once; payloads are skipped.

    def _take(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) != count:
            self._truncated(count)
        self._position += count
        return data

    def _opcode(self) -> str:
        self._opcode_at = self._position
        code = self._take(1)
        if code not in _NAMES:
            self._damaged(f"the byte {code!r}", "it is no opcode of a pickle")
        return _NAMES[code]

    def _number(self, layout: str) -> int:
        number: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return number

    def _text(self, length: int) -> str:
        if length > _MAX_TEXT:
            self._foreign(f"a text of {length} bytes", f"texts have at most {_MAX_TEXT}")
        # Bytes that are not UTF-8 become U+FFFD, which no allowed name holds.
        return self._take(length).decode("utf-8", "replace")

    def _line(self) -> str:
        data = self._stream.readline(_MAX_TEXT)
        self._position += len(data)
        if not data.endswith(b"\n"):
            self._damaged("a name without an end", f"names are lines of at most {_MAX_TEXT} bytes")
        return data[:-1].decode("utf-8", "replace")

    def _skip(self, length: int) -> _Bytes:
        if length > self._size - self._position:
            self._truncated(length)
        payload = _Bytes(self._position, length)
        self._position += length
        self._stream.seek(self._position)
        return payload

    def _frame(self) -> None:
        # A frame only tells an unpickler how much to fetch at once, which nothing here depends on.
        self._number("<Q")

    # The stack and the memo.

    def _pop(self, count: int) -> list[Any]:
        values = self._stack[-count:]
        if len(values) < count or any(value is _MARK for value in values):
            self._damaged("too few values on the stack", f"this opcode needs {count}")
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        for index in reversed(range(len(self._stack))):
            if self._stack[index] is _MARK:
                values = self._stack[index + 1 :]
                del self._stack[index:]
                return values
        self._damaged("no mark on the stack", "this opcode needs one")

    def _top(self) -> Any:
        value = self._pop(1)[0]
        self._stack.append(value)
        return value

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _recall(self, index: int) -> Any:
        if index not in self._memo:
            self._damaged(f"the memo entry {index}", f"{len(self._memo)} were stored before it")
        return self._memo[index]

    def _set_items(self) -> None:
        items = self._pop_to_mark()
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            self._foreign("items that are not names and values", "only the fields of an object are allowed")
        target.update(zip(items[::2], items[1::2], strict=True))

    # Globals and calls: recognised, never performed.

    def _push_global(self, module: Any, name: Any) -> None:
        named = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else _describe((module, name))
        if named not in _ALLOWED_GLOBALS:
            self._foreign(f"the global {named!r}", f"only {', '.join(_ALLOWED_GLOBALS)} are allowed")
        self._stack.append(_Global(named))

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if isinstance(function, _Global) and function.name in _RECONSTRUCT and _is_empty_array_call(arguments):
            self._stack.append(_Array())
        elif isinstance(function, _Global) and function.name == _DTYPE:
            self._stack.append(_Dtype(self._dtype_code(arguments)))
        else:
            self._foreign(
                f"a call of {_describe(function)} with {_describe(arguments)}",
                "only NumPy's own calls that rebuild an array and a dtype are allowed",
            )

    def _dtype_code(self, arguments: Any) -> str:
        whole = isinstance(arguments, tuple) and len(arguments) == 3 and _are_numbers(arguments[1:])
        first = arguments[0] if whole else arguments
        code = first.name if isinstance(first, _Global) else first
        if not isinstance(code, str) or code not in _DTYPES:
            self._refuse(
                f"the dtype {_describe(first)}",
                f"only {', '.join(_DTYPES)} are allowed",
                "convert the array to one of them",
            )
        return code

    def _new_object(self) -> None:
        cls, arguments = self._pop(2)
        if not (isinstance(cls, _Global) and cls.name == _QUANTIZED and arguments == ()):
            self._foreign(f"a new {_describe(cls)}", f"only {_QUANTIZED} without arguments is allowed")
        self._stack.append(_Quantized())

    def _build(self) -> None:
        target, state = self._pop(2)
        if isinstance(target, _Dtype) and not target.built:
            self._check_dtype_state(target, state)
            target.built = True
        elif isinstance(target, _Array) and target.header is None:
            target.header = self._array_header(state)
        elif isinstance(target, _Quantized) and target.header is None:
            target.header = self._tensor_header(state)
        else:
            self._foreign(f"a state for {_describe(target)}", "an array, dtype or weight takes one state")
        self._stack.append(target)

    def _check_dtype_state(self, dtype: _Dtype, state: Any) -> None:
        order, _ = _DTYPES[dtype.code]
        whole = isinstance(state, tuple) and len(state) == 8 and _are_numbers((state[0], *state[5:]))
        found = state[1] if whole else state
        if found != order or state[2:5] != (None, None, None):
            self._refuse(
                f"the dtype {dtype.code} with byte order {_describe(found)}",
                f"only {order!r} (little-endian, no fields) is allowed",
                "convert the array to it",
            )

    def _array_header(self, state: Any) -> ArrayHeader:
        if not (isinstance(state, tuple) and len(state) == 5 and state[0] == 1):
            self._foreign(f"an array state of {_describe(state)}", "NumPy's version 1 has five entries")
        _, shape, dtype, fortran, payload = state
        axes = shape if isinstance(shape, tuple) and len(shape) <= _MAX_AXES else ()
        if not (axes and all(type(size) is int and size > 0 for size in axes)):
            self._damaged(
                f"the array shape {_describe(shape)}", f"1 to {_MAX_AXES} axes of a size of 1 or more are allowed"
            )
        if not (isinstance(dtype, _Dtype) and dtype.built and isinstance(payload, _Bytes)):
            found = f"an array with {_describe(dtype)} and {_describe(payload)}"
            self._foreign(found, "a whole dtype and raw bytes were expected")
        if fortran is not False:
            self._refuse("an array in Fortran order", "only C order is allowed", "store numpy.ascontiguousarray(array)")
        _, element = _DTYPES[dtype.code]
        expected = math.prod(shape) * element.itemsize
        if payload.length != expected:
            found = f"a payload of {payload.length} bytes for {element.name} {list(shape)}"
            self._damaged(found, f"that takes {expected}")
        return ArrayHeader(payload.offset, shape, element)

    def _tensor_header(self, state: Any) -> TensorHeader:
        fields = state if isinstance(state, dict) else {}
        headers = {name: array.header for name, array in fields.items() if isinstance(array, _Array)}
        weight, scales = headers.get("weight"), headers.get("scales")
        if len(fields) != 2 or weight is None or scales is None:
            self._foreign(
                f"a QuantizedWeight8bit with the state {_describe(state)}",
                "exactly the fields weight and scales, two arrays, are allowed",
            )
        return TensorHeader(weight, scales)

    def _truncated(self, count: int) -> NoReturn:
        """Refuses a file in which so many bytes are not to come."""
        expected = f"by what it says itself it has {self._position + count} bytes or more"
        self._damaged(f"a truncated file of {self._size} bytes", expected)

    def _damaged(self, found: str, allowed: str) -> NoReturn:
        self._refuse(found, allowed, "download the file again and compare its size with the published one")

    def _foreign(self, found: str, allowed: str) -> NoReturn:
        self._refuse(found, allowed, "do not unpickle the file, take it from the published checkpoint instead")

    def _refuse(self, found: str, allowed: str, advice: str) -> NoReturn:
        raise PickleFormatError(f"found {found} at byte {self._opcode_at}; {allowed}: {advice}.")


_OPCODES: dict[str, Callable[[_Walker], None]] = {
    "FRAME": _Walker._frame,
    "TUPLE": lambda walker: walker._stack.append(tuple(walker._pop_to_mark())),
    "MEMOIZE": _Walker._memoize,
    "EMPTY_DICT": lambda walker: walker._stack.append({}),
    "SETITEMS": _Walker._set_items,
    "GLOBAL": lambda walker: walker._push_global(walker._line(), walker._line()),
    "STACK_GLOBAL": lambda walker: walker._push_global(*walker._pop(2)),
    "REDUCE": _Walker._reduce,
    "NEWOBJ": _Walker._new_object,
    "BUILD": _Walker._build,
}


def _is_empty_array_call(arguments: Any) -> bool:
    """Whether these are the arguments `(ndarray, (0,), b'b')` with which NumPy makes an array to be filled."""
    if not (isinstance(arguments, tuple) and len(arguments) == 3):
        return False
    cls, shape, code = arguments
    return isinstance(cls, _Global) and cls.name == _NDARRAY and shape == (0,) and isinstance(code, _Bytes)


def _are_numbers(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int) for value in values)


def _describe(value: Any, depth: int = 1) -> str:
    """Names a symbolic value in bounded space: tuples that each hold the one before twice have an endless repr."""
    if isinstance(value, _Global):
        return value.name
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, tuple | dict) and depth:
        entries = [_describe(entry, depth - 1) for entry in list(value)[:8]]
        return f"{type(value).__name__} of {len(value)} ({', '.join(entries)})"
    return type(value).__name__.strip("_").lower()
