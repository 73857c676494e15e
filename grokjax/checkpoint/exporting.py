"""Export of a checkpoint of any layout to safetensors, for other programs."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from grokjax.checkpoint.beside import find_tokenizer
from grokjax.checkpoint.formats.safetensors_export import write_safetensors
from grokjax.checkpoint.formats.safetensors_names import SCHEMES, SchemeName
from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.parameters import parts_of
from grokjax.checkpoint.progress import Report, Tally
from grokjax.checkpoint.recipe import Leaves, Recipe, read_part
from grokjax.checkpoint.stored import Array, ArraySpec, TensorSpec, specs_of
from grokjax.config import GrokConfig
from grokjax.model import check_dtype


def export(
    source: str | Path,
    target: str | Path,
    config: GrokConfig | None = None,
    *,
    names: SchemeName = "keyfan",
    dtype: DTypeLike = "bfloat16",
    tokenizer: str | Path | None = None,
    progress: Report | None = None,
) -> None:
    """Writes a checkpoint of any layout as safetensors files, with the names of a public checkpoint.

    int8 weights are written as what they stand for: exactly so in float32, rounded in bfloat16.

    Args:
      source: a checkpoint of any layout.
      target: a folder that does not exist or is empty.
      config: what the source was made with, where its files cannot tell.
      names: `keyfan` for those of keyfan/grok-1-hf, `hpcai` for those of hpcai-tech/grok-1; docs/checkpoints.md says
        which programs read which.
      dtype: of all arrays, float32 or bfloat16.
      tokenizer: a file that is copied to `tokenizer.model` in the target; by default the `tokenizer.model` beside the
        source, if there is one.
      progress: called after each part, with the bytes that are written; without it the logger is told now and then.

    Raises:
      CheckpointError: The source is damaged, the target exists or cannot be written, or the disk is full.
      ValueError: The names or the dtype are none of these, or there is no such tokenizer.
    """
    if names not in SCHEMES:
        raise ValueError(f"names={names!r}: choose one of {', '.join(SCHEMES)}.")
    beside = find_tokenizer(source) if tokenizer is None else Path(tokenizer)
    if beside is not None and not beside.is_file():
        raise ValueError(f"there is no tokenizer file {beside}: name the release's tokenizer.model, or leave it out.")
    checkpoint = open_checkpoint(source, config)
    name = check_dtype(dtype).name
    found = specs_of(checkpoint)
    num_values = sum(math.prod(spec.weight.shape) for spec in found.values())
    tally = Tally("exported", num_values * np.dtype(name).itemsize, progress)

    def parts() -> Iterator[tuple[str, int | None, Array]]:
        for part in [part for parameter in found for part in parts_of(parameter, checkpoint.config)]:
            array = _plain(read_part(checkpoint, part), np.dtype(name))
            yield part.parameter, part.expert, array
            tally.add(array.nbytes, part.name, part.name)

    write_safetensors(target, checkpoint.config, parts(), dtype=name, scheme=SCHEMES[names], tokenizer=beside)


def _plain(leaves: Leaves, dtype: np.dtype[Any]) -> Array:
    if "scales" not in leaves:
        return leaves["weight"].astype(dtype, copy=False)
    spec = TensorSpec(ArraySpec(leaves["weight"].shape, dtype), None)
    return Recipe().apply(leaves, spec)["weight"]
