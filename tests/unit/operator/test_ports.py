"""Two pods of one machine never get the same port, however long the first takes until it listens."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from lockstep_operator.backends import ports


@pytest.fixture
def three_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only three ports to choose from."""
    reserved = ports.reserve(3)
    numbers = sorted(map(ports.number, reserved))
    ports.release(reserved)
    monkeypatch.setattr(ports, "PORTS", _Few(numbers))


class _Few(list[int]):
    start = property(lambda self: self[0])
    stop = property(lambda self: self[-1] + 1)


@pytest.mark.usefixtures("three_left")
def test_a_port_is_reserved_until_it_is_released() -> None:
    first = ports.reserve(2)
    second = ports.reserve(1)
    assert len({ports.number(one) for one in first + second}) == 3
    with pytest.raises(OSError, match="fewer than 1 are free"):
        ports.reserve(1)
    ports.release(first)
    again = ports.reserve(2)
    assert {ports.number(one) for one in again}.isdisjoint(map(ports.number, second))
    ports.release(again + second)


def test_a_server_listens_where_a_port_is_reserved_for_it_and_again_after_its_end() -> None:
    reserved = ports.reserve(1)
    server = (
        "import socket, sys; one = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print(flush=True);"
        "one.accept()[0].recv(1)"
    )
    try:
        for _ in range(2):  # the connection of the first leaves TIME_WAIT behind
            command = [sys.executable, "-c", server, str(ports.number(reserved[0]))]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout
                process.stdout.readline()
                with socket.create_connection(("127.0.0.1", ports.number(reserved[0])), timeout=5) as client:
                    client.send(b"1")
                assert process.wait(10) == 0
    finally:
        ports.release(reserved)


@pytest.mark.usefixtures("three_left")
def test_where_too_few_are_free_none_stays_reserved() -> None:
    with pytest.raises(OSError, match="fewer than 4"):
        ports.reserve(4)
    ports.release(ports.reserve(3))
