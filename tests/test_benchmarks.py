"""The decode benchmark in a process of its own: first the card, then medians, last one JSON line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "decode.py"


@pytest.fixture(scope="module")
def output() -> list[str]:
    command = [sys.executable, str(SCRIPT), "--config", "tiny", "--layers", "1", "--prompt", "8", "--new", "4"]
    command += ["--repeats", "1", "--mesh", "1,2", "--batch", "2"]
    # The checkout's own package, also where another one is installed.
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.splitlines()


def test_the_card_comes_first(output: list[str]) -> None:
    assert output[0] == "tiny, int8 weights, bfloat16, batch 2, mesh 1,2"
    ceiling = next(n for n, line in enumerate(output) if line.split()[0] == "ceiling")
    assert ceiling < output.index("medians")


def test_the_last_line_is_a_record(output: list[str]) -> None:
    record = json.loads(output[-1])
    for name in ("decode_tokens_per_second", "prefill_tokens_per_second", "percent_of_bandwidth", "compile_seconds"):
        assert record[name] > 0
    assert record["mesh"] == "1,2"
    assert record["batch_size"] == 2


def test_the_documented_keys_are_there(output: list[str]) -> None:
    docstring = SCRIPT.read_text().split('"""')[1]
    documented = set(re.findall(r"`(\w+)`", docstring.partition("with the keys")[2]))
    assert len(documented) > 10
    environment = {"benchmark", "device", "devices", "jax", "python"}
    assert set(json.loads(output[-1])) == documented | environment
