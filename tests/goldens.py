"""Loads the golden data in `tests/golden`: what the released code answered on small models (see the README there)."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grokjax.config import GrokConfig

GOLDEN_DIR = Path(__file__).parent / "golden"
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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)
