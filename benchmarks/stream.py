"""Speed and memory of scoring texts with weights that stream, against plainly reading the same files.

`python benchmarks/stream.py` writes a checkpoint in the release's format with matrices of the released model's sizes
(30 GB with six layers and an eighth of the vocabulary), which should be more than the machine's memory. Then it scores
a batch of random tokens, once to compile and once more, and reads all files, both from the disk: the page cache is
emptied as `load.py` does. Last, it times a model of one of the layers, in memory.

The last line is JSON with the keys `config`, `layers`, `mesh`, `rows`, `tokens` (of each row), `checkpoint_bytes`,
`read_seconds`, `pass_seconds`, `ratio` (rate of the pass over that of reading; far above 1 where few tokens leave
experts unread), `compute_seconds` (of as many models of one layer in memory), `peak_memory_bytes` (of the process, up
to the end of the pass) and the environment.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import card
import jax
import numpy as np
from convert import CONFIGS, write_checkpoint
from load import files_of, forget, read

from grokjax import Grok, GrokConfig, make_mesh, score, stream
from grokjax.cli import read_extents, use_every_core


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=tuple(CONFIGS), default="grok_1", help="sizes (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="so many layers (default: %(default)s)")
    parser.add_argument("--mesh", default="1,1", help="DATA,MODEL (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="texts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="of reading and scoring (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    return parser.parse_args()


def measure(folder: Path, config: GrokConfig, arguments: argparse.Namespace) -> dict[str, object]:
    mesh = make_mesh(read_extents(arguments.mesh))
    shape = (arguments.rows, arguments.tokens)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    lengths = np.full(shape[:1], shape[1], np.int32)

    def seconds(model: Grok) -> float:
        return card.seconds(lambda: jax.tree.leaves(score(model, tokens, lengths)))

    model = stream(folder, config, mesh)
    seconds(model)  # what is compiled is not measured
    passes, reads = [], []
    for _ in range(arguments.repeats):
        forget(folder)
        passes.append(seconds(model))
        forget(folder)
        reads.append(card.seconds(lambda: read(folder)))
    peak = card.peak_memory(mesh)
    kept = stream(folder, config, mesh, layers=[0], host_bytes=1 << 40)
    seconds(kept)
    computing = min(seconds(kept) for _ in range(3))
    pass_seconds, read_seconds = statistics.median(passes), statistics.median(reads)
    return {
        "benchmark": "stream",
        "config": arguments.config,
        "layers": config.num_layers,
        "mesh": arguments.mesh,
        "rows": arguments.rows,
        "tokens": arguments.tokens,
        "checkpoint_bytes": sum(path.stat().st_size for path in files_of(folder)),
        "read_seconds": round(read_seconds, 4),
        "pass_seconds": round(pass_seconds, 4),
        "ratio": round(read_seconds / pass_seconds, 3),
        "compute_seconds": round(config.num_layers * computing, 4),
        "peak_memory_bytes": peak,
    }


def main() -> None:
    arguments = parse_arguments()
    config = CONFIGS[arguments.config].replace(num_layers=arguments.layers)
    use_every_core(math.prod(read_extents(arguments.mesh)))
    with tempfile.TemporaryDirectory(prefix="grokjax-stream-", dir=arguments.folder) as folder:
        # In a process of its own, which counts to no peak here.
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(Path(folder), config))
        writer.start()
        writer.join()
        record = measure(Path(folder), config, arguments)
    num_bytes = record["checkpoint_bytes"]
    assert isinstance(num_bytes, int)
    rows = {name: f"{num_bytes / float(str(record[f'{name}_seconds'])) / 1e9:.2f} GB/s" for name in ("read", "pass")}
    card.print_rows(f"{num_bytes / 1e9:.1f} GB", rows)
    card.print_json(record | card.environment())


if __name__ == "__main__":
    main()
