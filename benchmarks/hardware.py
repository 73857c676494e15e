"""Plans Grok-1 in int8 for real machines and writes the table of docs/hardware.md.

`python benchmarks/hardware.py --write` compiles the whole model for each machine, without any of them, and replaces the
table between the two marks. It needs the extras `plan-gpu` and `tpu`; without them it says so and the compiler for
CPUs stands in. The last line is JSON.
"""

import argparse
import sys
import time
from pathlib import Path

import card
import jax

from grokjax import Plan, plan
from grokjax.planning import Target
from grokjax.sharding import RULES

DOCUMENT = Path(__file__).parents[1] / "docs" / "hardware.md"
BEGIN, END = "<!-- begin: benchmarks/hardware.py -->", "<!-- end -->"
MACHINES = (
    ("a100-40g:16", (2, 8), "tensor"),
    ("a100-80g:8", (1, 8), "tensor"),
    ("h100-80g:8", (1, 8), "tensor"),
    ("h100-80g:16", (2, 8), "tensor"),
    ("h100-80g:16", (1, 16), "tensor"),
    ("h200:4", (1, 4), "tensor"),
    ("h200:8", (1, 8), "tensor"),
    ("b200:4", (1, 4), "tensor"),
    ("v5p:2x2x2", (1, 8), "tensor"),
    ("v5p:2x2x2", (1, 8), "expert"),
    ("v5e:4x8", (2, 16), "tensor"),
    ("v5e:4x8", (2, 16), "fsdp"),
    ("v6e:4x4", (1, 16), "tensor"),
    ("tpu7x:2x2x1", (1, 8), "tensor"),
)
HEADINGS = (
    "machine",
    "mesh",
    "rules",
    "weights a device",
    "all, 1 row",
    "fits",
    "most rows of 8192",
    "1 row, tokens/s",
    "32 rows, tokens/s",
    "prefill of 1024, tokens/s",
)


def row(one: Plan, many: Plan, rules: str) -> tuple[str, ...]:
    """The cells of a machine: plans with one row and with 32."""
    return (
        str(one.target),
        f"{one.mesh[0]} x {one.mesh[1]}",
        rules,
        f"{one.weights_bytes / 2**30:.1f} GiB",
        f"{one.total_bytes / 2**30:.1f} GiB",
        "yes" if one.fits else "no",
        str(one.find_largest_batch_size()),
        _speed(one.decode.tokens_per_second, one.fits),
        _speed(many.decode.tokens_per_second, many.fits),
        _speed(one.prefill.tokens_per_second, one.fits),
    )


def _speed(tokens_per_second: float | None, fits: bool | None) -> str:
    return f"{tokens_per_second:.0f}" if tokens_per_second is not None and fits else "-"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as Markdown."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(text: str) -> None:
    """Puts the table between the marks of the document."""
    document = DOCUMENT.read_text()
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/hardware.md, else to standard output")
    parser.add_argument("--only", metavar="NAME", help="machines whose name begins so")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 32)
    rows, start = [], time.perf_counter()
    for target, mesh, rules in MACHINES:
        if arguments.only and not target.startswith(arguments.only):
            continue
        missing = Target.parse(target).missing
        if missing:
            print(f"{target}: without {missing}, the compiler for CPUs stands in", file=sys.stderr)
        plans = [plan(target=target, mesh=mesh, rules=RULES[rules], batch_size=size) for size in (1, 32)]
        rows.append(row(*plans, rules))
        print(f"{target} {rules}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    text = table(rows)
    if arguments.write:
        write(text)
    else:
        print(text)
    card.print_json({"benchmark": "hardware", "rows": rows, **card.environment()})


if __name__ == "__main__":
    main()
