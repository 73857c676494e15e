"""Two processes of four devices do together what one process of eight does; one that dies stops the other."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from builders import ROOT
from flax import nnx
from goldens import ATOL_LOGITS, load_case
from member import CASE, ENGINE, GENERATE, MESHES, PROMPT, answer, show

from grokjax import cli, console, distributed, shared_steps
from grokjax.checkpoint import describe, load, save
from grokjax.config import GrokConfig
from grokjax.conversion import verify
from grokjax.distributed import Channel, DistributedError, initialize, on_first
from grokjax.engine import Engine
from grokjax.model import init
from grokjax.sharding import make_mesh
from grokjax.shared_steps import SharedSteps, follow

# Of a process that has died, the other hears after 10 s at the latest, the heartbeat's time in member.py.
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
    save(golden_model(), folder / "alone")
    (folder / "config.json").write_text(GrokConfig.tiny().replace(num_layers=1, max_seq_len=16).to_json())
    with two_processes("work", folder) as processes:
        for number, process in enumerate(processes):
            assert process.wait(600) == 0, (folder / f"work-{number}.log").read_text()
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"work-{number}.json").read_text()) for number in range(2)]


def golden_model(extents: tuple[int, int] = (1, 8)) -> Any:
    golden = load_case(CASE)
    return load(golden.checkpoint, golden.config, make_mesh(extents), np.float32)


def assert_same_parameters(left: Any, right: Any) -> None:
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(model)) for model in (left, right)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("mesh", MESHES)
def test_goldens(folder: Path, mesh: str) -> None:
    golden = load_case(CASE)
    expected = golden.arrays["float32"]["full_logits"]
    for number in range(2):
        logits = np.load(folder / f"{mesh}-{number}.npy")
        for row, length in enumerate(golden.lengths):
            np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=ATOL_LOGITS, rtol=0)


def test_each_reads_its_own_part(found: list[dict[str, Any]]) -> None:
    """Of a load: half of the files, and norms, router and scales."""
    total = sum(file.stat().st_size for file in load_case(CASE).checkpoint.iterdir())
    for result in found:
        assert result["devices"] == 8
        assert 0.45 * total < result["loaded_bytes"] < 0.6 * total


def test_conversion(folder: Path, found: list[dict[str, Any]]) -> None:
    golden = load_case(CASE)
    verify(folder / "converted", golden.checkpoint, golden.config)
    assert [result["converted"] for result in found] == [describe(folder / "converted").num_bytes] * 2


def test_saved_by_two_restored_by_one(folder: Path) -> None:
    assert_same_parameters(load(folder / "saved", mesh=make_mesh((4, 2)), dtype=np.float32), golden_model((4, 2)))


def test_what_the_first_refuses_all_refuse(found: list[dict[str, Any]]) -> None:
    assert re.search("saved: exists already: choose another path", found[0]["refused"])
    assert found[1]["refused"] == f"process 0: {found[0]['refused']}"


def test_processes_that_come_to_different_things(found: list[dict[str, Any]]) -> None:
    message = (
        "process 0 has come to the end of /0, and process 1 to the end of /1: make the same calls in the same order on "
        "every process."
    )
    assert [result["elsewhere"] for result in found] == [message] * 2


@pytest.mark.parametrize("mesh", MESHES)
def test_engine(found: list[dict[str, Any]], mesh: str) -> None:
    """The engine of the first process gives what an engine of one process gives."""
    expected = answer(Engine(golden_model(), **ENGINE))
    assert found[1]["answers"][mesh] is None
    for ours, theirs in zip(found[0]["answers"][mesh], expected, strict=True):
        assert ours["ids"] == theirs["ids"]
        np.testing.assert_allclose(ours["scores"] or [], theirs["scores"] or [], atol=1e-4)


def test_the_first_process_prints(found: list[dict[str, Any]], folder: Path) -> None:
    expected = show([*GENERATE, str(folder / "config.json"), *PROMPT])
    assert [result["shown"] for result in found] == [expected, ""]
    assert "grokjax:" in (folder / "work-0.log").read_text()
    assert "grokjax:" not in (folder / "work-1.log").read_text()


# What JAX says when it ends a process because another has gone, which it may do before the process can say anything:
# where process 0 has gone, and where all wait for the one that has.
BY_JAX = "Terminating process because the JAX distributed service detected fatal errors"
# The job and which process dies -> what the other says.
TOLD = {
    ("meeting", 0): rf"{BY_JAX}|another process has gone before the reading of the prompts \(",
    ("meeting", 1): rf"{BY_JAX}|another process has gone before the reading of the prompts \(",
    ("batch", 0): rf"{BY_JAX}|a step of all processes failed: .* Another process may have died",
    (
        "batch",
        1,
    ): r"error: the model failed: .* Another process may have died: see its messages\. The results so far are",
    ("prompt", 0): rf"{BY_JAX}|error in process 1: the model failed: .* Another process may have died",
    ("prompt", 1): r"error: the model failed: .* Another process may have died: see its messages\. If memory was short",
}


@pytest.mark.parametrize(("job", "mortal"), TOLD)
def test_a_death_stops_the_other(tmp_path: Path, job: str, mortal: int) -> None:
    (tmp_path / "config.json").write_text(GrokConfig.tiny().replace(num_layers=1, max_seq_len=128).to_json())
    (tmp_path / "prompts.txt").write_text("abc\ndef\n")
    with two_processes(f"{job}-{mortal}", tmp_path) as processes:
        assert processes[mortal].wait(300) == -signal.SIGKILL
        assert processes[1 - mortal].wait(BOUND_SECONDS) != 0
    told = (tmp_path / f"{job}-{mortal}-{1 - mortal}.log").read_text()
    assert re.search(TOLD[job, mortal], told), told
    assert f'File "{ROOT}' not in told  # as in a traceback


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    """Two processes on one machine, as docs/distributed.md shows them."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    (block,) = [block for block in re.findall(r"```bash no-run\n(.*?)```", text, re.DOTALL) if "localhost" in block]
    script = block.replace("localhost:9876", f"localhost:{free_port()}").replace(
        "grokjax ", f"{sys.executable} -m grokjax "
    )
    environment = os.environ.copy()
    del environment["XLA_FLAGS"]
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(results) == 2


class FakeClient:
    """The coordination service's client, for a process that is alone with it."""

    def __init__(self, failure: str = ""):
        self.values: dict[str, bytes] = {}
        self.failure = failure

    def key_value_set_bytes(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def blocking_key_value_get_bytes(self, key: str, timeout_ms: int) -> bytes:
        if key not in self.values:
            failure, self.failure = self.failure, "UNAVAILABLE: closed"
            raise jax.errors.JaxRuntimeError(failure)
        return self.values[key]

    def key_value_set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def key_value_increment(self, key: str, amount: int) -> int:
        return amount

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value.decode()) for name, value in self.values.items() if name.startswith(f"{key}/")]

    def wait_at_barrier(self, key: str, timeout_ms: int) -> None:
        pass

    def key_value_delete(self, key: str) -> None:
        self.values = {name: value for name, value in self.values.items() if not name.startswith(f"{key}/")}


def test_messages_arrive_in_order_and_are_deleted() -> None:
    client = FakeClient()
    sender = Channel(client, "a")
    for number in range(100):
        sender.send("step", np.arange(number), number)
    assert len(client.values) == 100 - 64
    receiver = Channel(client, "a")
    receiver._numbers = iter(range(64, 100))
    for number in range(64, 100):
        name, (array, count) = receiver.receive()
        assert (name, array.tolist(), count.item()) == ("step", list(range(number)), number)


def test_waiting_goes_on_until_the_first_has_gone() -> None:
    receiver = Channel(FakeClient("DEADLINE_EXCEEDED: nothing yet"), "a")
    with pytest.raises(DistributedError, match=r"gone before the engine's next step \(UNAVAILABLE: closed\): see its"):
        receiver.receive()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """That of process 0 of two; what the other does is up to the test."""
    client = FakeClient()
    monkeypatch.setattr(distributed, "_client", lambda: client)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    return client


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("error", [ValueError("no"), OSError(28, "No space left on device")])
def test_others_hear_of_every_error_of_the_first(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        on_first("the end", fail)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match=f"process 0: .*{re.escape(str(error))}"):
        on_first("the end", fail)


def fail_as_after_a_death(*_: Any) -> None:
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: Task 2 heartbeat timeout.\nDetails")


@pytest.mark.parametrize(
    ("process", "call"),
    [
        (0, "wait_at_barrier"),
        (1, "wait_at_barrier"),
        (1, "key_value_increment"),
        (1, "blocking_key_value_get_bytes"),
    ],
)
def test_a_death_before_a_meeting_or_in_it(
    process: int, call: str, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: process)
    client.values["grokjax/meeting/1/names/0"] = b"the end of /a"
    monkeypatch.setattr(client, call, fail_as_after_a_death)
    message = (
        r"another process has gone before the end of /a \(UNAVAILABLE: .* timeout\): see its messages, then start all"
    )
    with pytest.raises(DistributedError, match=message):
        on_first("the end of /a", lambda: pytest.fail("it was done without all"))


@pytest.mark.parametrize(
    ("number", "call"), [(0, "key_value_increment"), (0, "key_value_set_bytes"), (63, "wait_at_barrier")]
)
def test_a_death_before_a_message(number: int, call: str, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, call, fail_as_after_a_death)
    with pytest.raises(DistributedError, match=r"gone before the engine's next step \(UNAVAILABLE: .* timeout\)"):
        send_message(number)


def send_message(number: int) -> None:
    sender = Channel.open()
    sender._numbers = itertools.count(number)
    sender.send("decode")


def test_a_failed_step_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What JAX raises where another process has died."""

    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer.\nat frame 1")

    model = init(GrokConfig.tiny().replace(num_layers=1), dtype=np.float32)
    channel = Channel(FakeClient(), "a")
    channel.send("start", shared_steps._fingerprint(model), "", 1, 8, 0)
    channel.send("decode", np.zeros((1, 8), np.int32))
    channel._numbers = iter([0, 1])
    monkeypatch.setattr(distributed.Channel, "open", lambda: channel)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setitem(vars(model.partitioner.mesh), "is_multi_process", True)  # A cached property.
    monkeypatch.setattr(shared_steps, "_take_step", fail)
    with pytest.raises(DistributedError, match=r"a step of all processes failed: .* reset by peer\. Another process"):
        follow(model)


def test_models_of_other_dtypes_differ() -> None:
    config = GrokConfig.tiny().replace(num_layers=1)
    prints = {
        shared_steps._fingerprint(init(config, **options))
        for options in ({}, {"quantized": False}, {"quantized_table": True}, {"dtype": np.float32})
    }
    assert len(prints) == 4


def test_alone_everything_is_done_here() -> None:
    assert on_first("the end", lambda: 3) == 3
    assert on_first("the end", lambda: 4, together=False) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), r"coordinator_address='localhost' has no port: give it as HOST:PORT\."),
        (("localhost:1", 2, 2), r"process_id=2 must be between 0 and 1"),
        (("localhost:1", 0, 0), r"num_processes=0 must be 1 or more"),
        (("localhost:1", 2, 0), r"the processes cannot be joined .*: call initialize once, first of all"),
    ],
)
def test_refused_arguments(arguments: tuple[Any, ...], message: str) -> None:
    jax.devices()
    with pytest.raises((ValueError, DistributedError), match=message):
        initialize(*arguments)


def test_a_heartbeat_that_none_could_keep() -> None:
    with pytest.raises(ValueError, match=r"heartbeat_timeout_seconds=0 must be 1 or more"):
        initialize("localhost:1", 2, 0, heartbeat_timeout_seconds=0)


def test_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ValueError, match=r"no launcher was found that tells coordinator_address "):
        initialize(None, 2, 0)


def test_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(console, "initialize", lambda *arguments, **options: calls.append((*arguments, options)))
    command = ["generate", "a", "--checkpoint", "nowhere", "--coordinator", "host:1"]
    assert cli.main(command) == 2
    assert "--coordinator, --num-processes and --process-id go together" in capsys.readouterr().err
    assert cli.main([*command, "--num-processes", "2", "--process-id", "0"]) == 2
    alone = ["generate", "a", "--checkpoint", "nowhere", "--heartbeat", "20"]
    assert cli.main(alone) == 2
    assert "--heartbeat is of several processes: give --distributed or --coordinator" in capsys.readouterr().err
    assert cli.main([*alone, "--distributed"]) == 2
    assert calls == [("host:1", 2, 0, {}), (None, None, None, {"heartbeat_timeout_seconds": 20})]


def test_who_leads_and_who_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = init(GrokConfig.tiny().replace(num_layers=1), dtype=np.float32)
    with pytest.raises(ValueError, match=r"follow is for the processes after the first.*: make an engine"):
        follow(model)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match=r"the engine runs on process 0: call follow\(model\) on process 1"):
        SharedSteps(model, slots=1, max_len=8, num_top=0)


def test_following_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = types.SimpleNamespace(is_multi_process=True, shape={"data": 1, "model": 8})
    model: Any = types.SimpleNamespace(
        partitioner=types.SimpleNamespace(mesh=mesh, rules=None), config="a model of one layer", dtype=np.float32
    )
    channel = Channel(FakeClient(), "a")
    channel.send("start", "a model of two layers", 1, 8, 0)
    channel._numbers = iter([0])
    monkeypatch.setattr(distributed.Channel, "open", lambda: channel)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(
        ValueError, match="process 0 has another model: a model of two layers; process 1 has a model of"
    ):
        follow(model)
