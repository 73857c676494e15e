"""Where layers stream and few tokens choose experts, only these are read, and no bit of a result tells of it."""

import collections
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import DENSE, EXPERT, FULLY, SMALL, TENSOR, WrittenCheckpoint, label, write_checkpoint

from grokjax import CheckpointError, Grok, GrokConfig, Progress, convert, decode, export, load, make_mesh, stream
from grokjax.checkpoint import passes
from grokjax.checkpoint.formats.orbax import OrbaxArray
from grokjax.checkpoint.formats.payload import Payload
from grokjax.checkpoint.formats.safetensors import SafetensorsArray
from grokjax.checkpoint.stored import UnreadableError, aligned_empty
from grokjax.model import share_of_experts
from grokjax.research import Tap, bias_router, drop_experts, edit, force_experts, observe, unedited
from grokjax.sharding import ShardingRules

THREE_LAYERS = SMALL.replace(num_layers=3)
TAPS = {
    "experts": Tap("router.experts"),
    "stream": Tap("stream.out", layers=[0, 2]),
    "folded": Tap("router.logits", fold=jnp.maximum),
}
EDITS = [force_experts([6, 1], layers=[1]), drop_experts({0: [0, 3]}), bias_router(np.arange(8, dtype=np.float32))]
STAYS = {"device_bytes": 1 << 30}
# Which experts of which layer's matrices were read: (parameter, expert) -> how often.
Reads = collections.Counter[tuple[str, int]]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> WrittenCheckpoint:
    return write_checkpoint(tmp_path_factory.mktemp("release"), THREE_LAYERS, scale_blocks=4)


def observed(model: Grok) -> Any:
    """What a pass of one token gives: logits, and what is seen on the way."""
    return jax.tree.map(np.asarray, observe(model, np.array([[5]]), np.array([1]), TAPS))


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def count_release(release: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[Reads, Reads]:
    """Counts reads of experts' values from here on, and bytes of all that is read, by file."""
    files = dict(zip(sorted((release.path / "ckpt-0").iterdir()), release.tensors, strict=True))
    reads, num_bytes, read_into = Reads(), Reads(), Payload.read_into

    def note(payload: Payload, out: np.ndarray, index: Any = ()) -> None:
        name = files[payload.path]
        if name.endswith((".gate", ".up", ".down")) and payload.dtype == np.int8:
            reads[name, index[0]] += 1
        num_bytes["bytes", 0] += out.nbytes
        read_into(payload, out, index)

    monkeypatch.setattr(Payload, "read_into", note)
    return reads, num_bytes


def matrices_of(experts: np.ndarray) -> Reads:
    """One reading of each matrix of the experts [L, B, T, X] that were chosen."""
    return Reads(
        (f"layers.{layer}.feed_forward.{matrix}", int(expert))
        for layer, numbers in enumerate(experts)
        for expert in np.unique(numbers)
        for matrix in ("gate", "up", "down")
    )


def test_a_token_reads_the_experts_that_it_chose(release: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Progress] = []
    model = stream(release.path, THREE_LAYERS, dtype=jnp.float32, progress=told.append)
    told.clear()
    reads, num_bytes = count_release(release, monkeypatch)
    found = observed(model)
    assert reads == matrices_of(found[1]["experts"])
    assert told[-1].done_bytes == told[-1].total_bytes == num_bytes["bytes", 0]
    parts = [f"layers.{layer}{part}" for layer in range(3) for part in ("", ".feed_forward")]
    assert [progress.parameter for progress in told] == ["layers.0", *parts]
    assert_equal(found, observed(stream(release.path, THREE_LAYERS, dtype=jnp.float32, **STAYS)))


def test_padding_and_rows_at_rest_read_none(release: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stream(release.path, THREE_LAYERS, dtype=jnp.float32)
    reads, _ = count_release(release, monkeypatch)
    decode(model, np.array([5, 9]), model.new_cache(2, 16), active=np.array([True, False]))
    assert len(reads) == 3 * 3 * THREE_LAYERS.experts_per_token


def test_what_stands_in_place_of_unread_experts_changes_nothing(
    release: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stream(release.path, THREE_LAYERS, dtype=jnp.float32)
    expected = observed(model)
    poisoned = []

    def poison(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        memory = aligned_empty(shape, dtype)
        memory[...] = 99 if dtype == np.int8 else np.nan
        poisoned.append(dtype.name)
        return memory

    monkeypatch.setattr(passes, "aligned_zeros", poison)
    assert_equal(observed(model), expected)
    assert sorted(poisoned) == ["bfloat16"] * 3 + ["int8"] * 3


def test_experts_are_read_until_none_is_missing(release: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the choice had come out differently when the layer ran again."""
    model = stream(release.path, THREE_LAYERS, dtype=jnp.float32)
    expected, take, asked = observed(model), passes.LayerPass.take, []

    def take_one_less_at_first(self: passes.LayerPass, number: int, experts: Sequence[int] = ()) -> Any:
        asked.append((number, *experts))
        return take(self, number, experts if asked.count((number, *experts)) > 1 else experts[1:])

    monkeypatch.setattr(passes.LayerPass, "take", take_one_less_at_first)
    assert_equal(observed(model), expected)
    assert len(asked) == 3 * 3


def test_a_disk_that_fails_while_experts_are_read_is_named(
    release: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stream(release.path, THREE_LAYERS, dtype=jnp.float32)
    expected, threads, read_into = observed(model), threading.active_count(), Payload.read_into

    def fail(payload: Payload, out: np.ndarray, index: Any = ()) -> None:
        if index and isinstance(index[0], int):
            raise UnreadableError.of(payload.path, OSError(errno.EIO, os.strerror(errno.EIO)))
        read_into(payload, out, index)

    with monkeypatch.context() as patch:
        patch.setattr(Payload, "read_into", fail)
        with pytest.raises(CheckpointError, match=r"layer 0 cannot be read \(Input/output error\)"):
            observed(model)
    assert threading.active_count() == threads
    assert_equal(observed(model), expected)


def test_the_share_is_that_which_few_tokens_choose() -> None:
    grok = GrokConfig.grok_1()
    assert [share_of_experts(grok, count) for count in (1, 2)] == [1 / 4, 7 / 16]
    assert share_of_experts(grok, 4) == pytest.approx(1 - 0.75**4)
    assert share_of_experts(grok, 5) == share_of_experts(grok, 4096) == 1
    assert share_of_experts(DENSE, 1) == 1


def test_every_device_reads_of_the_chosen_experts_what_it_holds(
    release: WrittenCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"mesh": make_mesh((2, 4)), "rules": EXPERT, "dtype": jnp.float32}
    expected = observed(stream(release.path, THREE_LAYERS, **place, **STAYS))
    model = stream(release.path, THREE_LAYERS, **place)
    reads, _ = count_release(release, monkeypatch)
    assert_equal(observed(model), expected)
    assert reads == matrices_of(expected[1]["experts"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mesh", "rules", "quantized", "dtype"),
    [
        ((1, 1), TENSOR, True, "float32"),
        ((2, 4), FULLY, False, "bfloat16"),
    ],
    ids=label,
)
def test_no_bit_tells_of_unread_experts(
    mesh: tuple[int, int], rules: ShardingRules, quantized: bool, dtype: str, tmp_path: Path
) -> None:
    written = write_checkpoint(tmp_path, THREE_LAYERS, **({"scale_blocks": 4} if quantized else {"quantized": False}))
    place = (written.path, THREE_LAYERS, make_mesh(mesh), jnp.dtype(dtype))

    def run(model: Grok) -> Any:
        cache = model.new_cache(2, 16, dtype="int8")
        first, cache = decode(model, np.array([5, 6]), cache)
        second, _ = decode(model, np.array([7, 8]), cache)
        edited = edit(model, *EDITS)
        return jax.tree.map(np.asarray, (first, second, observed(model), observed(edited), observed(unedited(edited))))

    assert_equal(run(stream(*place, rules=rules)), run(load(*place, rules=rules)))


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["ours", "safetensors"])
def test_other_layouts_read_the_chosen_experts_alone(
    layout: str, release: WrittenCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, array, leaves = (convert, OrbaxArray, 2) if layout == "ours" else (export, SafetensorsArray, 1)
    make(release.path, tmp_path / "model", THREE_LAYERS)
    model = stream(tmp_path / "model", dtype=jnp.float32)
    numbers, read_into = collections.Counter[int](), array.read_into

    def note(stored: Any, out: np.ndarray, index: Any = ()) -> None:
        if index and isinstance(index[0], int):
            numbers[index[0]] += 1
        read_into(stored, out, index)

    monkeypatch.setattr(array, "read_into", note)
    chosen = collections.Counter(observed(model)[1]["experts"].ravel().tolist())
    assert numbers == {number: 3 * leaves * count for number, count in chosen.items()}
