"""Speed, memory and resumption of a conversion, against a plain copy of the same bytes.

`python benchmarks/convert.py` writes a checkpoint in the release's format with matrices of the released model's sizes
(5.2 GB with one layer and an eighth of the vocabulary), then, in turns, copies it with `cp` and converts it, each as a
process of its own; both leave the writing back to the kernel. Then it kills a conversion at random moments and compares
what comes of it, file by file, with one that was left alone. It needs three times the checkpoint's bytes on the disk.

The last line is JSON with the keys `config`, `layers`, `checkpoint_bytes`, `copy_seconds`, `convert_seconds`, `ratio`
(rate of converting over that of copying), `peak_memory_bytes`, `promised_memory_bytes`, `kills`, `identical` and the
environment.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import card
import ml_dtypes
import numpy as np

from grokjax import GrokConfig, plan_conversion
from grokjax.checkpoint import find_parameter, parameter_names, parameter_shapes
from grokjax.testing import write_tensor

CONFIGS = {"tiny": GrokConfig.tiny(), "grok_1": GrokConfig.grok_1().replace(num_layers=1, vocab_size=16384)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=tuple(CONFIGS), default="grok_1", help="sizes (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="so many layers")
    parser.add_argument("--repeats", type=int, default=3, help="of copying and converting")
    parser.add_argument("--kills", type=int, default=10, help="random moments at which a conversion is killed")
    parser.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    return parser.parse_args()


def write_checkpoint(folder: Path, config: GrokConfig) -> None:
    """Random files in the release's format, one after the other."""
    block = np.random.default_rng(0).integers(-127, 128, 1 << 24, dtype=np.int8)
    shapes = parameter_shapes(config)
    for file, parameter in parameter_names(config).items():
        shape = shapes[parameter]
        values = np.resize(block, shape)
        if find_parameter(parameter).is_quantizable:
            blocks = 8 if parameter.endswith(("output", "down")) else 1
            write_tensor(folder / file, values, np.ones((*shape[:-2], blocks, shape[-1]), ml_dtypes.bfloat16))
        else:
            write_tensor(folder / file, values.astype(np.float32))


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak memory in bytes of a process, after the disk has caught up with what was written before."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def run_killed(command: list[str], target: Path, kills: int, longest: float) -> int:
    """Kills the process at random moments, then lets it finish; how often there was something to kill."""
    moments, killed = random.Random(0), 0
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.05, 1) * longest)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    if not (target / "grokjax.json").exists():
        run(command)
    return killed


def digest(folder: Path) -> dict[str, str]:
    """A checksum of each file that holds values."""
    sums = {}
    for file in sorted((folder / "weights").rglob("*")):
        if file.is_file() and "c" in file.relative_to(folder).parts:
            with file.open("rb") as stream:
                sums[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def main() -> None:
    arguments = parse_arguments()
    config = CONFIGS[arguments.config]
    config = config if arguments.layers is None else config.replace(num_layers=arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        card.print_json(measure(Path(folder), config, arguments))


def measure(folder: Path, config: GrokConfig, arguments: argparse.Namespace) -> dict[str, object]:
    source, copy, target, config_file = (folder / name for name in ("ckpt-0", "copy", "target", "config.json"))
    config_file.write_text(config.to_json())
    source.mkdir()
    # In a process of its own: Linux counts the memory of the process that starts another to the new one's peak.
    writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(source, config))
    writer.start()
    writer.join()
    num_bytes = sum(file.stat().st_size for file in source.iterdir())
    plan = plan_conversion(source, target, config)
    card.print_rows(
        f"{arguments.config}, {config.num_layers} layers, int8 kept as it is",
        {
            "bytes to read and to write": f"{num_bytes / 1e9:.2f} GB",
            "units": str(plan.num_units),
            "promised memory": f"{plan.peak_host_bytes / 2**30:.2f} GiB",
        },
    )
    convert = [sys.executable, "-m", "grokjax", "convert", str(source), str(target), "--config", str(config_file)]
    copies, conversions = [], []
    for _ in range(arguments.repeats):
        copies.append(run(["cp", "-r", str(source), str(copy)])[0])
        shutil.rmtree(copy)
        shutil.rmtree(target, ignore_errors=True)
        conversions.append(run(convert))
    expected = digest(target)
    shutil.rmtree(target)
    seconds = statistics.median(seconds for seconds, _ in conversions)
    killed = run_killed(convert, target, arguments.kills, longest=2 * seconds / max(arguments.kills, 1))
    record = {
        "benchmark": "convert",
        "config": arguments.config,
        "layers": config.num_layers,
        "checkpoint_bytes": num_bytes,
        "copy_seconds": round(statistics.median(copies), 3),
        "convert_seconds": round(seconds, 3),
        "ratio": round(statistics.median(copies) / seconds, 3),
        "peak_memory_bytes": max(peak for _, peak in conversions),
        "promised_memory_bytes": plan.peak_host_bytes,
        "kills": killed,
        "identical": digest(target) == expected,
        **card.environment(),
    }
    card.print_rows(
        "medians",
        {
            "copying": f"{num_bytes / record['copy_seconds'] / 1e9:.2f} GB/s",
            "converting, start of Python included": f"{num_bytes / seconds / 1e9:.2f} GB/s",
            "ratio": f"{record['ratio']}",
            "peak memory of the process": f"{record['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"killed {killed} times": "bit-identical" if record["identical"] else "DIFFERENT",
        },
    )
    return record


if __name__ == "__main__":
    main()
