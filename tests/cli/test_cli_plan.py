"""`grokjax plan`, as a user calls it."""

import inspect
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT

from grokjax import planning
from grokjax.cli import main, plan
from grokjax.config import GrokConfig
from grokjax.planning import GradientPlan, Plan, Suggestion, suggest

SMALL = ["--config", "tiny", "--max-len", "32", "--prompt", "8", "--prefill-rows", "1"]
DEFAULT = inspect.signature(suggest).parameters["batch_size"].default
OF_A_PLAN, REST = (ROOT / "docs" / "hardware.md").read_text().split("\n## As JSON\n")[1].split("\nWith `--suggest`")
OF_A_SUGGESTION, OF_A_GRADIENT = REST.partition("`--plot")[0], REST.partition("With `--gradient`")[2]
KEYS = {"weights", "cache", "temporary", "other", "total"}


@pytest.fixture(autouse=True)
def only_the_cpu_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same programs whether or not the extras for GPUs and TPUs are installed."""
    for compiler in ("jax_plugins.xla_cuda13", "libtpu"):
        monkeypatch.setitem(sys.modules, compiler, None)


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *SMALL, *arguments]) == 0
    return capsys.readouterr().out


def test_the_table_says_whether_it_fits_and_how_fast_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a picture is drawn."""
    monkeypatch.setattr(Plan, "find_largest_batch_size", lambda _: 4096)
    monkeypatch.setattr(Plan, "find_largest_max_len", lambda _: 128)
    monkeypatch.setattr(Plan, "plan_gradient", lambda _, tokens: GradientPlan(tokens, 1 << 20, 1 << 30, 1 << 40, False))
    out = run_plan(capsys, "--target", "h100:2", "--gradient", "16", "--plot", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^gradient of 16 tokens\n  gradients +1\.000 MiB\n  temporaries +1\.000 GiB\n", out, re.MULTILINE)
    assert re.search(r"^  total +1\.000 TiB  does not fit$", out, re.MULTILINE)
    assert "h100-80g:2, mesh 1,2: batch 1, 32 tokens a row, programs by the compiler for cpu" in out
    for name in ("weights", "cache", "temporaries", "total", "usable", "most rows of 32", "most tokens a row"):
        assert f"  {name} " in out
    assert re.search(r"^  usable +75\.145 GiB  fits$", out, re.MULTILINE)
    assert "5 all-reduce" in out
    assert out.count("tokens/s  bound by") == 2


def test_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys are those of the table in docs/hardware.md."""
    monkeypatch.setattr(Plan, "plan_gradient", lambda _, tokens: GradientPlan(tokens, 1, 2, 4, None))
    options = ("--target", "cpu:8", "--cache-dtype", "int8", "--gradient", "16", "--json")
    record = json.loads(run_plan(capsys, *options))
    gradient = record.pop("gradient")
    assert all(f"`{key}`" in OF_A_GRADIENT for key in gradient), "docs/hardware.md lists other keys"
    assert list(gradient.values()) == [16, 1, 2, 4, None]
    assert all(isinstance(record[f"{key}_bytes_per_device"], int) for key in KEYS)
    assert record["total_bytes_per_device"] == sum(record[f"{key}_bytes_per_device"] for key in KEYS - {"total"})
    assert (record["mesh"], record["fits"], record["largest_batch_size"]) == ([1, 8], None, None)
    step = record["decode"]
    assert step.keys() == record["prefill"].keys()
    assert keys_of(OF_A_PLAN) == {*record, *step, *step["transfers"][0]}


def keys_of(text: str) -> set[str]:
    return set(re.findall(r"`([a-z_]+)`", text))


def test_given_figures_and_dtypes_stand_in_place_of_the_usual_ones(capsys: pytest.CaptureFixture[str]) -> None:
    # 10 KiB: less than the tiny model's weights, whatever the compiler adds to them.
    figures = ["--hbm-gib", "0.00001", "--bandwidth-gbs", "1", "--tflops", "1", "--link-gbs", "1", "--latency-us", "1"]
    record = json.loads(run_plan(capsys, "--target", "cpu:8", *figures, "--cache-dtype", "int8", "--json"))
    # Keys and values of two layers, 32 tokens, a head of 16 on a device with its float32 scale; the row's length.
    assert record["cache_bytes_per_device"] == 2 * 2 * 32 * (16 + 4) + 4
    assert (record["fits"], record["largest_batch_size"]) == (False, 0)
    assert record["usable_bytes_per_device"] == int(int(0.00001 * 2**30) * 0.95)
    decode = record["decode"]
    assert decode["memory_seconds"] == pytest.approx(decode["read_bytes"] / 1e9, rel=1e-3)
    assert decode["compute_seconds"] == pytest.approx(decode["operations"] / 1e12, rel=1e-3)
    assert decode["transfer_seconds"] > 5e-6


def test_suggestions_are_lines_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the library; of what does not fit it says why."""
    config = GrokConfig.tiny()
    made = planning.plan(config, target="h100:2", max_len=32, prompt_len=8)
    found = (
        Suggestion((1, 2), "tensor", made.weights_bytes, made.cache_bytes, made, "Quick."),
        Suggestion((2, 1), "fsdp", made.weights_bytes, made.cache_bytes, None, "Too large."),
    )

    def suggest_made(*_: Any, progress: Callable[[Suggestion, int, int], None], **__: Any) -> tuple[Suggestion, ...]:
        for number, one in enumerate(found, 1):
            progress(one, number, len(found))
        return found

    monkeypatch.setattr(plan, "suggest", suggest_made)
    assert main(["plan", *SMALL, "--devices", "2xH100-80G", "--suggest"]) == 0
    shown = capsys.readouterr()
    header, *lines = (line.split() for line in shown.out.splitlines())
    assert header == ["mesh", "rules", "fits", "tokens/s", "why"]
    speed = f"{made.decode.tokens_per_second:.0f}"
    assert lines == [["1,2", "tensor", "yes", speed, "Quick."], ["2,1", "fsdp", "no", "-", "Too", "large."]]
    assert "grokjax: 1 of 2 planned: mesh 1,2, tensor: Quick." in shown.err
    assert "grokjax: 2 of 2 planned: mesh 2,1, fsdp: Too large." in shown.err
    records = json.loads(run_plan(capsys, "--devices", "2xH100-80G", "--suggest", "--json"))
    assert [(record["fits"], record["reason"]) for record in records] == [(True, "Quick."), (False, "Too large.")]
    for record in records:
        assert keys_of(OF_A_SUGGESTION) == set(record), "docs/hardware.md lists other keys"


def test_the_batch_of_suggestions_is_that_of_the_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def note(*_: Any, **options: Any) -> tuple[Suggestion, ...]:
        asked.append(inspect.signature(suggest).bind(**options).arguments.get("batch_size", DEFAULT))
        return ()

    monkeypatch.setattr(plan, "suggest", note)
    for batch in ((), ("--batch", "1")):
        run_plan(capsys, "--target", "h100:8", "--suggest", *batch)
    assert asked == [DEFAULT, 1]
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert f"with --suggest {DEFAULT})" in capsys.readouterr().out


@pytest.mark.parametrize(("target", "extra"), [("h100-80g:2", "plan-gpu"), ("v5e:1x2", "tpu"), ("cpu:2", None)])
def test_the_extra_that_brings_the_compiler_is_named(
    target: str, extra: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "suggest", lambda *_, **__: [])
    assert main(["plan", *SMALL, "--target", target, "--suggest", "--json"]) == 0
    said = f"stands in for that of {target}, which the extra `{extra}` brings: run pip install '.[{extra}]' in the"
    assert (said in capsys.readouterr().err) == (extra is not None)


def test_errors_of_usage_come_before_all_else(capsys: pytest.CaptureFixture[str]) -> None:
    """No notice that a compiler is missing stands before them."""
    for arguments in (["--suggest", "--mesh", "1,8"], ["--mesh", "1"]):
        assert main(["plan", *SMALL, "--target", "h100:8", *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("grokjax: error: ")


def test_a_configuration_is_read_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(GrokConfig.tiny().replace(max_seq_len=16).to_json())
    assert main(["plan", *SMALL, "--config", str(tmp_path / "config.json")]) == 2
    assert "max_len=32 must be between 1 and max_seq_len=16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "grok_9"], "--config grok_9: neither a file nor one of tiny, bench_1b, grok_1"),
        (["--target", "h100:many"], "'h100:many' is not of the form cpu:8 or h200:8"),
        (["--devices", "H100"], "--devices 'H100': give a number and a name, such as 16xH100-80G"),
        (["--devices", "8xv5e"], "'v5e:8' is not of the form .* v5p:2x2x2"),
        (["--mesh", "3,3"], "a mesh of 3 x 3 devices is not the 8 of cpu:8"),
        (["--hbm-gib", "0"], "figures of a device must be above 0"),
        (["--hbm-gib", "inf"], "figures of a device must be above 0 and finite"),
        (["--bandwidth-gbs", "nan"], "figures of a device must be above 0 and finite"),
        (["--latency-us", "nan"], "--latency-us nan must be 0 or more, and finite"),
        (["--latency-us", "-1"], "--latency-us -1.0 must be 0 or more, and finite"),
        (["--suggest", "--mesh", "1,8"], "leave out --mesh, --rules, --plot"),
        (["--suggest", "--rules", "fsdp"], "leave out --mesh, --rules, --plot"),
        (["--suggest", "--plot", "a.png"], "leave out --mesh, --rules, --plot"),
        (["--suggest", "--gradient", "8"], "leave out --mesh, --rules, --plot and --gradient"),
        (["--gradient", "1"], "--gradient=1 must be an integer between 2 and 256"),
        (["--batch", "0"], "batch_size=0 must be an integer between 1 and 4194304"),
        (["--prompt", "0"], "max_len=0 must be between 1"),
    ],
)
def test_errors_are_sentences(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, *arguments]) == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)


def test_a_picture_is_not_drawn_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.png").symlink_to(tmp_path / "outside.png")
    assert main(["plan", *SMALL, "--plot", str(tmp_path / "plan.png")]) == 2
    assert "plan.png: a link, and nothing is written" in capsys.readouterr().err


def test_a_picture_needs_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", *SMALL, "--plot", str(tmp_path / "plan.png")]) == 2
    assert "--plot needs matplotlib, the extra `plot`: run pip install" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_refused_before_the_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plan", *SMALL, "--plot", str(tmp_path / "missing" / "plan.png")]) == 2
    assert "plan.png cannot be written: there is no folder" in capsys.readouterr().err


def run_alone(*arguments: str) -> tuple[dict[str, Any], resource.struct_rusage]:
    """The record that the command prints in a process of its own, and what the process used."""
    command = [sys.executable, "-m", "grokjax", "plan", *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return json.loads(output), used


def test_more_devices_than_this_machine_has() -> None:
    record, _ = run_alone(*SMALL, "--target", "cpu:16")
    assert record["mesh"] == [2, 8]


@pytest.mark.thorough
def test_the_real_model_in_little_time_and_memory() -> None:
    """Under 60 s and 4 GiB.

    Of processors' time, which is no less than a free machine's clock shows: here other tests may run meanwhile.
    """
    record, used = run_alone("--devices", "16xH100-80G")
    assert used.ru_utime + used.ru_stime < 60
    assert used.ru_maxrss < 4 * 2**20
    assert record["fits"]
    assert record["mesh"] == [1, 16]


def test_a_pass_over_weights_that_stream_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--stream", "--config", "tiny", "--target", "h100:1", "--tokens", "8", "--disk-gbs", "2"]
    assert main([*command, "--device-memory", "1GiB"]) == 0
    said = capsys.readouterr().out
    assert "layers from the disk" in said
    assert "unknown: give --host-gbs" in said
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["num_tokens"] == 8
    assert record["on_devices"] == GrokConfig.tiny().num_layers
    assert main(["plan", "--stream", "--disk-gbs", "0"]) == 2
    assert "disk_bandwidth=0.0 must be above 0" in capsys.readouterr().err
