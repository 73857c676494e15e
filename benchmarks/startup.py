"""Time from the start of a process to its first token, and what importing grokjax takes.

`python benchmarks/startup.py` starts processes that make a model of random weights (`GrokConfig.bench_1b()`, int8) and
draw one token after a prompt of 128 tokens: with an empty compilation cache, and with the one that this left. In turn
with them it imports grokjax, and jax with flax alone. It prints medians, and last one JSON line with the keys `config`,
`cold_seconds`, `warm_seconds`, `cold_programs`, `warm_programs` (that each compiled), `import_seconds`,
`jax_import_seconds`, `import_ratio` and the environment.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import card

FIRST_TOKEN = """
import sys
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
import numpy as np
import grokjax
from grokjax.cli import named_config
config = named_config("--config", sys.argv[1])
length = min(128, config.max_seq_len // 2)
model = grokjax.init(config)
prompts = np.random.default_rng(0).integers(3, config.vocab_size, (1, length))
cache = grokjax.KVCache.create(config, 1, length + 1)
logits, cache = grokjax.prefill(model, prompts, np.array([length]), cache)
print(int(logits.argmax()), flush=True)
"""


def run_seconds(*arguments: str) -> float:
    """Wall time of a process of this Python."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def run_first_token(config: str, folder: str) -> tuple[float, int]:
    """Wall time to a first token, and how many programs were compiled into the cache in `folder`."""
    before = len(list(Path(folder).glob("*-cache")))
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", FIRST_TOKEN, config, folder], stdout=subprocess.PIPE) as process:
        token = process.stdout.readline()
        seconds = time.perf_counter() - start  # not what Python and JAX take to end
    if not token or process.returncode:
        raise SystemExit("The process ended without a token; what it said stands above.")
    return seconds, len(list(Path(folder).glob("*-cache"))) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="bench_1b", help="tiny, bench_1b, grok_1 or a JSON file")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    runs = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            (cold, cold_programs), (warm, warm_programs) = (run_first_token(arguments.config, folder) for _ in range(2))
        runs.append([cold, warm, *(run_seconds("-c", f"import {names}") for names in ("grokjax", "jax, flax.nnx"))])
    cold, warm, ours, theirs = (statistics.median(column) for column in zip(*runs, strict=True))
    ratio = statistics.median(run[2] / run[3] for run in runs)
    card.print_rows(
        f"medians of {arguments.repeats}, {arguments.config}",
        {
            "first token, nothing compiled": f"{cold:.1f} s",
            "first token, compiled before": f"{warm:.1f} s",
            "import grokjax": f"{ours:.2f} s",
            "import jax, flax.nnx": f"{theirs:.2f} s",
            "ratio": f"{ratio:.2f}",
        },
    )
    card.print_json(
        {
            "benchmark": "startup",
            "config": arguments.config,
            "cold_seconds": round(cold, 2),
            "warm_seconds": round(warm, 2),
            "cold_programs": cold_programs,
            "warm_programs": warm_programs,
            "import_seconds": round(ours, 3),
            "jax_import_seconds": round(theirs, 3),
            "import_ratio": round(ratio, 2),
            **card.environment(),
        }
    )


if __name__ == "__main__":
    main()
