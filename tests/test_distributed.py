"""Two processes of four devices do together what one process of eight does; one that dies stops the other."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from builders import ROOT, write_checkpoint
from flax import nnx
from goldens import check_logits
from member import ENGINE, FOUR_EXPERTS, GENERATE, GOLDEN, TINY, answer, show

from grokjax import cli
from grokjax.checkpoint import describe, load, verify
from grokjax.config import GrokConfig
from grokjax.engine import Engine
from grokjax.sharding import make_mesh

# Of a process that has died, the other hears after 6 s at the latest, the heartbeat's time in member.py.
BOUND_SECONDS = 40


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def two_processes(job: str, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    port = str(free_port())
    command = [sys.executable, str(ROOT / "tests" / "member.py"), job]
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(2):
            log = stack.enter_context((folder / f"{job}-{number}.log").open("wb"))
            process = subprocess.Popen([*command, str(number), port, str(folder)], stderr=log)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have done their work, and one has saved what they loaded."""
    folder = tmp_path_factory.mktemp("together")
    for number in range(2):
        write_checkpoint(folder / f"seed-{number}", TINY, seed=number)
    write_checkpoint(folder / "experts", FOUR_EXPERTS)
    with two_processes("work", folder) as processes:
        for number, process in enumerate(processes):
            assert process.wait(600) == 0, (folder / f"work-{number}.log").read_text()
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"work-{number}.json").read_text()) for number in range(2)]


def assert_same_parameters(left: Any, right: Any) -> None:
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(model)) for model in (left, right)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_two_processes_give_the_golden_logits(folder: Path) -> None:
    """Each has half of the experts."""
    for number in range(2):
        check_logits(GOLDEN, np.load(folder / f"logits-{number}.npy"))


def test_each_process_reads_its_own_part(found: list[dict[str, Any]]) -> None:
    """Of a load: half of the files, and norms."""
    total = sum(file.stat().st_size for file in GOLDEN.checkpoint.iterdir())
    for result in found:
        assert result["devices"] == 8
        assert 0.45 * total < result["loaded_bytes"] < 0.6 * total


def test_what_two_processes_convert_is_complete(folder: Path, found: list[dict[str, Any]]) -> None:
    verify(folder / "converted", folder / "experts", FOUR_EXPERTS)
    assert [result["converted"] for result in found] == [describe(folder / "converted").num_bytes] * 2


def test_what_two_save_one_restores(folder: Path) -> None:
    mesh = make_mesh((4, 2))
    written = load(folder / "experts", FOUR_EXPERTS, mesh, np.float32)
    assert_same_parameters(load(folder / "saved", mesh=mesh, dtype=np.float32), written)


def test_what_the_first_refuses_all_refuse(found: list[dict[str, Any]]) -> None:
    assert re.search("saved: exists already: choose another path", found[0]["refused"])
    assert found[1]["refused"] == f"process 0: {found[0]['refused']}"


def test_another_checkpoint_of_the_same_sizes_on_one_host_is_refused_on_all(found: list[dict[str, Any]]) -> None:
    for number, result in enumerate(found):
        assert re.search(f"seed-{number}.*: process 1 has other weights there than process 0", result["other_weights"])


def test_processes_that_come_to_different_things_say_so(found: list[dict[str, Any]]) -> None:
    message = (
        "process 0 has come to the end of /0, and process 1 to the end of /1: make the same calls in the same order on "
        "every process."
    )
    assert [result["elsewhere"] for result in found] == [message] * 2


def test_an_engine_over_two_processes_answers_as_one(folder: Path, found: list[dict[str, Any]]) -> None:
    expected = answer(Engine(load(folder / "seed-0", TINY, make_mesh((1, 1)), np.float32), **ENGINE))
    assert found[1]["answers"] is None
    for ours, theirs in zip(found[0]["answers"], expected, strict=True):
        assert ours["ids"] == theirs["ids"]
        np.testing.assert_allclose(ours["scores"] or [], theirs["scores"] or [], atol=1e-4)


# What JAX says when it ends a process because another has gone, which it may do before the process can say anything:
# where process 0 has gone, and where all wait for the one that has.
BY_JAX = "Terminating process because the JAX distributed service detected fatal errors"
# The job and which process dies -> what the other says.
TOLD = {
    ("meeting", 0): rf"{BY_JAX}|another process has gone before the reading of the prompts \(",
    ("batch", 0): rf"{BY_JAX}|a step of all processes failed: .* Another process may have died",
    (
        "batch",
        1,
    ): r"error: the model failed: .* Another process may have died: see its messages\. The results so far are",
    ("prompt", 0): rf"{BY_JAX}|error in process 1: a step of all processes failed: .* Another process may have died",
    ("prompt", 1): r"error: the model failed: .* Another process may have died: see its messages\. If memory was short",
}


@pytest.mark.thorough  # each waits for the heartbeat's time
@pytest.mark.parametrize(("job", "mortal"), TOLD)
def test_a_death_stops_the_other(tmp_path: Path, job: str, mortal: int) -> None:
    (tmp_path / "config.json").write_text(TINY.replace(max_seq_len=128).to_json())
    (tmp_path / "prompts.txt").write_text("abc\ndef\n")
    with two_processes(f"{job}-{mortal}", tmp_path) as processes:
        assert processes[mortal].wait(300) == -signal.SIGKILL
        assert processes[1 - mortal].wait(BOUND_SECONDS) != 0
    told = (tmp_path / f"{job}-{mortal}-{1 - mortal}.log").read_text()
    assert re.search(TOLD[job, mortal], told), told
    assert f'File "{ROOT}' not in told  # as in a traceback


def without_default() -> dict[str, str]:
    """The environment without the tests' default device, which would leave every process alone."""
    return {name: value for name, value in os.environ.items() if name != "JAX_DEFAULT_DEVICE"}


def by_hand(number: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The options and the environment of a process that is started by hand."""
    joining = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(number)]
    return joining, without_default()


def by_slurm(number: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Those of one that SLURM starts, as far as JAX looks at them."""
    told = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(number), "LOCALID": "0"}
    environment = {f"SLURM_{name}": value for name, value in told.items()} | {"JAX_COORDINATOR_PORT": str(port)}
    return ["--distributed"], without_default() | environment


@contextlib.contextmanager
def commands(
    folder: Path, *options: list[str], started: Any, what: Sequence[str] = (*GENERATE, "tiny", "abc")
) -> Iterator[list[subprocess.Popen[str]]]:
    """A command on each of two processes, with an option of its own."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = []
        for number, own in enumerate(options):
            joining, environment = started(number, port)
            command = [sys.executable, "-m", "grokjax", *what, *joining, *own]
            process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes


@pytest.mark.parametrize(
    ("option", "told", "started"),
    [
        (["--temperature", "-1"], "temperature=-1.0 must be", by_slurm),
        pytest.param(
            ["--dtype", "float8"], "its options are wrong: see its message", by_hand, marks=pytest.mark.thorough
        ),
        pytest.param(["--mesh", "1,3"], "2 hosts cannot share a mesh of 1 x 3", by_hand, marks=pytest.mark.thorough),
    ],
)
def test_an_option_that_is_wrong_on_one_process_ends_all(
    tmp_path: Path, option: list[str], told: str, started: Any
) -> None:
    """Within seconds, of which Python needs some to start; the first process has been told, and did not look itself."""
    with commands(tmp_path, [], option, started=started) as processes:
        (_, first), (_, second) = [process.communicate(timeout=BOUND_SECONDS) for process in processes]
        assert [process.returncode for process in processes] == [2, 2]
    assert re.search(rf"^grokjax: error: process 1: .*{re.escape(told)}", first, re.MULTILINE), first
    assert "Traceback" not in first + second


@pytest.mark.thorough
def test_the_first_process_prints(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(TINY.to_json())
    expected = show(tmp_path)
    assert expected
    with two_processes("show", tmp_path) as processes:
        logs = [tmp_path / f"show-{number}.log" for number in range(2)]
        assert [process.wait(300) for process in processes] == [0, 0], [log.read_text() for log in logs]
    assert [json.loads((tmp_path / f"show-{number}.json").read_text()) for number in range(2)] == [expected, ""]
    assert ["grokjax:" in log.read_text() for log in logs] == [True, False]


@pytest.mark.thorough
def test_texts_are_scored_over_two_processes_as_over_one(tmp_path: Path) -> None:
    """With the most probable tokens for one of them; interrupted, the same command goes on."""
    texts = [{"prompt": "The answer is", "logprobs": 3}, {"prompt": "Once upon a time"}, {"prompt": ""}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    with contextlib.chdir(tmp_path):
        assert cli.main(["make-release-fixture", "release", "--layers", "3"]) == 0
    model = ["--checkpoint", "release", "--tokenizer", "bytes", "--stream", "--dtype", "float32"]
    score = ["score", "texts.jsonl", *model, "--max-len", "32"]

    def run(output: str) -> dict[int, dict[str, Any]]:
        command = [*score, "--output", output, "--html", "page.html"]
        with commands(tmp_path, [], [], started=by_hand, what=command) as processes:
            told = [process.communicate(timeout=300)[1] for process in processes]
            assert [process.returncode for process in processes] == [1, 0], told  # the first tells of the empty text
        records = map(json.loads, (tmp_path / output).read_text().splitlines())
        return {record["id"]: record for record in records}

    found = run("together")
    lines = (tmp_path / "together").read_bytes().splitlines(keepends=True)
    (tmp_path / "together").write_bytes(lines[0] + lines[1][:20])
    again = run("together")
    with contextlib.chdir(tmp_path):
        assert cli.main([*score, "--output", "alone", "--mesh", "1,1"]) == 1
    for line in (tmp_path / "alone").read_text().splitlines():
        alone = json.loads(line)
        for one in (found[alone["id"]], again[alone["id"]]):
            assert one.get("error") == alone.get("error")
            both = (record.get("prompt_logprobs", ())[1:] for record in (one, alone))
            for ours, theirs in zip(*both, strict=True):
                assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
                best = [[token["logprob"] for token in scored.get("top", ())] for scored in (ours, theirs)]
                np.testing.assert_allclose(*best, atol=1e-4)
                assert len(best[0]) == texts[alone["id"] - 1].get("logprobs", 0)
    assert (tmp_path / "page.html").read_text().count("<h2>") == len(texts)


@pytest.mark.thorough
def test_a_text_goes_on_with_layers_that_stream_to_two_processes(tmp_path: Path) -> None:
    """Which must ask for the same experts; each reads what its own devices hold of them."""
    config = GrokConfig.tiny()
    write_checkpoint(tmp_path / "model", config)
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "texts.txt").write_text("The answer is\n")
    source = ["--checkpoint", "model", "--config", "config.json", "--tokenizer", "bytes", "--dtype", "float32"]
    generate = ["generate", *source, "--prompts", "texts.txt", "--slots", "1", "--max-new-tokens", "5", "--ignore-eos"]
    with commands(tmp_path, [], [], started=by_hand, what=[*generate, "--stream", "--output", "together"]) as processes:
        told = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], told
    with contextlib.chdir(tmp_path):
        assert cli.main([*generate, "--output", "alone", "--mesh", "1,1"]) == 0
    together, alone = (json.loads((tmp_path / output).read_text()) for output in ("together", "alone"))
    assert together["token_ids"] == alone["token_ids"]
    assert len(alone["token_ids"]) == 5


@pytest.mark.thorough
def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    """Two processes on one machine, as docs/distributed.md shows them."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    (block,) = [block for block in re.findall(r"```bash no-run\n(.*?)```", text, re.DOTALL) if "localhost" in block]
    changes = {
        "localhost:9876": f"localhost:{free_port()}",
        "grokjax ": f"{sys.executable} -m grokjax ",
        "XLA_FLAGS=": 'XLA_FLAGS="$XLA_FLAGS "',  # the example's number of devices beside the tests' own flags
    }
    script = functools.reduce(lambda text, change: text.replace(*change), changes.items(), block)
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env=without_default(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "8 x cpu, mesh 1 x 8, int8 weights, bfloat16" in done.stderr  # those of both processes
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(results) == 2
