"""The golden data in `tests/golden`, what the released code answered on small models (see the README there).

And the comparison of a model with them.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grokjax.cache import KVCache
from grokjax.config import GrokConfig
from grokjax.model import Grok, decode, prefill

GOLDEN_DIR = Path(__file__).parent / "golden"
ATOL_LOGITS = 5e-5  # of a deviation of 2; a float64 model differs by up to 6e-5, ours from the release by less
ATOL_CACHE = 1e-4
MODEL_CASES = ("tiny-moe", "tiny-moe-s8", "tiny-mesh-1x4", "tiny-dense-2x4")


@dataclasses.dataclass(frozen=True, eq=False)
class GoldenCase:
    """One small model and the numbers that the release computed with it.

    Attributes:
      name: the case's folder in `tests/golden`.
      config: the model's sizes.
      release_config: `config.json` as it is, in the release's field names.
      checkpoint: folder of the checkpoint, in the release's on-disk format.
      manifest: what each checkpoint file holds: `file`, `module`, `param`, `kind`, shapes and dtypes.
      tokens: prompts padded with 0 [B, T] int32.
      lengths: true prompt lengths [B] int32.
      arrays: per golden file ("float32", "bfloat16", "bfloat16_eager") the recorded arrays by name; bfloat16 values are
        held as float32.
    """

    name: str
    config: GrokConfig
    release_config: Mapping[str, Any]
    checkpoint: Path
    manifest: list[dict[str, Any]]
    tokens: np.ndarray
    lengths: np.ndarray
    arrays: Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class PureGoldens:
    """Results of the release's pure functions: `tables` of cases, `arrays` for those that hold arrays."""

    tables: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class EndToEnd:
    """Whole runs of the release's runner: `requests` with prompts and answers, `steps` with the logits sampled from."""

    config: GrokConfig
    release_config: Mapping[str, Any]
    checkpoint: Path
    manifest: list[dict[str, Any]]
    requests: list[dict[str, Any]]
    steps: Mapping[str, np.ndarray]


@functools.cache
def load_case(name: str) -> GoldenCase:
    """The model case in `tests/golden/<name>`; every name in `MODEL_CASES` is one."""
    folder = GOLDEN_DIR / name
    release_config = _read_json(folder / "config.json")
    arrays = {path.stem.removeprefix("golden_"): _read_arrays(path) for path in sorted(folder.glob("golden_*.npz"))}
    return GoldenCase(
        name=name,
        config=GrokConfig.from_release(release_config),
        release_config=release_config,
        checkpoint=folder / "ckpt-0",
        manifest=_read_json(folder / "manifest.json")["tensors"],
        tokens=arrays["float32"]["tokens"],
        lengths=arrays["float32"]["lengths"],
        arrays=arrays,
    )


@functools.cache
def load_pure() -> PureGoldens:
    """The pure functions' results in `tests/golden/pure`."""
    folder = GOLDEN_DIR / "pure"
    return PureGoldens(tables=_read_json(folder / "pure.json"), arrays=_read_arrays(folder / "pure.npz"))


@functools.cache
def load_e2e() -> EndToEnd:
    """The runner's results in `tests/golden/e2e`; step arrays are named `req{index}_{field}`."""
    folder = GOLDEN_DIR / "e2e"
    release_config = _read_json(folder / "config.json")
    return EndToEnd(
        config=GrokConfig.from_release(release_config),
        release_config=release_config,
        checkpoint=folder / "ckpt-0",
        manifest=_read_json(folder / "manifest.json")["tensors"],
        requests=_read_json(folder / "e2e.json")["requests"],
        steps=_read_arrays(folder / "e2e_top.npz"),
    )


def real_logits(case: GoldenCase, logits: np.ndarray) -> np.ndarray:
    """The logits [sum of lengths, V] at real positions of [B, T, V]."""
    return np.concatenate([row[:length] for row, length in zip(logits, case.lengths, strict=True)])


def check_logits(golden: GoldenCase, logits: np.ndarray) -> None:
    """The logits [B, T, V] of a whole pass: the release's at real positions."""
    expected = real_logits(golden, golden.arrays["float32"]["full_logits"])
    np.testing.assert_allclose(real_logits(golden, logits), expected, atol=ATOL_LOGITS, rtol=0)


def check_generation(golden: GoldenCase, model: Grok, rows) -> None:
    """Prefill and greedy decoding of some rows together: logits, tokens, lengths and the whole cache."""
    arrays, rows = golden.arrays["float32"], list(rows)
    expected_tokens = arrays["decode_tokens"][rows]  # [B, n + 1], the first from the prefill
    logits, cache = prefill(model, golden.tokens[rows], golden.lengths[rows], model.new_cache(len(rows), 64))
    np.testing.assert_allclose(logits, arrays["prefill_logits"][rows, 0], atol=ATOL_LOGITS, rtol=0)
    for step in range(expected_tokens.shape[1] - 1):
        tokens = np.asarray(logits).argmax(-1)
        np.testing.assert_array_equal(tokens, expected_tokens[:, step])
        logits, cache = decode(model, tokens, cache)
        np.testing.assert_allclose(logits, arrays["decode_logits"][rows, step], atol=ATOL_LOGITS, rtol=0)
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1), expected_tokens[:, -1])
    check_cache(cache, arrays["final_k"][:, rows], arrays["final_v"][:, rows], golden.lengths[rows] + step + 1)


def check_cache(cache: KVCache, keys: np.ndarray, values: np.ndarray, lengths: np.ndarray) -> None:
    """Compares with the release's [L, B, S, K, H]; ours is head-major and may hold a head once for each device."""
    np.testing.assert_array_equal(cache.lengths, lengths)
    copies = cache.keys.shape[2] // keys.shape[3]
    for ours, theirs in ((cache.keys, keys), (cache.values, values)):
        theirs = theirs.swapaxes(2, 3).repeat(copies, axis=2)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                np.asarray(ours)[:, row, :, :length], theirs[:, row, :, :length], atol=ATOL_CACHE, rtol=0
            )


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)
