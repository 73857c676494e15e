"""The loaded model against a NumPy float64 model of the same files: this proof needs nothing but the repository."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from builders import DENSE, EXPERT, FULLY, SMALL, WrittenCheckpoint, write_checkpoint

from grokjax import Grok, GrokConfig, KVCache, ShardingRules, decode, forward, load, make_mesh, prefill

TOKENS = np.random.default_rng(0).integers(3, SMALL.vocab_size, (2, 9))


def load_float32(checkpoint: WrittenCheckpoint, mesh: tuple[int, int], rules: ShardingRules | None = None) -> Grok:
    return load(checkpoint.path, checkpoint.config, make_mesh(mesh), jnp.float32, rules=rules)


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected, atol=5e-5 * expected.std(), rtol=0)


@pytest.mark.parametrize(
    ("config", "options", "mesh"),
    [
        pytest.param(SMALL, {"scale_blocks": 1}, (1, 1), id="one block of scales"),
        pytest.param(SMALL, {"scale_blocks": 4}, (2, 4), id="4 blocks"),
        pytest.param(SMALL.replace(num_layers=2), {"quantized": False}, (2, 4), id="plain"),
        pytest.param(DENSE, {"scale_blocks": 4}, (2, 4), id="dense"),
        pytest.param(DENSE.replace(num_layers=2), {"quantized": False}, (1, 1), id="dense plain"),
    ],
)
def test_logits_are_the_reference_s(tmp_path: Path, config: GrokConfig, options: dict, mesh: tuple[int, int]) -> None:
    checkpoint = write_checkpoint(tmp_path, config, **options)
    assert_close(forward(load_float32(checkpoint, mesh), TOKENS), checkpoint.expected_logits(TOKENS))


@pytest.mark.parametrize(
    ("mesh", "rules", "scale_blocks"),
    [
        pytest.param((1, 8), None, 4, id="a block on two devices"),
        pytest.param((1, 8), None, 8, id="a block on each device"),
        pytest.param((2, 4), EXPERT, 8, id="expert parallel", marks=pytest.mark.thorough),
        pytest.param((2, 4), FULLY, 4, id="fully sharded", marks=pytest.mark.thorough),
    ],
)
def test_logits_are_the_reference_s_under_other_rules(
    tmp_path: Path, mesh: tuple[int, int], rules: ShardingRules | None, scale_blocks: int
) -> None:
    checkpoint = write_checkpoint(tmp_path, scale_blocks=scale_blocks)
    assert_close(forward(load_float32(checkpoint, mesh, rules), TOKENS), checkpoint.expected_logits(TOKENS))


@pytest.mark.parametrize("mesh", [pytest.param((1, 1), marks=pytest.mark.thorough), (2, 4)], ids=str)
def test_twelve_layers_are_the_reference_s_step_by_step(tmp_path: Path, mesh: tuple[int, int]) -> None:
    """Prompts of two lengths, then one token after the other.

    File block 2 holds layer 10: layers loaded in the order of the files would give noise, and no error.
    """
    checkpoint = write_checkpoint(tmp_path, SMALL.replace(num_layers=12), scale_blocks=4)
    expected, lengths = checkpoint.expected_logits(TOKENS), np.array([6, 3])
    model, rows = load_float32(checkpoint, mesh), np.arange(2)
    cache = KVCache.create(checkpoint.config, 2, 16, mesh=make_mesh(mesh))
    logits, cache = prefill(model, TOKENS[:, :6], lengths, cache)
    assert_close(logits, expected[rows, lengths - 1])
    for step in range(3):
        logits, cache = decode(model, TOKENS[rows, lengths + step], cache)
        assert_close(logits, expected[rows, lengths + step])
