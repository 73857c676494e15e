"""Speed and memory of loading a checkpoint onto the devices, against plainly reading the same files, and of saving it.

`python benchmarks/load.py` writes a checkpoint in the release's format with matrices of the released model's sizes
(5.2 GB with one layer and an eighth of the vocabulary) and converts it to ours. Then, in turns, it reads all files of
one, merely takes as much memory, which loading needs besides, and loads it: first with nothing in the page cache and
then at once again. The page cache is emptied of these files by `posix_fadvise(POSIX_FADV_DONTNEED)`, which needs no
rights but that they have been written back. Last it copies ours with `cp` and saves the loaded model, in turns; both
leave the writing back to the kernel, and begin when the disk has caught up. It needs three times the checkpoint's bytes
on the disk.

`--layouts safetensors` measures files in bfloat16, of twice as many bytes, which `--experts 4` halves.

The last line is JSON with the keys `config`, `layers`, `experts`, `mesh`, `peak_memory_bytes` (of the process, the
model in it), of the layouts that were asked for `release`, `ours` and `safetensors` (their bytes, and the medians of
the seconds that reading, loading and taking memory took, cold and warm), with ours `writing` (its bytes, the medians of
the seconds that copying and saving took) and the environment.
"""

import argparse
import math
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import card
import jax
import numpy as np
from convert import CONFIGS, write_checkpoint

from grokjax import GrokConfig, convert, export, load, make_mesh, save
from grokjax.cli import read_extents, use_every_core

_BUFFER_BYTES = 1 << 20
_OTHERS = {"ours": convert, "safetensors": export}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=tuple(CONFIGS), default="grok_1", help="sizes (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="so many layers")
    parser.add_argument("--experts", type=int, help="so many experts")
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=("release", *_OTHERS),
        default=("release", "ours"),
        help="what to load (default: release ours)",
    )
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


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def take_memory(num_bytes: int) -> None:
    """Takes memory that the process does not have yet, page by page: a virtual machine may have to fetch it first."""
    np.empty(num_bytes, np.uint8)[:: mmap.PAGESIZE] = 1


def measure(folder: Path, config: GrokConfig, mesh: tuple[int, int], repeats: int) -> dict[str, float]:
    """Seconds of reading, loading and taking memory, each with an empty page cache and then at once again."""
    num_bytes = size_of(folder)

    def load_all() -> None:
        jax.block_until_ready(jax.tree.leaves(load(folder, config, make_mesh(mesh))))

    # Memory first: what has just been taken and given back is still there, as it is on a machine of one's own.
    ways = {"read": lambda: read(folder), "memory": lambda: take_memory(num_bytes), "load": load_all}
    load_all()  # what is compiled and imported is not measured
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, run in ways.items():
            forget(folder)
            for state in ("cold", "warm"):
                seconds.setdefault(f"{state}_{name}", []).append(card.seconds(run))
    return {"bytes": num_bytes} | {name: round(statistics.median(found), 6) for name, found in seconds.items()}


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
    return {"bytes": size_of(folder)} | {name: round(statistics.median(found), 6) for name, found in seconds.items()}


def main() -> None:
    arguments = parse_arguments()
    config = CONFIGS[arguments.config]
    if arguments.layers is not None:
        config = config.replace(num_layers=arguments.layers)
    if arguments.experts is not None:
        config = config.replace(num_experts=arguments.experts)
    extents = read_extents(arguments.mesh)
    use_every_core(math.prod(extents))
    folder = Path(tempfile.mkdtemp(prefix="grokjax-load-", dir=arguments.folder))
    found = {}
    try:
        release = folder / "release"
        release.mkdir()
        write_checkpoint(release, config)
        for layout in arguments.layouts:
            if layout in _OTHERS:
                _OTHERS[layout](release, folder / layout, config)
            found[layout] = measure(folder / layout, config, extents, arguments.repeats)
        if "ours" in found:
            found["writing"] = measure_saving(folder / "ours", config, extents, arguments.repeats)
    finally:
        shutil.rmtree(folder)
    record = {
        "benchmark": "load",
        "config": arguments.config,
        "layers": config.num_layers,
        "experts": config.num_experts,
        "mesh": arguments.mesh,
        "peak_memory_bytes": card.peak_memory(make_mesh(extents)),
        **found,
        **card.environment(),
    }
    for layout, seconds in found.items():
        rates = {name: seconds["bytes"] / took for name, took in seconds.items() if name != "bytes"}
        card.print_rows(layout, {name.replace("_", " "): f"{rate / 1e9:.2f} GB/s" for name, rate in rates.items()})
    card.print_json(record)


if __name__ == "__main__":
    main()
