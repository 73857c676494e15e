"""Processes meet at the port of the first, here threads: all go on, or all hear why they cannot."""

import concurrent.futures
import socket
from collections.abc import Callable

import pytest

from grokjax.rendezvous import DistributedError, Meeting


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def hold(*processes: dict, count: int = 3, timeout: float = 30, port: int | None = None) -> list[str]:
    """What each process hears: why they cannot go on; nothing if they can."""
    address = f"localhost:{free_port() if port is None else port}"

    def hear(process: dict) -> str:
        try:
            Meeting(address, **{"count": count, **process}).hold(timeout)
        except DistributedError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(hear, processes))


def test_all_go_on_when_all_have_come_and_the_port_is_free_again() -> None:
    port = free_port()
    assert hold({"number": 0}, {"number": 1}, {"number": 2}, port=port) == ["", "", ""]
    socket.create_server(("", port)).close()


@pytest.mark.parametrize("number", [0, 1])
def test_what_one_refuses_all_others_hear(number: int) -> None:
    processes = [{"number": 0}, {"number": 1}, {"number": 2}]
    processes[number]["refusal"] = "its options are wrong."
    expected = [f"process {number}: its options are wrong."] * 3
    expected[number] = ""
    assert hold(*processes) == expected


def test_one_that_does_not_come_is_named() -> None:
    first, second = hold({"number": 0}, {"number": 1}, timeout=1)
    assert first == second
    assert first.startswith("process 2 did not come to localhost:")
    assert first.endswith(" in 1 s: see what it says, check that its host reaches this address, then start all again.")


def test_one_that_refuses_does_not_wait_for_ever() -> None:
    assert hold({"number": 0, "refusal": "no"}, timeout=0.3) == [""]
    assert "process 0 cannot be reached at localhost:" in hold({"number": 1}, timeout=0.3)[0]


@pytest.mark.parametrize("wrong", [{"number": 1, "count": 4}, {"number": 1, "count": 3}, {"number": 3, "count": 3}])
def test_numbers_that_do_not_fit_are_refused(wrong: dict[str, int]) -> None:
    """Another count, a number twice, a number too large."""
    found = hold({"number": 0}, {"number": 1}, wrong, timeout=1)
    assert len(set(found)) == 1
    assert "process 0 waits for 3 with numbers of their own: give all the same --num-processes" in found[0]


def speak(guest: socket.socket) -> None:
    guest.sendall(b"SSH-2.0-OpenSSH\r\n")


def hang_up(guest: socket.socket) -> None:
    guest.close()


@pytest.mark.parametrize("answer", [speak, hang_up])
def test_a_port_that_another_program_has_ends_all(answer: Callable[[socket.socket], None]) -> None:
    with socket.create_server(("", 0)) as stranger, concurrent.futures.ThreadPoolExecutor(1) as thread:
        port = stranger.getsockname()[1]

        def serve() -> None:
            with stranger.accept()[0] as guest:
                answer(guest)

        answered = thread.submit(serve)
        first, second = hold({"number": 0}, {"number": 1}, port=port)
        answered.result()
    assert first.startswith(f"port {port} of localhost:{port} is in use, maybe by an earlier run: end what has it")
    assert second.startswith(f"the port of localhost:{port} is in use there, and not by process 0 of this run")


def test_a_stranger_at_the_door_is_passed_over() -> None:
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        met = thread.submit(lambda: hold({"number": 0}, count=2, port=port))
        while True:
            try:
                stranger = socket.create_connection(("localhost", port))
                break
            except ConnectionRefusedError:
                continue
        with stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert hold({"number": 1}, count=2, port=port) == [""]
        assert met.result() == [""]
