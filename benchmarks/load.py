"""Speed and memory of loading a checkpoint onto the devices, against plainly reading the same files, and of saving it.

`python benchmarks/load.py` writes a checkpoint in the release's format with matrices of the released model's sizes
(5.2 GB with one layer and an eighth of the vocabulary) and converts it to ours. Then, in turns, it reads all files of
one and loads it, first from the disk and then from the page cache. The page cache is emptied of these files by
`posix_fadvise(POSIX_FADV_DONTNEED)`, which needs no rights but that they have been written back. Last it copies ours
with `cp` and saves the loaded model, in turns; both leave the writing back to the kernel, and begin when the disk has
caught up. It needs three times the checkpoint's bytes on the disk.

The last line is JSON with the keys `config`, `layers`, `mesh`, `checkpoint_bytes`, `peak_memory_bytes` (of the process,
the model in it), `release` and `ours` (of each layout the medians of the seconds that reading and loading took, cold
and warm), `writing` (medians of the seconds that copying and saving took) and the environment.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import card
import jax
from convert import CONFIGS, write_checkpoint

from grokjax import GrokConfig, convert, load, make_mesh, save
from grokjax.cli import read_extents, use_every_core

_BUFFER_BYTES = 1 << 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=tuple(CONFIGS), default="grok_1", help="sizes (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="so many layers")
    parser.add_argument("--mesh", default="1,1", help="DATA,MODEL (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of reading and loading (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    return parser.parse_args()


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def forget(folder: Path) -> None:
    """Empties the page cache of a folder's files."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """Reads all files of a folder into one small buffer, as `cat` does."""
    buffer = bytearray(_BUFFER_BYTES)
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure(folder: Path, config: GrokConfig, mesh: tuple[int, int], repeats: int) -> dict[str, float]:
    """Seconds of reading and of loading, each from the disk and then from the page cache."""

    def load_all() -> None:
        jax.block_until_ready(jax.tree.leaves(load(folder, config, make_mesh(mesh))))

    load_all()  # what is compiled and imported is not measured
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, run in (("read", lambda: read(folder)), ("load", load_all)):
            forget(folder)
            for state in ("cold", "warm"):
                seconds.setdefault(f"{state}_{name}", []).append(card.seconds(run))
    return {name: round(statistics.median(found), 3) for name, found in seconds.items()}


def measure_saving(folder: Path, config: GrokConfig, mesh: tuple[int, int], repeats: int) -> dict[str, float]:
    """Seconds of copying a checkpoint and of saving its model."""
    model, target = load(folder, config, make_mesh(mesh)), folder.with_name("written")
    ways = {
        "copy": lambda: subprocess.run(["cp", "-r", folder, target], check=True),
        "save": lambda: save(model, target),
    }
    ways["save"]()  # what is compiled and imported is not measured
    shutil.rmtree(target)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, write in ways.items():
            read(folder)  # what is copied is in the page cache, as what is saved is in memory
            os.sync()
            seconds[name].append(card.seconds(write))
            shutil.rmtree(target)
    return {name: round(statistics.median(found), 3) for name, found in seconds.items()}


def main() -> None:
    arguments = parse_arguments()
    config = CONFIGS[arguments.config]
    if arguments.layers is not None:
        config = config.replace(num_layers=arguments.layers)
    extents = read_extents(arguments.mesh)
    use_every_core(math.prod(extents))
    folder = Path(tempfile.mkdtemp(prefix="grokjax-load-", dir=arguments.folder))
    try:
        release, ours = folder / "release", folder / "ours"
        release.mkdir()
        write_checkpoint(release, config)
        convert(release, ours, config)
        num_bytes = sum(path.stat().st_size for path in files_of(release))
        found = {path.name: measure(path, config, extents, arguments.repeats) for path in (release, ours)}
        found["writing"] = measure_saving(ours, config, extents, arguments.repeats)
    finally:
        shutil.rmtree(folder)
    record = {
        "benchmark": "load",
        "config": arguments.config,
        "layers": config.num_layers,
        "mesh": arguments.mesh,
        "checkpoint_bytes": num_bytes,
        "peak_memory_bytes": card.peak_memory(make_mesh(extents)),
        **found,
        **card.environment(),
    }
    for layout, seconds in found.items():
        rows = {name.replace("_", " "): f"{num_bytes / took / 1e9:.2f} GB/s" for name, took in seconds.items()}
        card.print_rows(layout, rows)
    card.print_json(record)


if __name__ == "__main__":
    main()
