"""What the files of a checkpoint tell of sizes by themselves: the model that they are, and how many there can be."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from grokjax.checkpoint.stored import CheckpointError
from grokjax.config import GrokConfig


def check_count(path: Path, config: GrokConfig, field: str, most: int, what: str) -> None:
    """Refuses a configuration with more layers or experts than there is room for, before each of them is listed.

    Args:
      path: of the checkpoint, or of the file that holds the configuration.
      config: what was given or found.
      field: `num_layers` or `num_experts`.
      most: the number of things of which each needs one.
      what: these things are called.

    Raises:
      CheckpointError: There are too few.
    """
    count = getattr(config, field)
    if count > most:
        raise CheckpointError(
            f"{path}: {field}={count} is too large for the {most} {what}: use the configuration that the checkpoint "
            "was made with, or restore damaged files from a copy."
        )


def recognise(folder: Path, sizes: Mapping[str, int], advice: str) -> GrokConfig:
    """Grok-1's configuration if the files have its sizes: multipliers and head size are in no file.

    Args:
      folder: of the checkpoint.
      sizes: what the files tell: fields of `GrokConfig`, and the products `num_heads*head_dim` and
        `num_kv_heads*head_dim`, which they do not tell apart.
      advice: what to do if they are others, up to "the whole configuration".

    Raises:
      CheckpointError: They are not Grok-1's.
    """
    grok_1 = GrokConfig.grok_1()
    known = dataclasses.asdict(grok_1) | {
        "num_heads*head_dim": grok_1.num_heads * grok_1.head_dim,
        "num_kv_heads*head_dim": grok_1.num_kv_heads * grok_1.head_dim,
    }
    if all(known[name] == size for name, size in sizes.items()):
        return grok_1
    told = ", ".join(f"{name}={size}" for name, size in sizes.items())
    required = [field.name for field in dataclasses.fields(GrokConfig) if field.default is dataclasses.MISSING]
    asked = ", ".join(name for name in required if name not in sizes)
    raise CheckpointError(
        f"{folder}: the files say {told}, which is not Grok-1; they cannot say {asked}: {advice} the whole "
        "configuration, config=GrokConfig(...) or --config FILE."
    )
