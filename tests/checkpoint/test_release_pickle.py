"""Files that are damaged, foreign or hostile: none is executed, each is refused with a sentence."""

import os
import pickle
import random
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from grokjax.checkpoint import CheckpointError
from grokjax.checkpoint.formats.release import ReleaseTensor, read_tensor
from grokjax.testing import tensor_pickle

# Small enough that every one of their bytes can be damaged in turn.
PAYLOAD = np.arange(6, dtype=np.float32).tobytes()
PLAIN = b"".join(tensor_pickle(np.frombuffer(PAYLOAD, np.float32).reshape(2, 3)))
QUANTIZED = b"".join(tensor_pickle(np.ones((2, 4, 3), np.int8), np.ones((2, 2, 3), ml_dtypes.bfloat16)))


def write_file(folder: Path, data: bytes) -> Path:
    path = folder / "tensor00000_000"
    path.write_bytes(data)
    return path


def layout_of(tensor: ReleaseTensor) -> list[tuple[int, tuple[int, ...], np.dtype[Any]]]:
    payloads = [tensor.weight] if tensor.scales is None else [tensor.weight, tensor.scales]
    return [(payload.offset, payload.shape, payload.dtype) for payload in payloads]


def read_whole(path: Path) -> None:
    """Touches every byte of every array: a wrong offset or length would end the process or raise."""
    tensor = read_tensor(path)
    for payload in (tensor.weight, tensor.scales):
        if payload is not None:
            assert len(payload.array().tobytes()) == payload.num_bytes


class TestMalformedFile:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "found an empty file at byte 0; a pickled array was expected: download the file again and compare"),
            (b"\x93NUMPY\x01\x00", r"found the first bytes b'\\x93N' at byte 0; a pickle of protocol 4 begins with"),
            (b"version https://git-lfs.github.com/spec/v1\n", "found the first bytes b've' at byte 0"),
            (pickle.dumps(np.ones(3), protocol=2), r"found the first bytes b'\\x80\\x02'"),
            (
                PLAIN[:-12],
                "found a truncated file of 161 bytes at byte 142; by what it says itself it has 168 bytes or more: ",
            ),
            (
                PLAIN[:-1],
                "of 172 bytes at byte 172; by what it says itself it has 173 bytes or more: download the file again",
            ),
            (PLAIN + b"\x00" * 7, r"found 7 trailing bytes at byte 172; a file ends with its pickle: download"),
            (
                PLAIN.replace(b"\x89B", b"\x88B").replace(b"\x89C", b"\x88C"),
                "found an array in Fortran order at byte 171; only C",
            ),
            (
                PLAIN.replace(b"K\x02K\x03\x86", b"K\x02K\x02\x86"),
                r"a payload of 24 bytes for float32 \[2, 2\] at .* that takes 16",
            ),
            (
                PLAIN.replace(b"K\x02K\x03\x86", b"K\x00K\x03\x86"),
                r"found the array shape tuple of 2 \(0, 3\).*size of 1 or more",
            ),
            (
                PLAIN.replace(b"K\x02K\x03\x86", b"(" + b"J\xff\xff\xff\x7f" * 500 + b"t"),
                "found the array shape tuple of 500 .*1 to 8 axes",  # a product that Python would not print
            ),
            (
                PLAIN.replace(b"K\x02K\x03\x86", b"(" + b"K\x01" * 63 + b"K\x02K\x03t"),
                "found the array shape tuple of 65 .*1 to 8 axes",  # more than NumPy has
            ),
            (PLAIN.replace(b"K\x02K\x03\x86", b"K\x02\x88\x86"), r"found the array shape tuple of 2 \(2, True\)"),
            (
                b"\x80\x04" + b"N" * 2000 + b".",
                "found no end after 1000 opcodes at byte 1001; the release needs about 130",
            ),
            (
                PLAIN.replace(b"(K\x01K\x02", b"(K\x02K\x02"),
                r"found an array state of tuple of 5 \(2, tuple, dtype, False",
            ),
            (PLAIN.replace(b"C\x18" + PAYLOAD, b"N"), "found an array with dtype and None at byte .* raw bytes were"),
            (b"\x80\x04NN.", "found 1 values left over at the end"),
            (b"\x80\x04N.", "found a pickle of None at byte 3; only a numpy.ndarray or QuantizedWeight8bit is allowed"),
            (b"\x80\x04.", "found too few values on the stack at byte 2; this opcode needs 1"),
            (b"\x80\x04t.", "found no mark on the stack at byte 2; this opcode needs one"),
            (b"\x80\x04h\x07.", "found the memo entry 7 at byte 2; 0 were stored before it"),
            (b"\x80\x04\xff.", r"found the byte b'\\xff' at byte 2; it is no opcode"),
            (
                b"\x80\x04G\x00\x00\x00\x00\x00\x00\x00\x00.",
                "found the opcode BINFLOAT at byte 2; the release's pickles do",
            ),
            (
                b"\x80\x04X\x00\x01\x00\x00" + b"a" * 256 + b".",
                "found a text of 256 bytes at byte 2; texts have at most 255",
            ),
            (b"\x80\x04cnumpy", "found a name without an end at byte 2; names are lines of at most 255 bytes"),
            (
                b"\x80\x04}(K\x01Nu.",
                "found items that are not names and values at byte 7; only the fields of an object",
            ),
            (b"\x80\x04NNR.", "found a call of None with None at byte 4; only NumPy's own calls"),
            (b"\x80\x04NNb.", "found a state for None at byte 4; an array, dtype or weight takes one state"),
            (
                b"\x80\x04cnumpy\nndarray\n)\x81.",
                "found a new numpy.ndarray at byte 18; only __main__.QuantizedWeight8bit",
            ),
        ],
    )
    def test_refused_with_what_was_found_and_where(self, tmp_path: Path, data: bytes, message: str) -> None:
        path = write_file(tmp_path, data)
        with pytest.raises(CheckpointError, match=message) as error:
            read_tensor(path)
        assert str(error.value).startswith(f"{path}: found ")

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (
                np.ones(3),
                "found the dtype 'f8' at byte .*; only i1, f4, ml_dtypes.bfloat16 are allowed: convert the array",
            ),
            (np.ones(3, ">f4"), r"found the dtype f4 with byte order '>' at byte .*; only '<' \(little-endian"),
            (
                np.ones((2, 3), np.float32, order="F"),
                "found an array in Fortran order .*: store numpy.ascontiguousarray",
            ),
            (np.array([{}, None], dtype=object), "found the dtype 'O8'"),
            (np.ones((), np.float32), r"found the array shape tuple of 0 \(\)"),
            (np.ones((0, 3), np.float32), r"found the array shape tuple of 2 \(0, 3\)"),
            (np.float32(1), "found the global 'numpy._core.multiarray.scalar'"),
            ([np.ones(3, np.float32)], "found the opcode EMPTY_LIST"),
        ],
    )
    def test_foreign_array_is_refused(self, tmp_path: Path, array: Any, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            read_tensor(write_file(tmp_path, pickle.dumps(array, protocol=4)))

    @pytest.mark.parametrize("protocol", [3, 4])
    def test_arrays_pickled_by_this_numpy_are_read(self, tmp_path: Path, protocol: int) -> None:
        array = np.arange(24, dtype=np.int8).reshape(2, 3, 4)
        tensor = read_tensor(write_file(tmp_path, pickle.dumps(array, protocol=protocol)))
        assert tensor.weight.dtype == np.int8
        assert tensor.weight.array().tolist() == array.tolist()

    def test_protocol_5_arrays_have_another_structure(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"found the global 'numpy\._core\.numeric\._frombuffer'"):
            read_tensor(write_file(tmp_path, pickle.dumps(np.ones(3, np.float32), protocol=5)))

    def test_other_fields_of_a_quantised_weight_are_refused(self, tmp_path: Path) -> None:
        path = write_file(tmp_path, QUANTIZED.replace(b"\x06scales", b"\x06scaled"))
        with pytest.raises(
            CheckpointError, match=r"QuantizedWeight8bit with the state dict of 2 \('weight', 'scaled'\)"
        ):
            read_tensor(path)

    def test_what_is_not_a_file_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for name in ("pipe", "absent", "."):
            with pytest.raises(CheckpointError, match="not a file; a file of the release is needed: check the path"):
                read_tensor(tmp_path / name)

    def test_unreadable_file_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_file(tmp_path, PLAIN)

        def deny(*_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", deny)
        with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\): check its permissions"):
            read_tensor(path)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


class TestHostileFile:
    @pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
    def test_foreign_global_is_never_called(self, tmp_path: Path, protocol: int) -> None:
        trap = tmp_path / "trap"
        path = write_file(tmp_path, pickle.dumps(Evil(trap), protocol=protocol))
        expected = (
            "found the global 'posix.mkdir' at byte .*; only .* are allowed: do not unpickle the file, take it from"
        )
        with pytest.raises(CheckpointError, match=expected if protocol > 2 else "found the first bytes"):
            read_tensor(path)
        assert not trap.exists()
        with path.open("rb") as stream:
            pickle.load(stream)
        assert trap.exists(), "the file must be one that does harm"

    def test_foreign_global_behind_an_array_is_not_called(self, tmp_path: Path) -> None:
        trap = tmp_path / "trap"
        data = PLAIN[:-1] + pickle.dumps(Evil(trap), protocol=4)[11:]
        with pytest.raises(CheckpointError, match=r"found the global 'posix.mkdir'"):
            read_tensor(write_file(tmp_path, data))
        assert not trap.exists()

    @pytest.mark.parametrize(
        "name", ["numpy.load", "numpy.core.multiarray.fromfile", "__main__.QuantizedWeight8bit.x", "ml_dtypes.int4"]
    )
    def test_neighbours_of_allowed_globals_are_refused(self, tmp_path: Path, name: str) -> None:
        module, _, attribute = name.rpartition(".")
        path = write_file(tmp_path, b"\x80\x04c" + f"{module}\n{attribute}\n".encode() + b".")
        with pytest.raises(CheckpointError, match=re.escape(f"found the global '{name}'")):
            read_tensor(path)

    @pytest.mark.parametrize(
        "opcode", [b"\x8e" + struct.pack("<Q", 2**62), b"\x8e" + b"\xff" * 8, b"B" + b"\xff" * 4, b"X" + b"\xff" * 4]
    )
    def test_declared_length_is_not_allocated(self, tmp_path: Path, opcode: bytes) -> None:
        start = PLAIN.index(b"C\x18")
        path = write_file(tmp_path, PLAIN[:start] + opcode + b"data")
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=r"it has \d{10,} bytes or more|found a text of 4294967295 bytes"):
                read_tensor(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2**18

    def test_tuples_that_double_are_described_briefly(self, tmp_path: Path) -> None:
        doubling = b"".join(b"\x94h" + bytes([n]) + b"\x86" for n in range(250))
        with pytest.raises(CheckpointError, match=r"found a pickle of tuple of 2 \(tuple, tuple\)"):
            read_tensor(write_file(tmp_path, b"\x80\x04N" + doubling + b"."))

    def test_array_within_itself_is_refused(self, tmp_path: Path) -> None:
        # The array's own memo entry stands where its shape should.
        path = write_file(tmp_path, PLAIN.replace(b"K\x02K\x03\x86\x94", b"h\x09"))
        with pytest.raises(CheckpointError, match="found the array shape array at byte"):
            read_tensor(path)

    @pytest.mark.parametrize("data", [PLAIN, QUANTIZED], ids=["plain", "quantised"])
    def test_every_truncation_is_refused(self, tmp_path: Path, data: bytes) -> None:
        for length in range(len(data)):
            with pytest.raises(CheckpointError, match=r"truncated|empty|name without"):
                read_tensor(write_file(tmp_path, data[:length]))

    @pytest.mark.parametrize("data", [PLAIN, QUANTIZED], ids=["plain", "quantised"])
    def test_every_flipped_bit_is_refused_or_changes_values_only(self, tmp_path: Path, data: bytes) -> None:
        expected = layout_of(read_tensor(write_file(tmp_path, data)))
        for position in range(8 * len(data)):
            mutated = bytearray(data)
            mutated[position // 8] ^= 1 << position % 8
            self.check(write_file(tmp_path, bytes(mutated)), expected)

    @pytest.mark.parametrize("seed", range(4))
    def test_seeded_mutations_never_lead_out_of_the_file(self, tmp_path: Path, seed: int) -> None:
        draw = random.Random(seed)
        expected = layout_of(read_tensor(write_file(tmp_path, QUANTIZED)))
        for _ in range(150):
            mutated = bytearray(QUANTIZED)
            for _ in range(draw.randint(1, 4)):
                start, end = sorted(draw.choices(range(len(mutated)), k=2))
                piece = mutated[start : min(end, start + 12)]
                place = draw.randrange(len(mutated))
                mutated[place : place + draw.choice([0, len(piece)])] = piece
            try:
                found = layout_of(read_tensor(write_file(tmp_path, bytes(mutated))))
            except CheckpointError:
                continue
            # Pieces may move payloads, but never past the end, and arrays stay arrays of allowed dtypes.
            assert [(shape, dtype) for _, shape, dtype in found] == [(shape, dtype) for _, shape, dtype in expected]
            read_whole(tmp_path / "tensor00000_000")

    def check(self, path: Path, expected: list[Any]) -> None:
        try:
            found = layout_of(read_tensor(path))
        except CheckpointError:
            return
        assert found == expected
        read_whole(path)
