"""Runs a benchmark two ways in turn and prints the ratio of its figures: two commits, or two sets of options.

    python benchmarks/compare.py --base HEAD~1 --head HEAD -- decode.py --batch 8
    python benchmarks/compare.py --head-options=--quantized-table -- decode.py

A commit is checked out beside the repository; without `--base` and `--head` the working tree is used as it is. Runs
alternate, so that what else the machine does falls on both alike. For each number of the benchmark's JSON line, those
in lists too, it prints both medians, the median of the ratios head / base of each turn, and their range; last one JSON
line with the keys `command`, `base`, `head`, `turns` and `ratios`, each of these the median, the least and the largest.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a commit (default: the working tree)")
    parser.add_argument("--head", help="a commit (default: the working tree)")
    parser.add_argument("--base-options", default="", help="for the base alone")
    parser.add_argument("--head-options", default="", help="for the head alone")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("command", nargs="+", help="a benchmark and its options, after --")
    return parser.parse_args()


@contextlib.contextmanager
def checkout(commit: str | None) -> Iterator[Path]:
    """The folder of a commit, or of the working tree."""
    if commit is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def run_benchmark(folder: Path, command: list[str]) -> dict[str, float]:
    """The figures of a benchmark of the package in `folder`."""
    script, *options = command
    done = subprocess.run(
        [sys.executable, str(folder / "benchmarks" / script), *options],
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(figures_of(json.loads(done.stdout.splitlines()[-1])))


def figures_of(record: dict[str, object]) -> Iterator[tuple[str, float]]:
    """The numbers of a record, and those of its lists as `NAME[0]`, `NAME[1]`, ..."""
    for name, value in record.items():
        named = [(f"{name}[{i}]", one) for i, one in enumerate(value)] if isinstance(value, list) else [(name, value)]
        yield from ((name, one) for name, one in named if isinstance(one, int | float) and not isinstance(one, bool))


def ratios_of(bases: list[dict[str, float]], heads: list[dict[str, float]]) -> dict[str, list[float]]:
    """Figure -> its ratios head / base, turn by turn, for the positive numbers of both that ever differ."""
    figures = [name for name in bases[0] if name in heads[0]]
    pairs = {name: [(base[name], head[name]) for base, head in zip(bases, heads, strict=True)] for name in figures}
    return {
        name: [head / base for base, head in values]
        for name, values in pairs.items()
        if all(base > 0 for base, _ in values) and any(base != head for base, head in values)
    }


def main() -> None:
    arguments = parse_arguments()
    base_command = [*arguments.command, *shlex.split(arguments.base_options)]
    head_command = [*arguments.command, *shlex.split(arguments.head_options)]
    bases, heads = [], []
    with checkout(arguments.base) as base, checkout(arguments.head) as head:
        for _ in range(arguments.turns):
            bases.append(run_benchmark(base, base_command))
            heads.append(run_benchmark(head, head_command))
    ratios = ratios_of(bases, heads)
    print(f"{'':<34} {'base':>14} {'head':>14} {'head / base':>12}")
    for name, values in ratios.items():
        medians = (statistics.median(record[name] for record in records) for records in (bases, heads))
        columns = " ".join(f"{median:>14.6g}" for median in medians)
        print(f"{name:<34} {columns} {statistics.median(values):>12.3f}  ({min(values):.3f} to {max(values):.3f})")
    summary = {name: [round(f(values), 4) for f in (statistics.median, min, max)] for name, values in ratios.items()}
    described = {
        "base": f"{arguments.base or 'working tree'} {arguments.base_options}".strip(),
        "head": f"{arguments.head or 'working tree'} {arguments.head_options}".strip(),
    }
    print(json.dumps({"command": arguments.command, **described, "turns": arguments.turns, "ratios": summary}))


if __name__ == "__main__":
    main()
