"""A process that carries large snapshots between two pods, one after the other.

Encryption, checksums and the kernel's copies keep a core busy at a gigabyte a second and less. An agent has one, which
leader and members wait for; a node has a core for each of its ranks' couriers. ``couriers`` is the agent's side: a line
of JSON on standard input is an errand, a line of JSON on standard output says which port is listened on, another one
how the errand ended.

Between two couriers: whoever calls says the job's token and a newline, whoever gives sends the snapshot as
``transfer.send`` has it, and whoever takes and was called answers with how it ended.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lockstep_api.messages import StateId
from lockstep_trainer.agent import sockets
from lockstep_trainer.agent.transfer import CHUNK, NoRoomError, receive, send
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.checkpoint.snapshots import NoSnapshotError, SnapshotBusyError, order, reading
from lockstep_trainer.errors import Corrupt, TrainerError
from lockstep_trainer.supervisor import die_with_parent, name_process

CONNECT_SECONDS = 3.0
ACCEPT_SECONDS = 10.0
"""Whoever was told the port has its courier ready."""
SILENT_SECONDS = 60.0
"""Without a byte. The other side may have to make room first, and compares all checksums before it answers."""
_LONGEST_LINE = 64 * 1024
_KNOWN = {known.__name__: known for known in (Corrupt, NoRoomError, NoSnapshotError, SnapshotBusyError)}


@dataclass(frozen=True, slots=True)
class Errand:
    """One snapshot of one rank, in one direction."""

    gives: bool  # or takes it in
    folder: str  # of the rank
    state: StateId
    call: str = ""  # host:port of the other courier; empty: listen for it …
    bind: str = ""  # … here
    buffers: int = 0  # of the folder, where it takes
    must_stay: tuple[StateId, ...] = ()  # states whose buffers are not taken

    def may_take(self, other: StateId) -> bool:
        """Whether the buffer of another state may be overwritten: never with something older."""
        return other not in self.must_stay and order(other) < order(self.state)


_ERRAND = TypeAdapter(Errand)


def line_of(errand: Errand) -> bytes:
    """For a courier's standard input."""
    return json.dumps(asdict(errand)).encode() + b"\n"


def outcome(error: BaseException | None) -> dict[str, Any]:
    """How an errand ended, as JSON."""
    return {"error": type(error).__name__, "text": str(error)} if error else {}


def raise_for(outcome: dict[str, Any]) -> None:
    """Raises what an errand ended with: Corrupt, NoRoomError, NoSnapshotError, SnapshotBusyError; anything else is a
    ConnectionError."""
    if name := outcome.get("error"):
        raise _KNOWN.get(name, ConnectionError)(outcome["text"])


def carry(errand: Errand, trust: Trust, say: Callable[[dict[str, Any]], None]) -> None:
    """Run an errand. ``say`` hears of the port; raises what ``raise_for`` does, OSError, and TrainerError where this
    pod's certificate can't be used."""
    with _connect(errand, say) as raw:
        raw.settimeout(SILENT_SECONDS)
        with trust.wrap(sockets.watched(raw), called=not errand.call) as stream:
            if errand.call:
                stream.sendall(trust.token.encode() + b"\n")
            else:
                _admit(stream, trust)
            if errand.gives:
                asyncio.run(_give(errand, stream))
            else:
                asyncio.run(_take(errand, stream))


def _connect(errand: Errand, say: Callable[[dict[str, Any]], None]) -> socket.socket:
    if errand.call:
        host, _, port = errand.call.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS)
    with socket.create_server((errand.bind, 0), backlog=1) as listening:
        listening.settimeout(ACCEPT_SECONDS)
        say({"port": listening.getsockname()[1]})
        return listening.accept()[0]


def _admit(stream: socket.socket, trust: Trust) -> None:
    certificate = getattr(stream, "getpeercert", lambda: None)()
    if refusal := trust.refusal(certificate, operator_only=False, needed=True):
        raise ConnectionError(refusal)
    if not trust.knows(_line(stream)):
        raise ConnectionError("the token of this job is missing or wrong")


async def _give(errand: Errand, stream: socket.socket) -> None:
    with reading(Path(errand.folder), errand.state) as own:
        async for piece in send(own):
            stream.sendall(piece)
    if errand.call:
        raise_for(json.loads(_line(stream)))
    else:
        stream.recv(1)  # until the other side has it all and closes: closing first may discard what is on its way


async def _take(errand: Errand, stream: socket.socket) -> None:
    error: Exception | None = None
    try:
        await receive(
            _chunks(stream), Path(errand.folder), errand.state, buffers=errand.buffers, may_take=errand.may_take
        )
    except (Corrupt, NoRoomError) as found:
        error = found
    if not errand.call:
        stream.sendall(json.dumps(outcome(error)).encode() + b"\n")
        async for _ in _chunks(stream):  # what it still sends: closing before would discard the answer
            pass
    if error:
        raise error


async def _chunks(stream: socket.socket) -> AsyncIterator[memoryview]:
    """What comes until the end, each chunk in the place of the one before."""
    buffer = memoryview(bytearray(CHUNK))
    while size := stream.recv_into(buffer):
        yield buffer[:size]


def _line(stream: socket.socket) -> str:
    found = bytearray()
    while not found.endswith(b"\n"):
        byte = stream.recv(1)
        if not byte or len(found) > _LONGEST_LINE:
            raise ConnectionError("the other side went away")
        found += byte
    return found[:-1].decode(errors="replace")


def main() -> None:
    """Errands until standard input ends, or the agent does."""
    die_with_parent(signal.SIGKILL)
    name_process("courier")
    folder, job_uid, use_tls = sys.argv[1:]

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)

    for line in sys.stdin:
        try:
            errand = _ERRAND.validate_json(line)
            carry(errand, Trust(Path(folder), job_uid, use_tls=use_tls == "on"), say)
        except (OSError, ValueError, TrainerError) as error:
            say(outcome(error))
        else:
            say(outcome(None))


if __name__ == "__main__":
    main()
