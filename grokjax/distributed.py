"""Several processes, one for each host: joining them, what they tell each other, what only the first does."""

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax._src import distributed as coordination
from jax._src import xla_bridge
from jax._src.clusters import ClusterEnv

from grokjax.errors import first_line
from grokjax.rendezvous import DistributedError as DistributedError
from grokjax.rendezvous import Meeting
from grokjax.request import check_integer

T = TypeVar("T")

# A message is waited for in turns of so many milliseconds, between which Python hears of Ctrl-C and of an error that
# another process shares.
_POLL_MS = 1000
_ERRORS = "grokjax/errors"
# A message waits for the others after as many, so that read messages can be deleted.
_MESSAGES_AT_ONCE = 64
_STEP = "the engine's next step"
# At a barrier, for what other processes may do before. If one of them dies, the barrier fails within the heartbeat's
# time; of shorter waits, the first that passed would end it for all.
_FOREVER_MS = 1000 * 3600 * 24 * 7


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: Sequence[int] | None = None,
    initialization_timeout_seconds: int = 300,
    heartbeat_timeout_seconds: int = 100,
    shutdown_timeout_seconds: int = 300,
) -> None:
    """Joins this process to the others, after which `jax.devices()` are those of all of them.

    Every process calls it once, before anything asks for a device. Under SLURM, Open MPI, Kubernetes and on Cloud TPU
    it needs no argument. A process that dies makes the others stop: where its connections close they notice at once,
    else after `heartbeat_timeout_seconds`. One that ends with an error waits `shutdown_timeout_seconds` for the others.

    Args:
      coordinator_address: `HOST:PORT` of process 0, the same for all; the port must be free there.
      num_processes: how many there are.
      process_id: this one's number, from 0.
      local_device_ids: which of the host's GPUs are this process's. By default those that JAX_LOCAL_DEVICE_IDS names;
        else, under SLURM and Open MPI, the one of the process's number on its host, and elsewhere all.
      initialization_timeout_seconds: how long to wait for the others.
      heartbeat_timeout_seconds: after how long a silent process counts as dead.
      shutdown_timeout_seconds: how long the end of a process waits for that of the others.

    Raises:
      ValueError: The arguments are incomplete, and no launcher is found that tells them; or they are out of range.
      DistributedError: It was called before, or JAX has used a device already. Or another process does not come or
        cannot go on, or another program has the port.

    Source: a thin cover of `jax.distributed.initialize`.
    """
    if coordinator_address is not None and not re.fullmatch(r".+:[0-9]{1,5}", coordinator_address):
        raise ValueError(f"coordinator_address={coordinator_address!r} has no port: give it as HOST:PORT.")
    if num_processes is not None:
        check_integer("num_processes", num_processes, 1)
    if num_processes is not None and process_id is not None:
        check_integer("process_id", process_id, 0, num_processes - 1)
    check_integer("heartbeat_timeout_seconds", heartbeat_timeout_seconds, 1)
    is_late = xla_bridge.backends_are_initialized() or jax.distributed.is_initialized()  # which JAX refuses
    if not is_late:
        timeout = initialization_timeout_seconds
        meeting = find_meeting(coordinator_address, num_processes, process_id, timeout=timeout)
        if meeting is not None:
            meeting.hold(timeout)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator_address,
            num_processes=num_processes,
            process_id=process_id,
            local_device_ids=local_device_ids,
            initialization_timeout=initialization_timeout_seconds,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            shutdown_timeout_seconds=shutdown_timeout_seconds,
        )
    except ValueError as error:
        given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise ValueError(
            f"no launcher was found that tells {missing} ({error}): give them, or start the processes by SLURM, Open "
            "MPI, Kubernetes or on Cloud TPU."
        ) from error
    except RuntimeError as error:
        raise DistributedError(
            f"the processes cannot be joined ({error}): call initialize once, first of all, on every process; "
            "process 0 must run and be reachable."
        ) from error


def find_meeting(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    refusal: str = "",
    timeout: int = 30,
) -> Meeting | None:
    """How this process can meet the others before JAX joins them, as is given, or else as JAX hears from a launcher.

    Args:
      coordinator_address: as for `initialize`.
      num_processes: as for `initialize`.
      process_id: as for `initialize`.
      refusal: why this process cannot go on; empty if it can.
      timeout: seconds for which a launcher may wait until it knows where process 0 is.

    Returns:
      None where neither tells who the others are.
    """
    found = coordinator_address, num_processes, process_id
    if None in found:
        with contextlib.suppress(Exception):  # of a launcher that JAX does not understand, JAX says so itself
            found = ClusterEnv.auto_detect_unset_distributed_params(*found, [], None, timeout)[:3]
    address, count, number = found
    return None if address is None or count is None or number is None else Meeting(address, count, number, refusal)


def is_first() -> bool:
    """Whether this is process 0, or the only one. Alone, it does not start JAX's devices."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def process_index() -> int:
    """This process's number for messages, 0 alone: before JAX has devices, the one that it was joined by."""
    with contextlib.suppress(RuntimeError, AssertionError):  # JAX has not found the devices that it was told to use
        if xla_bridge.backends_are_initialized():
            return jax.process_index()
    return joined_as()[0]


def joined_as() -> tuple[int, int]:
    """The number that this process was joined by, and how many were: (0, 1) alone. Does not start JAX's devices."""
    state = coordination.global_state
    return (state.process_id, state.num_processes) if jax.distributed.is_initialized() else (0, 1)


def coordination_client() -> Any:
    """The client of the service that JAX starts for its own coordination; None where no processes were joined.

    Everything here that one process tells another goes through it. It has no public name in JAX; Orbax takes it too.
    """
    return coordination.global_state.client


def on_first(what: str, function: Callable[[], T], *, together: bool = True) -> T | None:
    """Waits for all processes, and runs a function on process 0; if it raises, the others raise `ValueError`.

    Args:
      what: the same on all processes, and what an error calls it: "the beginning of /model".
      function: what only one process may do, such as making a folder.
      together: whether the processes work together; else each runs the function for itself.

    Returns:
      What it returns; None on the other processes.

    Raises:
      DistributedError: Another process has gone, or has come to something else.
    """
    if not together or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return function()
    client = coordination_client()
    outcome = f"{_meet(client, what)}/outcome"
    if jax.process_index():
        problem = _wait(client, outcome, what).decode()
        if problem:
            raise ValueError(f"process 0: {problem}")
        return None
    try:
        result = function()
    except BaseException as error:
        client.key_value_set(outcome, str(error) or type(error).__name__)
        raise
    client.key_value_set(outcome, "")
    return result


def exchange(what: str, value: str, *, together: bool = True) -> list[str]:
    """Tells a value to all processes, and waits for theirs. Does not start JAX's devices.

    Args:
      what: the same on all processes, and what an error calls it: "the loading of a checkpoint".
      value: of this process.
      together: whether the processes work together; else each is alone with its value.

    Returns:
      The values of all processes, in the order of their numbers.

    Raises:
      DistributedError: Another process has gone, or has come to something else.
      ValueError: Another process shares an error instead.
    """
    number, count = joined_as()
    if not together or count == 1:
        return [value]
    client = coordination_client()
    folder = f"{_meet(client, what)}/values"
    with _gone_before(what):
        client.key_value_set(f"{folder}/{number}", value)
    return [_wait(client, f"{folder}/{other}", what).decode() for other in range(count)]


@contextlib.contextmanager
def sharing_errors() -> Iterator[None]:
    """An error that ends this block is told to the other processes: within a second, those that wait raise it, too.

    They wait in `on_first`, `exchange`, `follow`, and where a checkpoint is loaded or an engine made.

    Raises:
      ValueError: The block has failed after another process had told of an error, which may be why.
    """
    try:
        yield
    except BaseException as error:
        client = coordination_client()
        if client is not None:
            reason = str(error) or f"{type(error).__name__}, see its messages."
            told = f"process {joined_as()[0]}: {reason}"
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others have gone
                if isinstance(error, Exception):
                    _check_errors(client)
                client.key_value_set(f"{_ERRORS}/first", told)
        raise


def _check_errors(client: Any) -> None:
    """Raises `ValueError` where a process has told of an error."""
    for _, told in client.key_value_dir_get(_ERRORS):
        raise ValueError(told)


def _meet(client: Any, what: str) -> str:
    """Waits until all processes have come to the same thing; returns a folder for it."""
    number, count = joined_as()
    with _gone_before(what):
        folder = f"grokjax/meeting/{client.key_value_increment(f'grokjax/meetings/{number}', 1)}"
        client.key_value_set(f"{folder}/names/{number}", what)
    names = [_wait(client, f"{folder}/names/{other}", what).decode() for other in range(count)]
    for process, name in enumerate(names):
        if name != names[0]:
            raise DistributedError(
                f"process 0 has come to {names[0]}, and process {process} to {name}: make the same calls in the same "
                "order on every process."
            )
    return folder


class Channel:
    """Messages from process 0 to all others, in order, past the devices: they need not have finished a step.

    A message is a name and arrays. Two ends that are opened as the n-th of their processes belong together.
    """

    def __init__(self, client: Any, folder: str):
        self._client, self._folder = client, folder
        self._numbers = itertools.count()

    @classmethod
    def open(cls) -> Self:
        """Opens this process's end of the next channel."""
        client = coordination_client()
        with _gone_before(_STEP):
            number = client.key_value_increment(f"grokjax/channels/{jax.process_index()}", 1)
        return cls(client, f"grokjax/channel/{number}")

    def send(self, name: str, *values: Any) -> None:
        """Sends a name and what NumPy makes arrays of.

        Raises:
          DistributedError: Another process has gone.
        """
        stream = io.BytesIO()
        for value in (name, *values):
            np.save(stream, np.asarray(value), allow_pickle=False)
        number = next(self._numbers)
        with _gone_before(_STEP):
            self._client.key_value_set_bytes(self._key(number), stream.getvalue())
        self._meet(number)

    def receive(self) -> tuple[str, list[np.ndarray]]:
        """Waits for the next message.

        Raises:
          DistributedError: Another process has gone.
        """
        number = next(self._numbers)
        stream = io.BytesIO(_wait(self._client, self._key(number), _STEP))
        arrays = []
        while stream.tell() < len(stream.getbuffer()):
            arrays.append(np.load(stream, allow_pickle=False))
        self._meet(number)
        return str(arrays[0]), arrays[1:]

    def _meet(self, number: int) -> None:
        """After so many messages, waits for all to have read them, then deletes them."""
        if (number + 1) % _MESSAGES_AT_ONCE:
            return
        folder = self._key(number).rpartition("/")[0]
        with _gone_before(_STEP):
            self._client.wait_at_barrier(folder, _FOREVER_MS)
        if jax.process_index() == 0:
            self._client.key_value_delete(folder)

    def _key(self, number: int) -> str:
        return f"{self._folder}/{number // _MESSAGES_AT_ONCE}/{number}"


def _wait(client: Any, key: str, what: str) -> bytes:
    """The value of a key, as soon as another process has set it.

    Raises:
      ValueError: A process shares an error instead.
    """
    while True:
        with _gone_before(what):
            try:
                value: bytes = client.blocking_key_value_get_bytes(key, _POLL_MS)
                return value
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            _check_errors(client)


@contextlib.contextmanager
def _gone_before(what: str) -> Iterator[None]:
    """Turns a failure of JAX's coordination, which means that a process has gone, into a sentence."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise DistributedError(
            f"another process has gone before {what} ({first_line(error)}): see its messages, then start all again."
        ) from error
