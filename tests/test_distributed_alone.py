"""What one of several processes says and does, told by a stand-in for the service that they share."""

import contextlib
import dataclasses
import itertools
import re
import types
from typing import Any

import jax
import numpy as np
import pytest

from grokjax import cli, distributed
from grokjax.cli import options as cli_options
from grokjax.config import GrokConfig
from grokjax.distributed import Channel, DistributedError, initialize, on_first, sharing_errors
from grokjax.engine import SharedSteps, follow
from grokjax.model import Grok, ModelSteps, RowSettings, SlotOptions, SlotSettings, init
from grokjax.rendezvous import Meeting


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
        folder, _, number = key.rpartition("/")
        if number in ("0", "1"):  # The other process does the same, if the test does not say otherwise.
            self.values.setdefault(f"{folder}/{1 - int(number)}", value.encode())

    def key_value_increment(self, key: str, amount: int) -> int:
        return amount

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value.decode()) for name, value in self.values.items() if name.startswith(f"{key}/")]

    def wait_at_barrier(self, key: str, timeout_ms: int) -> None:
        pass

    def key_value_delete(self, key: str) -> None:
        self.values = {name: value for name, value in self.values.items() if not name.startswith(f"{key}/")}


def test_messages_arrive_in_order_and_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    client, received = FakeClient(), []
    sender, receiver = Channel(client, "a"), Channel(client, "a")

    def let_the_other_come(*_: Any) -> None:
        """At a barrier the sender waits until the other process has read so much that it comes to the barrier, too."""
        monkeypatch.setattr(client, "wait_at_barrier", lambda *_: None)
        received.extend(receiver.receive() for _ in range(64))

    monkeypatch.setattr(client, "wait_at_barrier", let_the_other_come)
    for number in range(100):
        sender.send("step", np.arange(number), number)
    assert len(client.values) == 100 - 64
    received.extend(receiver.receive() for _ in range(64, 100))
    for number, (name, (array, count)) in enumerate(received):
        assert (name, array.tolist(), count.item()) == ("step", list(range(number)), number)


def test_waiting_goes_on_until_the_first_has_gone() -> None:
    receiver = Channel(FakeClient("DEADLINE_EXCEEDED: nothing yet"), "a")
    with pytest.raises(DistributedError, match=r"gone before the engine's next step \(UNAVAILABLE: closed\): see its"):
        receiver.receive()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """That of process 0 of two; the other does the same, if the test does not say otherwise."""
    client = FakeClient()
    monkeypatch.setattr(distributed, "coordination_client", lambda: client)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "joined_as", lambda: (jax.process_index(), 2))
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


@pytest.mark.usefixtures("client")
def test_an_error_of_one_ends_those_that_wait(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process cannot go on; the first waits for it, in a meeting or for a value."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(OSError, match="No space"), sharing_errors():
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    message = r"^process 1: \[Errno 28\] No space left on device$"
    client.failure = "DEADLINE_EXCEEDED: nothing yet"
    with pytest.raises(ValueError, match=message):
        Channel(client, "a").receive()
    monkeypatch.setattr(client, "blocking_key_value_get_bytes", nothing_yet)
    with pytest.raises(ValueError, match=message):
        on_first("the end", lambda: pytest.fail("it was done without all"))
    with pytest.raises(ValueError, match=message), sharing_errors():
        raise RuntimeError("what follows from it")


def nothing_yet(*_: Any) -> None:
    raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nothing yet")


def test_alone_an_error_is_shared_with_nobody() -> None:
    with pytest.raises(ValueError, match="mine"), sharing_errors():
        raise ValueError("mine")


def fail_as_after_a_death(*_: Any) -> None:
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: Task 2 heartbeat timeout.\nDetails")


@pytest.mark.parametrize(
    ("process", "call"),
    [
        (0, "key_value_increment"),
        (0, "blocking_key_value_get_bytes"),
        (1, "key_value_set"),
        (1, "blocking_key_value_get_bytes"),
    ],
)
def test_a_death_before_a_meeting_or_in_it(
    process: int, call: str, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(client, call, fail_as_after_a_death)
    message = (
        r"another process has gone before the end of /a \(UNAVAILABLE: .* timeout\): see its messages, then start all"
    )
    with pytest.raises(DistributedError, match=message):
        on_first("the end of /a", lambda: pytest.fail("it was done without all"))


@pytest.mark.parametrize(
    ("call", "sent"), [("key_value_increment", 0), ("key_value_set_bytes", 0), ("wait_at_barrier", 64)]
)
def test_a_death_before_a_message(call: str, sent: int, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first of all, or before the 64th is deleted."""
    monkeypatch.setattr(client, call, fail_as_after_a_death)
    with pytest.raises(DistributedError, match=r"gone before the engine's next step \(UNAVAILABLE: .* timeout\)"):
        send_messages(100)
    assert len(client.values) == sent


def send_messages(count: int) -> None:
    sender = Channel.open()
    for _ in range(count):
        sender.send("decode")


OPTIONS = SlotOptions(slots=1, max_len=8, num_top=0)


def small_model(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Grok:
    """One whose mesh passes for one over several processes."""
    model = init(GrokConfig.tiny().replace(num_layers=1), **options)
    monkeypatch.setitem(vars(model.partitioner.mesh), "is_multi_process", True)  # A cached property.
    return model


@pytest.mark.usefixtures("client")
def test_a_failed_step_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What JAX raises where another process has died."""

    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer.\nat frame 1")

    monkeypatch.setattr(ModelSteps, "decode", fail)
    model = small_model(monkeypatch, dtype=np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError):
        SharedSteps(model, OPTIONS).decode(SlotSettings.of({}, 1))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(DistributedError, match=r"a step of all processes failed: .* reset by peer\. Another process"):
        follow(model)


@pytest.mark.usefixtures("client")
def test_a_step_that_guesses_is_followed_with_the_same_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def take(_: ModelSteps, settings: SlotSettings, limits: np.ndarray, num_guesses: int) -> None:
        taken.append((settings.packed.tolist(), limits.tolist(), num_guesses))

    monkeypatch.setattr(ModelSteps, "decode_guesses", take)
    model = small_model(monkeypatch, dtype=np.float32)
    leading = SharedSteps(model, dataclasses.replace(OPTIONS, max_guesses=3))
    leading.decode_guesses(SlotSettings.of({0: RowSettings(seed=5, active=True)}, 1), np.array([[8, 3]], np.int32), 3)
    leading.close()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    follow(model)
    assert len(taken) == 2
    assert taken[0] == taken[1]


ANOTHER_MODEL = r"process 0 has another model: .*; process 1 has .*: load the same with the same mesh, rules and dtype"


def test_a_model_of_another_dtype_is_not_followed(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = ({}, {"quantized": False}, {"quantized_table": True}, {"dtype": np.float32})
    for leader, follower in itertools.permutations([small_model(monkeypatch, **options) for options in stored], 2):
        client.values.clear()
        monkeypatch.setattr(jax, "process_index", lambda: 0)
        SharedSteps(leader, OPTIONS)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with pytest.raises(ValueError, match=ANOTHER_MODEL):
            follow(follower)


def test_a_model_of_another_dtype_is_not_led(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(DistributedError, match="gone before the engine's next step"):
        follow(small_model(monkeypatch))
    client.values = {key: value for key, value in client.values.items() if not key.endswith("/0")}
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(ValueError, match=ANOTHER_MODEL):
        SharedSteps(small_model(monkeypatch, dtype=np.float32), OPTIONS)


def test_alone_everything_is_done_here() -> None:
    assert on_first("the end", lambda: 3) == 3
    assert on_first("the end", lambda: 4, together=False) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), r"coordinator_address='localhost' has no port: give it as HOST:PORT\."),
        (("localhost:1", 2, 2), r"process_id=2 must be an integer between 0 and 1"),
        (("localhost:1", 0, 0), r"num_processes=0 must be an integer, 1 or more"),
        (
            ("localhost:1", 2, 0),
            r"the processes cannot be joined .*: call initialize once, first of all",
        ),
    ],
)
def test_arguments_that_cannot_join_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    jax.devices()
    with pytest.raises((ValueError, DistributedError), match=message):
        initialize(*arguments)


def test_a_heartbeat_that_none_could_keep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"heartbeat_timeout_seconds=0 must be an integer, 1 or more"):
        initialize("localhost:1", 2, 0, heartbeat_timeout_seconds=0)


def test_what_no_launcher_tells_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ValueError, match=r"no launcher was found that tells coordinator_address "):
        initialize(None, 2, 0)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of `initialize` by a command, which does nothing."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(cli_options, "initialize", lambda **given: calls.append(given))
    return calls


JOINED = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
BY_HAND = ["--coordinator", "host:1", "--num-processes", "2", "--process-id", "1"]


def test_the_command_joins_the_processes(joined: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """Its prompts, of which only the first process knows, are read after that."""
    command = ["generate", "--prompts", "nowhere", "--output", "results.jsonl", "--random", "tiny"]
    assert cli.main([*command, "--coordinator", "host:1"]) == 2
    assert "--coordinator, --num-processes and --process-id go together" in capsys.readouterr().err
    assert cli.main([*command, "--heartbeat", "20"]) == 2
    assert "--heartbeat is of several processes: give --distributed or --coordinator" in capsys.readouterr().err
    assert joined == []
    assert cli.main([*command, *BY_HAND]) == 2
    assert cli.main([*command, "--distributed", "--heartbeat", "20"]) == 2
    assert joined == [JOINED, dict.fromkeys(JOINED) | {"heartbeat_timeout_seconds": 20}]


# The second of two processes that SLURM has started, as JAX is told of them.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[7-8]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "JAX_COORDINATOR_PORT": "1",
}


@pytest.mark.parametrize(("joining", "address"), [(BY_HAND, "host:1"), (["--distributed"], "node7:1")])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--random", "tiny", "--temperature", "-1"], "temperature=-1.0 must be"),
        (["--random", "tiny", "--mesh", "8"], "--mesh '8': give two numbers"),
        (["--checkpoint", "nowhere", "--tokenizer", "bytes"], "nowhere: no such folder"),
        (["--random", "tiny", "--dtype", "float8"], "its options are wrong: see its message"),
    ],
)
def test_what_is_wrong_on_one_process_is_told_to_the_others(
    options: list[str],
    told: str,
    joining: list[str],
    address: str,
    joined: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before they are joined, be they started by hand or by a launcher."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    meetings: list[Meeting] = []
    monkeypatch.setattr(Meeting, "hold", lambda meeting: meetings.append(meeting))
    with contextlib.suppress(SystemExit):  # By which a command ends whose options are unknown.
        assert cli.main(["generate", "a", *options, *joining]) == 2
    assert [(meeting.address, meeting.count, meeting.number) for meeting in meetings] == [(address, 2, 1)]
    assert told in meetings[0].refusal
    assert joined == []


def test_the_first_leads_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = init(GrokConfig.tiny().replace(num_layers=1), dtype=np.float32)
    with pytest.raises(ValueError, match=r"follow is for the processes after the first.*: make an engine"):
        follow(model)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match=r"the engine runs on process 0: call follow\(model\) on process 1"):
        SharedSteps(model, OPTIONS)


def test_another_model_is_not_followed(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = types.SimpleNamespace(is_multi_process=True, shape={"data": 1, "model": 8})
    model: Any = types.SimpleNamespace(
        partitioner=types.SimpleNamespace(mesh=mesh, rules=None), config="a model of one layer", dtype=np.float32
    )
    client.key_value_set("grokjax/meeting/1/values/0", "a model of two layers")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(
        ValueError, match="process 0 has another model: a model of two layers; process 1 has a model of"
    ):
        follow(model)
