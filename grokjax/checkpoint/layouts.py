"""Finds out how a checkpoint is laid out, and opens it."""

from pathlib import Path

from grokjax.checkpoint.beside import find_config
from grokjax.checkpoint.formats.manifest import MANIFEST
from grokjax.checkpoint.formats.orbax import find_orbax, open_orbax
from grokjax.checkpoint.formats.release import find_release, open_release
from grokjax.checkpoint.formats.safetensors import open_safetensors
from grokjax.checkpoint.formats.safetensors_headers import find_safetensors
from grokjax.checkpoint.formats.safetensors_names import read_config
from grokjax.checkpoint.stored import Checkpoint, CheckpointError, DamageError
from grokjax.config import GrokConfig, check_config


def open_checkpoint(path: str | Path, config: GrokConfig | None = None) -> Checkpoint:
    """Opens a checkpoint of any layout: names, shapes and dtypes are read and checked, arrays are not.

    Args:
      path: the folder of the release's files, of safetensors files, or of `grokjax.json`.
      config: what the checkpoint was made with, for layouts whose files do not say; ours do. By default that of a
        `config.json` beside them (see `find_config`).

    Raises:
      CheckpointError: There is no checkpoint, or something is wrong with it; the message lists all that is.
      ValueError: `config` is no configuration.
    """
    if config is not None:
        check_config(config)
    if find_orbax(path) is not None:
        checkpoint = open_orbax(path)
        _check_config(checkpoint, config)
        return checkpoint
    if find_safetensors(path) is not None:
        return open_safetensors(path, config)
    if find_release(path) is not None:
        return _open_release(path, config)
    found = "a folder without a checkpoint" if Path(path).is_dir() else "no such folder"
    found = "a file" if Path(path).is_file() else found
    raise CheckpointError(
        f"{path}: {found}: a folder with tensorNNNNN_000 files (the release), with *.safetensors files, or with "
        f"{MANIFEST} (written by grokjax) is needed."
    )


def _open_release(path: str | Path, config: GrokConfig | None) -> Checkpoint:
    beside = find_config(path) if config is None else None
    if beside is None:
        return open_release(path, config)
    config = read_config(beside)
    try:
        return open_release(path, config)
    except DamageError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nThe configuration was that of {beside}: correct it, or pass another."
        ) from error


def _check_config(checkpoint: Checkpoint, config: GrokConfig | None) -> None:
    """Refuses heads cut otherwise than the checkpoint's own: they fit its shapes and would compute nonsense."""
    cuts = ("num_heads", "num_kv_heads", "head_dim") if config is not None else ()
    differing = [
        f"{name}={getattr(config, name)}, not {getattr(checkpoint.config, name)}"
        for name in cuts
        if getattr(config, name) != getattr(checkpoint.config, name)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: the configuration says {'; '.join(differing)}: pass none, or the one of {MANIFEST}."
        )
