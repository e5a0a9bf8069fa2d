"""The zygote tells of each child's end, and outlives it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from awaited import eventually
from lockstep_trainer import zygote


class Agent:
    """One that has called the zygote."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.lines = stream.makefile("r")
        self.ask(op="hello", agent=1)

    def ask(self, **request: object) -> dict[str, Any]:
        """What is answered."""
        self.stream.sendall(json.dumps(request).encode() + b"\n")
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """What is said next."""
        said: dict[str, Any] = json.loads(self.lines.readline())
        return said


def connected(run_dir: Path) -> socket.socket | None:
    """None as long as nobody listens."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.settimeout(60)
    try:
        directory = os.open(run_dir / "zygote", os.O_RDONLY | os.O_DIRECTORY)
        try:
            stream.connect(zygote.socket_address(directory))
        finally:
            os.close(directory)
    except OSError:
        stream.close()
        return None
    return stream


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    """Its zygote is one for spec.command, which imports no torch."""
    (tmp_path / "job.json").write_text(json.dumps({"spec": {"command": ["sleep"]}}))
    environment = {**os.environ, "LOCKSTEP_RUN_DIR": str(tmp_path), "LOCKSTEP_CONFIG_DIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-m", "lockstep_trainer.zygote"], env=environment) as process:
        try:
            stream = eventually(lambda: connected(tmp_path), "the zygote's socket")
            assert stream
            called = Agent(stream)
            yield called
            called.lines.close()
            stream.close()
        finally:
            process.terminate()


def test_a_folder_that_is_gone_does_not_end_it(tmp_path: Path, agent: Agent) -> None:
    """The agent removes the folder of a worker that it is done with; the others go on."""
    pids = {}
    for name in ("gone", "kept"):
        started = agent.ask(op="exec", folder=str(tmp_path / name), argv=["sleep", "600"], env={})
        pids[name] = started["pid"]
    shutil.rmtree(tmp_path / "gone")
    for name, pid in pids.items():
        os.kill(pid, signal.SIGKILL)
        told = agent.hear()
        assert (told["event"], told["folder"], told["code"]) == ("exited", str(tmp_path / name), -signal.SIGKILL)
    assert json.loads((tmp_path / "kept" / "exit.json").read_text())["code"] == -signal.SIGKILL
