"""Values that are NaN or infinite are found, in every layout, and named."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from builders import SMALL, write_checkpoint

from grokjax import CheckpointError, convert, export, verify_finite
from grokjax.testing import write_release_checkpoint


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in each layout: a NaN in the table, an infinite scale of an expert, nothing else amiss."""
    folder = tmp_path_factory.mktemp("broken")
    tensors = write_release_checkpoint(folder / "whole", SMALL, scale_blocks=4)
    table, gate = tensors["embedding.table"], tensors["layers.0.feed_forward.gate"]
    table.weight[3, 5] = np.nan
    gate.scales[2, 0, 7:9] = np.inf
    paths = {name: folder / name for name in ("release", "orbax", "safetensors")}
    write_checkpoint(paths["release"], SMALL, weights=tensors)
    convert(paths["release"], paths["orbax"], SMALL)
    export(paths["orbax"], paths["safetensors"])
    return paths


@pytest.mark.parametrize(
    ("layout", "expert"),
    [
        ("release", "layers.0.feed_forward.gate.2/scales: 2 of 48 values"),
        ("orbax", "layers.0.feed_forward.gate.2/scales: 2 of 48 values"),
        ("safetensors", "layers.0.feed_forward.gate.2/weight: 64 of 1536 values"),
    ],
)
def test_arrays_with_such_values_are_named(broken: dict[str, Path], layout: str, expert: str) -> None:
    calls = []
    with pytest.raises(CheckpointError) as caught:
        verify_finite(broken[layout], SMALL, progress=calls.append)
    assert str(caught.value).splitlines()[:3] == [
        f"{broken[layout] / 'ckpt-0' if layout == 'release' else broken[layout]}: 2 arrays have values that are NaN or "
        "infinite:",
        "  embedding.table/weight: 1 of 2048 values",
        f"  {expert}",
    ]
    assert calls[-1].done_bytes == calls[-1].total_bytes


def test_int8_values_need_no_look(tmp_path: Path) -> None:
    """Only scales and plain weights are read: of Grok-1, a hundredth."""
    written, calls = write_checkpoint(tmp_path, SMALL, scale_blocks=4), []
    verify_finite(written.path, SMALL, progress=calls.append)
    floats = [array for tensor in written.tensors.values() for array in (tensor.weight, tensor.scales)]
    floats = [array for array in floats if array is not None and array.dtype in (np.float32, ml_dtypes.bfloat16)]
    assert calls[-1].total_bytes == sum(array.nbytes for array in floats)
