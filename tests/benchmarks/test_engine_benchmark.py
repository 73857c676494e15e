"""The engine's benchmark in a process of its own: a card, medians, and a record of the documented keys."""

import json
import re
import subprocess
import sys

import pytest
from builders import ROOT

SCRIPT = ROOT / "benchmarks" / "engine.py"


@pytest.mark.thorough
def test_the_record_of_a_small_model_has_the_documented_keys() -> None:
    command = [sys.executable, str(SCRIPT), "--config", "tiny", "--layers", "1", "--prompt", "8", "--mesh", "1,2"]
    command += ["--new", "12", "--slots", "2", "--chunk", "8", "--requests", "4", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "tiny, int8 weights, bfloat16, 2 slots, mesh 1,2"
    assert "medians" in lines
    record = json.loads(lines[-1])
    keys = SCRIPT.read_text().split('"""')[1].partition("with the keys")[2].partition("and the environment")[0]
    documented = set(re.findall(r"`(\w+)`", keys))
    assert len(documented) > 20
    assert set(record) == documented | {"benchmark", "device", "devices", "jax", "python", "xla_flags"}
    assert record["slots"] == 2
    assert 0 < record["host_percent_of_step"] <= 100
    positive = ("_per_second", "_seconds", "_p50", "_p99", "_idle")
    assert all(record[name] > 0 for name in record if name.endswith(positive))
    median, most = record["chunks_later"]
    assert median <= most
