"""Fuzzes the reader of the release's files: whatever the bytes, an answer or a sentence, and nothing else happens.

    python tests/fuzz_release.py --inputs 25000 --seed 0
    python tests/fuzz_release.py --input FILE

Valid files of every kind are cut into their opcodes, and mutations rearrange, rewrite and replace those. Hypothesis
draws which, and once an input fails it looks for a smaller one. `check` says what must not happen.
"""

# ruff: noqa: T201 (its output is its work)

import argparse
import contextlib
import dataclasses
import faulthandler
import gc
import itertools
import mmap  # noqa: F401 (NumPy imports it with its first map, which is no import by the reader)
import pickle
import pickletools
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import hypothesis
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from grokjax.checkpoint.formats import release
from grokjax.testing import tensor_pickle

# The valid files, each cut into pieces: an opcode with its argument, or what mutations left of it.
Pieces = list[bytes]


def cut(data: bytes) -> Pieces:
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in itertools.pairwise([*starts, len(data)])]


def written_files() -> list[bytes]:
    """What the release's pickler wrote: each kind, lengths of each width, and a payload outside of its frames."""
    bfloat16, small = ml_dtypes.bfloat16, np.ones((2, 4, 3), np.int8)
    plain = [np.ones((2, 3), np.float32), np.ones(300, np.float32), np.ones((4, 5), bfloat16), small]
    quantized = [(small, np.ones((2, 2, 3), dtype)) for dtype in (np.float32, bfloat16)]
    quantized += [(np.ones((2, 260, 130), np.int8), np.ones((2, 1, 130), bfloat16))]
    return [b"".join(tensor_pickle(*arrays)) for arrays in [*zip(plain), *quantized]]


def pickled_files() -> list[bytes]:
    """What Python's pickler and this NumPy write."""
    quantized = type("QuantizedWeight8bit", (), {"__module__": "__main__"})
    # Every second column: an array with gaps keeps, in protocol 5, the structure of the earlier protocols.
    arrays = {dtype: np.ones((4, 6), dtype)[:, ::2] for dtype in ("int8", "float32", ml_dtypes.bfloat16)}
    weight = quantized()
    weight.weight, weight.scales = arrays["int8"], arrays["float32"]
    files = itertools.product([*arrays.values(), weight], (3, 4, 5))
    with mock.patch.object(sys.modules["__main__"], "QuantizedWeight8bit", quantized, create=True):
        return [pickle.dumps(value, protocol) for value, protocol in files]


VALID_FILES = [*written_files(), *pickled_files()]
# The last is refused as it is, for its structure; what mutations make of it is refused elsewhere.
ORIGINALS = [cut(data) for data in [*VALID_FILES, pickle.dumps(np.ones((2, 3), np.float32), protocol=5)]]

# Mutations of bytes and of whole pieces.


def choose(draw: random.Random, pieces: Pieces, opcodes: Sequence[bytes]) -> int:
    """A piece with one of these opcodes; any piece if there is none."""
    found = [index for index, piece in enumerate(pieces) if piece[:1] in opcodes]
    return draw.choice(found or range(len(pieces)))


def rewrite(pieces: Pieces, index: int, piece: bytes) -> Pieces:
    return [*pieces[:index], piece, *pieces[index + 1 :]]


def insert(draw: random.Random, pieces: Pieces, piece: bytes) -> Pieces:
    index = draw.randint(0, len(pieces))
    return [*pieces[:index], piece, *pieces[index:]]


def choose_byte(draw: random.Random, pieces: Pieces) -> tuple[int, int]:
    """A piece and a place in it, mostly in its opcode and length: payloads are long and say little."""
    index = draw.randrange(len(pieces))
    length = len(pieces[index])
    return index, draw.randrange(length if draw.random() < 0.2 else min(length, 9))


def change_bytes(draw: random.Random, pieces: Pieces) -> Pieces:
    """Flips a bit, or writes other bytes over one or two, or between them."""
    index, place = choose_byte(draw, pieces)
    piece = pieces[index]
    flipped = bytes([piece[place] ^ 1 << draw.randrange(8)])
    more = draw.choice([flipped, flipped, b"\0", b"\xff", draw.randbytes(1), draw.randbytes(8)])
    return rewrite(pieces, index, piece[:place] + more + piece[place + draw.choice([0, 1, 1, 1, 2]) :])


def cut_out(draw: random.Random, pieces: Pieces) -> Pieces:
    """Leaves out a few pieces or all that follow, from the middle of one on."""
    index, place = choose_byte(draw, pieces)
    return [*pieces[:index], pieces[index][:place], *pieces[index + draw.choice([1, 1, 2, 6, 12, len(pieces)]) :]]


def copy_span(draw: random.Random, pieces: Pieces) -> Pieces:
    start = draw.randrange(len(pieces))
    return insert(draw, pieces, b"".join(pieces[start : start + draw.randint(1, 12)]) * draw.choice([1, 1, 2, 30]))


def splice(draw: random.Random, pieces: Pieces) -> Pieces:
    other = draw.choice(ORIGINALS)
    return pieces[: draw.randint(0, len(pieces))] + other[draw.randrange(len(other)) :]


def replace_opcode(draw: random.Random, pieces: Pieces) -> Pieces:
    index = draw.randrange(len(pieces))
    return rewrite(pieces, index, draw.choice(pickletools.opcodes).code.encode("latin-1") + pieces[index][1:])


# Opcode -> width of the length, or of the number of a memo entry, that follows.
WIDTHS = {b"\x8c": 1, b"X": 4, b"\x8d": 8, b"C": 1, b"B": 4, b"\x8e": 8, b"\x96": 8, b"\x95": 8}
WIDTHS |= {b"\x8b": 4, b"h": 1, b"j": 4, b"q": 1, b"r": 4}
EXTREMES = [0, 1, 2**8 - 1, 2**8, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = [b"K\0", b"K\1", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"J\0\0\0\x80"]
NUMBERS += [b"\x88", b"\x8a\x08" + b"\x7f" * 8, b"\x8a\xff" + b"\x7f" * 255, b"G" + b"\x7f" * 8]
INTEGERS = (b"K", b"M", b"J")
RANKS = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


def replace_length(draw: random.Random, pieces: Pieces) -> Pieces:
    """Puts another length before the same bytes, or the right one into a field of another width."""
    index = choose(draw, pieces, list(WIDTHS))
    body = pieces[index][1 + WIDTHS.get(pieces[index][:1], 0) :]
    code, width = draw.choice(list(WIDTHS.items()))
    length = draw.choice([*EXTREMES, len(body), len(body), len(body) + 1]) % 256**width
    return rewrite(pieces, index, code + length.to_bytes(width, "little") + body)


def replace_shape(draw: random.Random, pieces: Pieces) -> Pieces:
    """Gives an array many axes of 1 besides its own, or up to 800 axes of any size."""
    found = [i for i, piece in enumerate(pieces) if piece in RANKS and pieces[i - 1][:1] in INTEGERS]
    end = draw.choice(found or range(len(pieces)))
    start = max(end - RANKS.get(pieces[end], 0), 0)
    count = draw.choice([0, 1, 2, 29, 61, 62, 63, 64, 65, 400, 500, 800])
    axes = draw.choice([[*pieces[start:end], b"K\1" * count], [draw.choice(NUMBERS) * count]])
    return [*pieces[:start], b"(", *draw.sample(axes, len(axes)), b"t", *pieces[end + 1 :]]


# What a hostile hand would put in.
def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def call(module: str, name: str, *arguments: str) -> list[bytes]:
    """A call in every spelling that pickle has."""
    texts, line = b"".join(map(text, arguments)), f"{module}\n{name}\n".encode()
    named = text(module) + text(name) + b"\x93"
    return [b"c" + line + b"(" + texts + b"tR", named + b"(" + texts + b"tR", b"(" + texts + b"i" + line]


# Each makes a file or folder where it runs.
TRAPS = [
    *call("posix", "mkdir", "trap"),
    *call("posix", "system", ": > trap"),
    *call("builtins", "eval", "open('trap', 'w').close()"),
    *call("builtins", "exec", "open('trap', 'w').close()"),
    *call("os", "makedirs", "trap"),
]
IMPORTS = [b"cthis\ns\n", text("this") + text("s") + b"\x93", b"cnumpy\nload\n", b"\x82\1"]
NAMES = ["__main__", "QuantizedWeight8bit", "numpy", "numpy.core.multiarray", "_reconstruct", "ndarray", "dtype"]
NAMES += ["ml_dtypes", "bfloat16", "weight", "scales", "i1", "f4", "O8", "<", ">", "|", "", "\n", "\0", "posix"]
# Values within values, to a depth or number that a careless reader recurses into or doubles with.
DEPTHS = (10, 300, 900, 5000)
PAIRS = [(b"(", b""), (b"(", b"t"), (b")", b"\x85"), (b"]", b"a"), (b"}\x94", b"(X\0\0\0\0h\0u")]
NESTS = [start * depth + end * depth for start, end in PAIRS for depth in DEPTHS]
NESTS += [b"N" + b"".join(b"\x94h" + bytes([n % 256]) + b"\x86" for n in range(depth // 3)) for depth in DEPTHS]
MEMOS = [code + (size % 2**32).to_bytes(4, "little") for code in (b"r", b"j", b"Nr") for size in EXTREMES]
MEMOS += [b"\x94" * 900, b"p99\n", b"g99\n"]
# Texts, numbers and names that go on and on, with a length before them or without an end.
STARTS = [b"X\xff\0\0\0", b"X\xff\xff\xff\xff", b"\x8c\xff", b"c", b"cnumpy\n", b"V", b"I", b"L", b"F", b"S", b"p"]
UNITS = [unit * count for unit in (b"a", b"9", b"\n", b"\xf0\x9f\xa6\x8a") for count in (63, 64, 255, 256, 15_000)]
ENDLESS = [start + unit for start in STARTS for unit in UNITS]
HOSTILE = [TRAPS, IMPORTS, NESTS, MEMOS, ENDLESS, [b"\x95" + size.to_bytes(8, "little") for size in EXTREMES]]
# Opcodes -> what may come in the place of one of them and its argument.
SUBSTITUTES = [((b"X", b"\x8c"), [text(name) for name in NAMES]), ((b"c", b"\x93"), TRAPS + IMPORTS)]
SUBSTITUTES += [(INTEGERS, NUMBERS), ((b"\x88", b"\x89", b"N", b")"), [b"\x88", b"\x89", b"N", b")", b"}"])]


def insert_hostile(draw: random.Random, pieces: Pieces) -> Pieces:
    return insert(draw, pieces, draw.choice(draw.choice(HOSTILE)))


def substitute(draw: random.Random, pieces: Pieces) -> Pieces:
    opcodes, others = draw.choice(SUBSTITUTES)
    return rewrite(pieces, choose(draw, pieces, opcodes), draw.choice(others))


# Those that leave most of the file as it was come more often: the rest seldom gets past its first opcodes.
MUTATIONS = [change_bytes, change_bytes, substitute, substitute, replace_opcode, replace_length, replace_shape]
MUTATIONS += [cut_out, cut_out, copy_span, splice, insert_hostile]


def mutate(pieces: Pieces, numbers: Sequence[int]) -> bytes:
    """The file after a mutation for each number, which stands for all that it chooses; none beyond 256 KiB."""
    for number in numbers:
        draw = random.Random(number)
        if 0 < sum(map(len, pieces)) < 2**18:
            pieces = [piece for piece in draw.choice(MUTATIONS)(draw, pieces) if piece]
    return b"".join(pieces)


# The reader, watched.

FILE_NAME = "tensor00000_000"
MOST_SECONDS = 1.0  # of this thread's own time, which other work on the machine does not lengthen
HANG_SECONDS = 10.0
ALLOWANCE = 2**20  # bytes that reading may hold at once beyond the size of the file


class ViolationError(Exception):
    """The reader did what it must not."""


class Hang(BaseException):
    """The time is up. Not an `Exception`, nor a TimeoutError, which is an OSError: the reader may catch those."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The kind of message that refused an input, None if none did; seconds; bytes held beyond the size of the file."""

    refusal: str | None
    seconds: float
    excess: int


@contextlib.contextmanager
def confined(folder: Path) -> Iterator[None]:
    """Runs in `folder`, under a clock, on Python's ordinary stack, while no garbage of Hypothesis's is collected."""

    def stop(*_: object) -> None:
        raise Hang(f"no answer within {HANG_SECONDS:g} s")

    depth, handler = sys.getrecursionlimit(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    gc.disable()
    try:
        sys.setrecursionlimit(1000)
        with contextlib.chdir(folder):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        sys.setrecursionlimit(depth)
        gc.enable()


def kind(refusal: str, path: Path) -> str:
    """The part of a message that says what is allowed and what to do, without its numbers."""
    match = re.fullmatch(rf"{re.escape(str(path))}: found .+ at byte \d+; (.+: .+\.)", refusal)
    assert match, f"{refusal!r} is not of the form 'FILE: found ... at byte N; what is allowed: advice.'"
    return re.sub(r"\d+", "N", match[1])


def read(path: Path, size: int) -> str | None:
    """The kind of message that refuses the file; None once its arrays were found to lie in it and were summed."""
    try:
        tensor = release.read_tensor(path)
    except release.CheckpointError as error:
        return kind(str(error), path)
    for payload in [tensor.weight] if tensor.scales is None else [tensor.weight, tensor.scales]:
        start, end = payload.offset, payload.offset + payload.num_bytes
        assert payload.path == path, f"an array in {payload.path}"
        assert 0 < start < end <= size, f"an array from byte {start} to {end} of {size}"
        with np.errstate(all="ignore"):
            payload.array().sum()
    return None


def traces(folder: Path, modules: set[str]) -> list[str]:
    """What reading left in the folder and among the modules, which are cleaned for the next input."""
    imported, made = sorted(set(sys.modules) - modules), [path.name for path in folder.iterdir()]
    for name in imported:
        del sys.modules[name]
    if made:
        shutil.rmtree(folder)
    return imported + made


def watch(path: Path, size: int, folder: Path) -> Outcome:
    """Reads the file in `folder`; raises what the reader raises, or says what is wrong with its answer."""
    with confined(folder):
        tracemalloc.start()
        begun = time.thread_time()
        try:
            refusal = read(path, size)
            seconds, excess = time.thread_time() - begun, tracemalloc.get_traced_memory()[1] - size
        finally:
            tracemalloc.stop()
    assert seconds <= MOST_SECONDS, f"took {seconds:.2f} s; {MOST_SECONDS:g} s is allowed"
    assert excess <= ALLOWANCE, f"held {excess} bytes more than the file has; {ALLOWANCE} are allowed"
    return Outcome(refusal, seconds, excess)


def check(data: bytes, folder: Path) -> Outcome:
    """Writes one input to a file in `folder` and reads it.

    Raises:
      ViolationError: What came of it was neither arrays within the file nor a CheckpointError with a whole sentence; or
        it took too long, held too much memory, imported a module or left something in its working directory.
    """
    path, canary, modules = folder / FILE_NAME, folder / "canary", set(sys.modules)
    path.write_bytes(data)
    canary.mkdir(exist_ok=True)
    try:
        outcome = watch(path, len(data), canary)
    except (Exception, SystemExit, Hang) as error:
        outcome = error
    if left := traces(canary, modules):
        raise ViolationError(f"executed something, which left {left}")
    if isinstance(outcome, BaseException):
        raise ViolationError(f"{type(outcome).__name__}: {outcome}") from outcome
    return outcome


def summary(outcomes: Sequence[Outcome], begun: float) -> str:
    refusals = [outcome.refusal for outcome in outcomes if outcome.refusal is not None]
    seconds, excess = max(outcome.seconds for outcome in outcomes), max(outcome.excess for outcome in outcomes)
    return (
        f"{len(outcomes)} inputs, {len(outcomes) / (time.monotonic() - begun):.0f} a second: "
        f"{len(outcomes) - len(refusals)} accepted, {len(refusals)} refused ({len(set(refusals))} kinds of message); "
        f"at most {1000 * seconds:.1f} ms, {excess} bytes beyond the file's size"
    )


def fuzz(folder: Path, *, inputs: int, seed: int) -> list[Outcome]:
    """Checks so many mutated files, and prints how it goes.

    Raises:
      ViolationError: Of the smallest input that was found to fail; the file in `folder` holds it.
    """
    outcomes: list[Outcome] = []
    begun = time.monotonic()

    def run(original: int, numbers: list[int]) -> None:
        outcomes.append(check(mutate(ORIGINALS[original], numbers), folder))
        if len(outcomes) % 5000 == 0 or len(outcomes) == inputs:
            print(summary(outcomes, begun), flush=True)

    original, numbers = st.integers(0, len(ORIGINALS) - 1), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3)
    settings = hypothesis.settings(
        hypothesis.settings.get_profile("ci"), max_examples=inputs, report_multiple_bugs=False
    )
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(original, numbers)(run)))()
    except hypothesis.errors.FlakyFailure as error:
        raise ViolationError(f"{error.exceptions[0]}; not so when it was repeated") from error
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fuzzes the reader of the release's files.")
    parser.add_argument("--inputs", type=int, default=25_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same inputs at each run (default: %(default)s)")
    parser.add_argument("--input", type=Path, metavar="FILE", help="check this one instead")
    options = parser.parse_args(arguments)
    if options.inputs < 1:
        parser.error(f"--inputs {options.inputs} is too few: pass 1 or more")
    folder = Path(tempfile.mkdtemp(prefix="fuzz_release_"))
    repeat = f"python tests/fuzz_release.py --input {folder / FILE_NAME}"
    print(f"Should the process die, repeat its last input: {repeat}", flush=True)
    try:
        if options.input:
            outcomes = [check(options.input.read_bytes(), folder)]
        else:
            outcomes = fuzz(folder, inputs=options.inputs, seed=options.seed)
    except ViolationError as violation:
        print(f"Violation: {violation}\nRepeat it: {repeat}")
        return 1
    for what, count in Counter(outcome.refusal or "accepted" for outcome in outcomes).most_common():
        print(f"{count:6} {what}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
