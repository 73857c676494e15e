"""Finds what lies beside the files of a checkpoint: its tokenizer, and its configuration where the files hold none."""

from pathlib import Path

from grokjax.checkpoint.formats.orbax import find_orbax
from grokjax.checkpoint.formats.release import find_release
from grokjax.checkpoint.formats.safetensors_headers import find_safetensors
from grokjax.checkpoint.formats.safetensors_names import CONFIG, TOKENIZER


def find_tokenizer(path: str | Path) -> Path | None:
    """`tokenizer.model` in a checkpoint's folder, or in the one around it; None if it is in neither."""
    return _first_file(*tokenizer_places(path))


def tokenizer_places(path: str | Path) -> tuple[Path, Path]:
    """Where the tokenizer of a checkpoint is looked for."""
    return Path(path, TOKENIZER), Path(path).absolute().parent / TOKENIZER


def find_config(path: str | Path) -> Path | None:
    """The `config.json` that tells a checkpoint's configuration, if there is one.

    It lies beside the files; of the release's, which are in a folder `ckpt-0` or `ckpt`, maybe beside that folder. A
    checkpoint of ours has its configuration inside.
    """
    if find_orbax(path) is not None:
        return None
    folder = find_safetensors(path)
    if folder is not None:
        return _first_file(folder / CONFIG)
    folder = find_release(path)
    if folder is None:
        return None
    around = [folder.parent / CONFIG] if folder.absolute().name in ("ckpt-0", "ckpt") else []
    return _first_file(folder / CONFIG, *around)


def _first_file(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)
