"""Where processes meet before JAX joins them: at the port that process 0 opens.

There each says that it has come, or why it cannot go on, and hears whether all can. JAX itself would end a process
without a sentence if another did not come. The port is free again afterwards, for JAX's service.
"""

import contextlib
import dataclasses
import errno
import json
import socket
import time
from typing import Any

# What process 0 says first, by which it is told from other programs.
_GREETING = b"grokjax\n"
# For how long whoever listens, or comes, may say nothing: a program of another kind may wait for us.
_SILENCE_SECONDS = 10.0
# For how long a process that cannot go on waits for the others, to tell them.
_TELLING_SECONDS = 30.0
_RETRY_SECONDS = 0.2
# Of a message, and of the reason in it.
_MOST_BYTES = 1 << 16
_MOST_LETTERS = 4000


class DistributedError(RuntimeError):
    """Another process has failed, ended or come elsewhere; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Meeting:
    """How one process meets the others.

    Attributes:
      address: `HOST:PORT` of process 0.
      count: how many processes there are.
      number: this one's, from 0.
      refusal: why this one cannot go on; empty if it can.
    """

    address: str
    count: int
    number: int
    refusal: str = ""

    def hold(self, timeout: float = _TELLING_SECONDS) -> None:
        """Waits until all processes have come, or one of them cannot go on; then it is told to those that came.

        Args:
          timeout: seconds.

        Raises:
          DistributedError: Another process cannot go on, not all have come, or another program has the port.
        """
        told = self._knock(timeout) if self.number else self._open(timeout)
        if told and not self.refusal:
            raise DistributedError(told)

    def _open(self, timeout: float) -> str:
        """Process 0 hears the others, and tells them the first reason why they cannot go on; empty if they can."""
        refusals = [f"process 0: {self.refusal}"] if self.refusal else []
        came, deadline = {0}, time.monotonic() + timeout
        with contextlib.ExitStack() as until_told, self._listen() as door:
            guests = []
            while len(came) < self.count and time.monotonic() < deadline:
                guest = _next_guest(door, deadline)
                if guest is None:
                    break
                said = _hear(until_told.enter_context(guest))
                if said is None:
                    continue
                guests.append(guest)
                refusals += self._refusals(said, came)
                came.add(said["number"])
                if refusals:
                    deadline = min(deadline, time.monotonic() + _TELLING_SECONDS)
            missing = [str(number) for number in range(self.count) if number not in came]
            if missing:
                named = f"process{'es' * (len(missing) > 1)} {', '.join(missing)}"
                refusals.append(
                    f"{named} did not come to {self.address} in {timeout:g} s: see what it says, check that its "
                    "host reaches this address, then start all again."
                )
            told = "".join(refusals[:1])
            for guest in guests:
                _tell_and_part(guest, told)
        return told

    def _listen(self) -> socket.socket:
        port = int(self.address.rpartition(":")[2])
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
        except OSError as error:
            taken = "is in use, maybe by an earlier run" if error.errno == errno.EADDRINUSE else f"fails ({error})"
            raise DistributedError(
                f"port {port} of {self.address} {taken}: end what has it, or give all processes another port."
            ) from error

    def _refusals(self, said: dict[str, Any], came: set[int]) -> list[str]:
        """Why the processes cannot go on with one that said this."""
        number, count = said["number"], said["count"]
        if said["refusal"]:
            return [f"process {number}: {said['refusal']}"]
        if count != self.count or number in came or not 0 < number < count:
            return [
                f"a process came as number {number} of {count}, and process 0 waits for {self.count} with numbers of "
                "their own: give all the same --num-processes, and each its own --process-id."
            ]
        return []

    def _knock(self, timeout: float) -> str:
        """Another process tells process 0 that it has come, and hears why they cannot go on; empty if they can."""
        deadline = time.monotonic() + timeout
        with self._reach(deadline) as door, door.makefile("rb") as lines:
            try:
                greeting = lines.readline(_MOST_BYTES)
            except OSError:  # it says nothing
                greeting = b""
            if greeting != _GREETING:
                raise DistributedError(
                    f"the port of {self.address} is in use there, and not by process 0 of this run: end what has it, "
                    "maybe an earlier run, or give all processes another port."
                )
            try:
                _say(door, {"number": self.number, "count": self.count, "refusal": self.refusal[:_MOST_LETTERS]})
                door.settimeout(max(0.0, deadline - time.monotonic()) + _TELLING_SECONDS)
                return str(json.loads(lines.readline(_MOST_BYTES)))
            except (OSError, ValueError) as error:
                raise DistributedError(f"process 0 has gone from {self.address}: see its messages.") from error

    def _reach(self, deadline: float) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        while True:
            try:
                return socket.create_connection((host.strip("[]"), int(port)), timeout=_SILENCE_SECONDS)
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise DistributedError(
                        f"process 0 cannot be reached at {self.address} ({error}): start it, and check the address."
                    ) from error
            time.sleep(_RETRY_SECONDS)


def _next_guest(door: socket.socket, deadline: float) -> socket.socket | None:
    """Whoever comes next; None where nobody does until the deadline."""
    door.settimeout(max(_RETRY_SECONDS, deadline - time.monotonic()))
    try:
        guest, _ = door.accept()
    except TimeoutError:
        return None
    guest.settimeout(_SILENCE_SECONDS)
    return guest


def _hear(guest: socket.socket) -> dict[str, Any] | None:
    """What a process says that has come; None of anyone else."""
    try:
        guest.sendall(_GREETING)
        with guest.makefile("rb") as lines:
            said = json.loads(lines.readline(_MOST_BYTES))
    except (OSError, ValueError):
        return None
    kinds = {"number": int, "count": int, "refusal": str}
    is_member = isinstance(said, dict) and all(isinstance(said.get(name), kind) for name, kind in kinds.items())
    return said if is_member else None


def _say(connection: socket.socket, message: object) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _tell_and_part(guest: socket.socket, told: str) -> None:
    """Answers one that has come; it hangs up first, so that the port of this side is free at once."""
    with contextlib.suppress(OSError):  # it has gone already
        _say(guest, told)
        guest.recv(1)
