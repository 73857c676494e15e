"""The benchmarks: first the card, then medians, last one JSON line."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from unittest import mock

import pytest
from builders import ROOT

BENCHMARKS = ROOT / "benchmarks"
ENVIRONMENT = {"benchmark", "device", "devices", "jax", "python", "xla_flags"}


@pytest.fixture(scope="module")
def output() -> list[str]:
    options = ["--layers", "1", "--prompt", "8", "--new", "4", "--repeats", "1", "--mesh", "1,2", "--batch", "2"]
    return run("decode.py", *options)


def run(script: str, *options: str) -> list[str]:
    """The lines that a benchmark of the tiny configuration prints, run in this process."""
    command, printed = [str(BENCHMARKS / script), "--config", "tiny", *options], io.StringIO()
    path = [str(BENCHMARKS), *sys.path]
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "path", path),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(command[0], run_name="__main__")
    return printed.getvalue().splitlines()


def documented_keys(script: str) -> set[str]:
    docstring = (BENCHMARKS / script).read_text().split('"""')[1]
    return set(re.findall(r"`(\w+)`", docstring.partition("with the keys")[2]))


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
    documented = documented_keys("decode.py")
    assert len(documented) > 10
    assert set(json.loads(output[-1])) == documented | ENVIRONMENT


@pytest.mark.thorough
def test_prefill_is_measured_at_every_length() -> None:
    lines = run("prefill.py", "--lengths", "8,300", "--repeats", "1", "--layers", "1")
    record = json.loads(lines[-1])
    assert set(record) == documented_keys("prefill.py") | ENVIRONMENT
    assert record["lengths"] == [8, 300]  # more than the configuration's longest sequence
    assert record["operations"][0] < record["operations"][1] / 20
    assert lines.index("medians") > 2


@pytest.mark.thorough
def test_experts_are_measured_at_every_number_of_rows() -> None:
    record = json.loads(run("moe.py", "--rows", "1,16", "--repeats", "1", "--layers", "1", "--mesh", "1,2")[-1])
    assert set(record) == documented_keys("moe.py") | ENVIRONMENT
    assert record["operations"] == [6 * rows * 2 * 64 * 128 for rows in (1, 16)]
    few, many = record["layer_bytes"]
    assert 3.5 < many / few < 4.1  # two experts of eight, and nearly all


@pytest.mark.thorough
def test_attention_is_measured_by_what_is_filled() -> None:
    record = json.loads(run("attention.py", "--sizes", "8/16,8/512,64/512", "--repeats", "1", "--layers", "1")[-1])
    assert set(record) == documented_keys("attention.py") | ENVIRONMENT
    few, same, many = record["layer_bytes"]
    assert few == same
    assert many - few == 2 * 4 * 16 * (64 - 8) * 4  # keys and values, kv heads, head size, entries, float32


def test_more_filled_than_allocated_is_refused() -> None:
    command = [sys.executable, str(BENCHMARKS / "attention.py"), "--config", "tiny", "--sizes", "9/8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "--sizes 9/8 is not FILLED/ALLOCATED with 1 to ALLOCATED entries filled." in done.stderr


@pytest.mark.thorough
def test_a_warm_start_compiles_nothing() -> None:
    """Seconds are compared by nobody here: beside other work they tell little."""
    record = json.loads(run("startup.py", "--repeats", "1")[-1])
    assert set(record) == documented_keys("startup.py") | ENVIRONMENT
    assert record["cold_programs"] > record["warm_programs"] == 0


@pytest.mark.thorough
def test_two_sets_of_options_are_compared_in_turn() -> None:
    """What is compared stands in one table, run by run in turn; two rows read more bytes than one."""
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--turns", "1", "--head-options=--batch 2"]
    small = ["attention.py", "--config", "tiny", "--layers", "1", "--sizes", "8/16,8/512,64/512", "--repeats", "1"]
    done = subprocess.run([*command, "--", *small], capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["base"], record["head"]) == ("working tree", "working tree --batch 2")
    assert 1 < record["ratios"]["layer_bytes[2]"][0] < 3
    median, least, most = record["ratios"]["layer_seconds[0]"]
    assert least <= median <= most


@pytest.mark.thorough
def test_killed_conversions_are_compared_with_one_left_alone() -> None:
    record = json.loads(run("convert.py", "--layers", "1", "--repeats", "1", "--kills", "1")[-1])
    assert set(record) == documented_keys("convert.py") | ENVIRONMENT
    assert record["identical"]


@pytest.mark.thorough
def test_scores_taps_and_statistics_are_measured_beside_a_prefill() -> None:
    record = json.loads(run("research.py", "--lengths", "8", "--repeats", "1", "--layers", "1")[-1])
    assert set(record) == documented_keys("research.py") | ENVIRONMENT
    assert record["score_to_prefill"][0] == pytest.approx(
        record["score_seconds"][0] / record["prefill_seconds"][0], rel=0.05
    )


@pytest.mark.thorough
def test_loading_is_measured_from_the_disk_and_from_the_page_cache() -> None:
    layouts = ("release", "ours", "safetensors")
    options = ["--config", "tiny", "--experts", "4", "--repeats", "1", "--layouts", *layouts]
    record = json.loads(run("load.py", *options)[-1])
    assert set(record) == documented_keys("load.py") | ENVIRONMENT
    assert record["experts"] == 4
    for layout in layouts:
        assert record[layout].keys() == {"bytes"} | {
            f"{state}_{what}" for state in ("cold", "warm") for what in ("read", "load", "memory")
        }
    assert record["safetensors"]["bytes"] > record["release"]["bytes"]


@pytest.mark.thorough
def test_a_pass_over_weights_that_stream_is_measured() -> None:
    options = ["--layers", "3", "--rows", "1", "--tokens", "8", "--mesh", "1,2"]
    record = json.loads(run("stream.py", *options)[-1])
    assert set(record) == documented_keys("stream.py") | ENVIRONMENT
    assert record["pass_seconds"] > 0


@pytest.mark.thorough
def test_guesses_are_measured_on_text_that_repeats_and_on_text_that_does_not() -> None:
    options = ["--layers", "1", "--slots", "2", "--prompt", "32", "--new", "32", "--guesses", "3", "--repeats", "1"]
    record = json.loads(run("guessing.py", *options)[-1])
    assert set(record) == documented_keys("guessing.py") | ENVIRONMENT
    assert 0 <= record["random_accepted"] < 0.1
