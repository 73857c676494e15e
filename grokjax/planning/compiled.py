"""Reads what the compiler made of a function: its memory, its collectives, the large values that it holds."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import numpy as np

# Operations that name a value without making one; what a call or a loop makes stands in its own computation.
_VIEWS = frozenset({"bitcast", "call", "conditional", "constant", "get-tuple-element", "parameter", "tuple", "while"})
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_VALUE = re.compile(rf"({'|'.join(_BYTES)})\[([0-9,]+)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")
_TRANSFER = re.compile(rf"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(")
_IN_LOOP = re.compile(r'op_name="[^"]*?/while/body/')
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_NUM_DEVICES = re.compile(r"num_partitions=(\d+)")
# Who takes part in a transfer, in three forms: all numbers, those of a reshaped range, axes of a mesh.
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}")
_RANGE = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]+)\] \{([\w',]+)\}")


@dataclasses.dataclass(frozen=True)
class Value:
    """An array that the program writes to memory: outside of any fusion, so not merely passed between registers.

    Attributes:
      dtype: in the compiler's short form, such as "s8".
      shape: on one device.
      operation: what makes it, such as "copy" or "fusion".
    """

    dtype: str
    shape: tuple[int, ...]
    operation: str

    @property
    def num_bytes(self) -> int:
        """Size on one device."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Collective:
    """An instruction that moves data between devices.

    Attributes:
      kind: such as "all-reduce".
      num_bytes: of its result on one device.
      is_in_loop: whether it stands in the body of the program's outermost loop, which for a model runs once a layer.
      groups: numbers, along the mesh's flat order, of the devices that exchange among themselves.
    """

    kind: str
    num_bytes: int
    is_in_loop: bool
    groups: tuple[tuple[int, ...], ...]

    @property
    def num_devices(self) -> int:
        """How many devices the largest group has."""
        return max(map(len, self.groups))

    def is_between(self, size: int) -> bool:
        """Whether a group has devices of several hosts, if each holds the next `size` of the devices."""
        return any(len({device // size for device in group}) > 1 for group in self.groups)


@dataclasses.dataclass(frozen=True)
class Program:
    """Facts about a compiled function, per device.

    Attributes:
      argument_bytes: of all arguments.
      output_bytes: of all results.
      aliased_bytes: of outputs that reuse the memory of a donated argument.
      temporary_bytes: what the program allocates besides arguments and outputs.
      collectives: how many instructions of each kind stand in the program; one in a loop's body counts once.
      transfers: each of them.
      values: arrays that it writes, loops' bodies counted once, largest first.
    """

    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    collectives: Mapping[str, int]
    transfers: tuple[Collective, ...]
    values: tuple[Value, ...]

    @property
    def peak_bytes(self) -> int:
        """What a device must have free to run it, its arguments included."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes


def read_program(compiled: jax.stages.Compiled) -> Program:
    """The facts about what `jax.jit(f).lower(...).compile()` gave.

    Raises:
      ValueError: The backend tells nothing of its programs.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise ValueError("this backend tells nothing of its programs: compile for a CPU, a GPU or a TPU.")
    values = [value for line in _unfused_lines(text) for value in _values(line)]
    partitions = _NUM_DEVICES.search(text)
    num_devices = 1 if partitions is None else int(partitions[1])
    transfers = tuple(transfer for line in text.splitlines() for transfer in read_transfers(line, num_devices))
    counts = collections.Counter(transfer.kind for transfer in transfers)
    return Program(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        collectives={kind: counts[kind] for kind in _COLLECTIVES},
        transfers=transfers,
        values=tuple(sorted(values, key=lambda value: -value.num_bytes)),
    )


def _unfused_lines(text: str) -> list[str]:
    """The instructions of all computations but the insides of fusions."""
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text))
    lines, inside = [], ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            inside = header[1]
        elif inside not in fused:
            lines.append(line)
    return lines


def _values(line: str) -> list[Value]:
    instruction = _INSTRUCTION.match(line)
    if not instruction or instruction[2] in _VIEWS or instruction[2].endswith("-start"):
        return []  # what an asynchronous operation makes stands at its end
    made, operation = instruction.groups()
    return [Value(dtype, _dimensions(shape), operation) for dtype, shape in _VALUE.findall(made)]


def read_transfers(line: str, num_devices: int) -> list[Collective]:
    """The transfer that a line of a compiled program's text stands for, in any form in which compilers write it.

    Args:
      line: one instruction of the program's text.
      num_devices: on which the program runs.

    Returns:
      One transfer, or none where the instruction moves nothing between devices.
    """
    found = _TRANSFER.match(line)
    if not found:
        return []
    made, kind, is_start = found.groups()
    sizes = [Value(dtype, _dimensions(shape), kind).num_bytes for dtype, shape in _VALUE.findall(made)]
    num_bytes = sum(sizes)
    if is_start and len(sizes) > 1:  # what starts an asynchronous transfer names its operands beside its results
        num_bytes = num_bytes // 2 if kind == "all-reduce" else max(sizes)
    return [Collective(kind, num_bytes, bool(_IN_LOOP.search(line)), _groups(line, num_devices))]


def _groups(line: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices of each group; one of all devices where the line names none."""
    if found := _LISTED.search(line):
        return tuple(_dimensions(group) for group in found[1].strip("{}").split("},{"))
    groups: np.ndarray = np.arange(num_devices).reshape(1, -1)
    if found := _RANGE.search(line):
        shape, reshaped = _dimensions(found[1]), _dimensions(found[2])
        order = _dimensions(found[3]) if found[3] else range(len(reshaped))
        groups = np.arange(math.prod(shape)).reshape(reshaped).transpose(order).reshape(shape)
    elif found := _AXES.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        inside = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[2])]
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        width = math.prod(devices.shape[axis] for axis in inside)
        groups = np.moveaxis(devices, inside, range(-len(inside), 0)).reshape(-1, width)
    return tuple(map(tuple, groups.tolist()))


def _dimensions(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split(","))
