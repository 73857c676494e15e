"""Finds out how a checkpoint is laid out, and opens it."""

from pathlib import Path

from grokjax.config import GrokConfig
from grokjax.orbax_layout import MANIFEST, find_orbax, open_orbax
from grokjax.release import find_release, open_release
from grokjax.safetensors_layout import find_safetensors, open_safetensors
from grokjax.stored import Checkpoint, CheckpointError


def open_checkpoint(path: str | Path, config: GrokConfig | None = None) -> Checkpoint:
    """Opens a checkpoint of any layout: names, shapes and dtypes are read and checked, arrays are not.

    Args:
      path: the folder of the release's files, of safetensors files, or of `grokjax.json`.
      config: what the checkpoint was made with, for layouts whose files do not say; ours say, and it is not looked at.

    Raises:
      CheckpointError: There is no checkpoint, or something is wrong with it; the message lists all that is.
    """
    if find_orbax(path) is not None:
        return open_orbax(path)
    if find_safetensors(path) is not None:
        return open_safetensors(path, config)
    if find_release(path) is not None:
        return open_release(path, config)
    found = "a folder without a checkpoint" if Path(path).is_dir() else "no such folder"
    raise CheckpointError(
        f"{path}: {found}: a folder with tensorNNNNN_000 files (the release), with *.safetensors files, or with "
        f"{MANIFEST} (written by grokjax) is needed."
    )
