"""The tables of the README, docs/performance.md and the notebook, made from stored results.

`benchmarks/results/NAME.jsonl` holds last lines of `benchmarks/NAME.py`, one a run. In a page a table stands between
`<!-- results NAME -->` and `<!-- end -->`, or between `<!-- results NAME: COLUMN; COLUMN -->` and the same end, with
these columns alone. `python benchmarks/tables.py --write` renews them; without `--write` it only says whether they are
new. To add a run: `python benchmarks/decode.py | tail -1 >> benchmarks/results/decode.jsonl`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "performance.md",
    *(ROOT / "benchmarks" / "notebook" / name for name in ("engine.md", "gpu.md", "llama-cpp.md")),
)
MARKED = re.compile(r"(<!-- results (\w+)(?:: (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL)

# A figure of a record, as text.
Column = Callable[[dict], str]


def number(name: str, digits: int = 0, factor: float = 1) -> Column:
    """A number of the record, or all of a list; nothing where it is absent."""

    def text(record: dict) -> str:
        values = record.get(name, [])
        values = values if isinstance(values, list) else [values]
        return ", ".join(f"{factor * value:.{digits}f}" for value in values) or "-"

    return text


def listed(name: str) -> Column:
    return lambda record: ", ".join(map(str, record[name]))


def table_dtype(record: dict) -> str:
    return "int8" if record["quantized_table"] else record["dtype"]


COLUMNS: dict[str, dict[str, Column]] = {
    "decode": {
        "jax": lambda record: record["jax"],
        "mesh": lambda record: record["mesh"],
        "rows": number("batch_size"),
        "table": table_dtype,
        "prefill tokens/s": number("prefill_tokens_per_second"),
        "decode tokens/s": number("decode_tokens_per_second", 1),
        "percent of the bandwidth": number("percent_of_bandwidth"),
        "llama.cpp: prefill": number("peer_prefill_tokens_per_second"),
        "llama.cpp: decode": number("peer_decode_tokens_per_second", 1),
        "ours / llama.cpp: prefill": number("prefill_ratio", 2),
        "ours / llama.cpp: decode": number("decode_ratio", 2),
    },
    "prefill": {
        "jax": lambda record: record["jax"],
        "mesh": lambda record: record["mesh"],
        "tokens": listed("lengths"),
        "tokens/s": number("tokens_per_second"),
        "percent of the rate of square products": number("percent_of_matmul_rate"),
        "llama.cpp": number("peer_tokens_per_second"),
        "ours / llama.cpp": number("peer_ratio", 2),
    },
    "decode_gpu": {
        "device": lambda record: record["device"],
        "jax": lambda record: record["jax"],
        "layers of grok_1": number("layers"),
        "rows": number("batch_size"),
        "ms a step": number("decode_step_seconds", 2, 1e3),
        "tokens/s": number("decode_tokens_per_second"),
        "GB read a step": number("step_bytes", 1, 1e-9),
        "measured bandwidth, GB/s": number("read_bandwidth", 0, 1e-9),
        "percent of it": number("percent_of_bandwidth"),
    },
    "prefill_gpu": {
        "device": lambda record: record["device"],
        "jax": lambda record: record["jax"],
        "layers of grok_1": number("layers"),
        "tokens": listed("lengths"),
        "ms": number("prefill_seconds", 0, 1e3),
        "tokens/s": number("tokens_per_second"),
        "measured rate of square products, TFLOP/s": number("matmul_rate", 0, 1e-12),
        "percent of it": number("percent_of_matmul_rate"),
    },
    "moe": {
        "jax": lambda record: record["jax"],
        "rows": listed("rows"),
        "ms a layer": number("layer_seconds", 2, 1e3),
        "percent of the bandwidth": number("percent_of_bandwidth"),
        "percent of the rate of square products": number("percent_of_matmul_rate"),
    },
    "attention": {
        "jax": lambda record: record["jax"],
        "rows": number("batch_size"),
        "filled/allocated": listed("sizes"),
        "us a layer": number("layer_seconds", 0, 1e6),
        "percent of the bandwidth": number("percent_of_bandwidth"),
    },
    "engine": {
        "jax": lambda record: record["jax"],
        "layers": number("layers"),
        "bare loop, tokens/s": number("bare_tokens_per_second", 1),
        "engine": number("full_tokens_per_second", 1),
        "of the bare loop": number("fraction_of_bare", 2),
        "host, percent of a step": number("host_percent_of_step", 1),
        "all at once, new tokens/s": number("all_at_once_new_tokens_per_second", 1),
        "Poisson: first token, half and 99 % within, s": lambda record: (
            f"{record['first_token_p50']:.2f}, {record['first_token_p99']:.2f}"
        ),
        "a chunk, s": number("chunk_seconds", 2),
        "chunks later behind a long prompt, median and most": number("chunks_later", 2),
        "beside a running request": number("chunks_later_beside_decoding", 2),
    },
    "startup": {
        "jax": lambda record: record["jax"],
        "first token, nothing compiled": number("cold_seconds", 1),
        "compiled before": number("warm_seconds", 1),
        "import grokjax": number("import_seconds", 2),
        "over jax and flax": number("import_ratio", 2),
    },
}


def choose_columns(name: str, chosen: str | None) -> dict[str, Column]:
    """The columns of a table by their headings: all, or those that a page names between semicolons.

    Raises:
      SystemExit: No such table is known, or it has no such column.
    """
    if name not in COLUMNS:
        raise SystemExit(f"There is no table '{name}': choose one of {', '.join(COLUMNS)}.")
    columns = COLUMNS[name]
    if chosen is None:
        return columns
    headings = chosen.split("; ")
    if unknown := [heading for heading in headings if heading not in columns]:
        raise SystemExit(f"The table '{name}' has no column '{unknown[0]}': choose from {'; '.join(columns)}.")
    return {heading: columns[heading] for heading in headings}


def make_table(columns: dict[str, Column], records: list[dict]) -> str:
    """A Markdown table, a row for each record."""
    rows = [list(columns), ["---"] * len(columns), *([make(record) for make in columns.values()] for record in records)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read_records(name: str) -> list[dict]:
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        raise SystemExit(f"The page asks for the results of '{name}', and there is no file {path}.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def renew(page: str) -> str:
    """The page with all its tables made anew."""

    def table(found: re.Match) -> str:
        opening, name, chosen, end = found.groups()
        return opening + make_table(choose_columns(name, chosen), read_records(name)) + end

    return MARKED.sub(table, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="changes the pages")
    arguments = parser.parse_args()
    for path in PAGES:
        page = path.read_text()
        renewed = renew(page)
        if arguments.write:
            path.write_text(renewed)
        elif renewed != page:
            sys.exit(f"The tables of {path.name} are not those of the results: run benchmarks/tables.py --write.")


if __name__ == "__main__":
    main()
