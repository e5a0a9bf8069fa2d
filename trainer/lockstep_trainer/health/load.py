"""Runs the burn-in and the collectives in processes of their own, and ends those that hang."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from lockstep_trainer.health import nccltests
from lockstep_trainer.health.measured import Burn, Collective

BURN_SECONDS = 10.0
START_SECONDS = 120.0
"""What importing torch and making a context may take on a busy machine."""
COLLECTIVES_SECONDS = 120.0


def burn_in(gpus: int, seconds: float = BURN_SECONDS) -> list[Burn]:
    """All GPUs at once; 0: the CPU."""
    commands = [_module("burnin", "--seconds", str(seconds), "--device", str(index)) for index in range(gpus)]
    ended = _together(commands or [_module("burnin", "--seconds", str(seconds))], [{}] * max(gpus, 1), seconds)
    burns = []
    for index, one in enumerate(ended):
        lines = one.objects
        burns.append(Burn(**lines[0]) if lines else Burn(index, "", error=one.error))
    return burns


def collectives(gpus: int, ranks: int | None = None) -> list[Collective]:
    """Among all GPUs, and between every two; with 0 GPUs among ``ranks`` processes on the CPU."""
    world = gpus or ranks or 0
    if world < 2:
        return []
    group: list[Collective] = []
    if gpus and nccltests.installed():
        group = nccltests.run(gpus, COLLECTIVES_SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    command = _module("collectives", *([] if gpus else ["--cpu"]))
    ended = _together([command] * world, environments, COLLECTIVES_SECONDS)
    rows = [Collective(**line) for one in ended for line in one.objects]
    if errors := [f"rank {rank}: {one.error}" for rank, one in enumerate(ended) if one.error]:
        rows.append(nccltests.failed("a collective", world, errors[0]))
    return group + ([row for row in rows if row.operation == "sendrecv" or row.error] if group else rows)


@dataclass(frozen=True, slots=True)
class _Ended:
    objects: list[dict[str, Any]]
    error: str


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"lockstep_trainer.health.{name}", *arguments]


def _together(commands: Sequence[list[str]], environments: Sequence[Mapping[str, str]], seconds: float) -> list[_Ended]:
    """What each printed, and why it did not end well. Output goes to files: a pipe that nobody empties would stop one
    rank, and with it all others."""
    deadline = time.monotonic() + seconds + START_SECONDS
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        complaints = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        try:
            for command, environment, output, complaint in zip(
                commands, environments, outputs, complaints, strict=True
            ):
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=complaint,
                    start_new_session=True,
                )
                processes.append(process)
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                # One that the driver holds can't be killed either; it is left to the end of the container.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        return [_ended(*one, seconds) for one in zip(codes, outputs, complaints, strict=True)]


def _ended(code: int | None, output: IO[bytes], complaints: IO[bytes], seconds: float) -> _Ended:
    output.seek(0)
    complaints.seek(0)
    objects = [json.loads(line) for line in output if line.startswith(b"{") and line.endswith(b"}\n")]
    if code is None:
        return _Ended(objects, f"no end within {seconds + START_SECONDS:.0f} s")
    last = complaints.read().decode(errors="replace").strip().splitlines()[-1:] or [""]
    return _Ended(objects, f"exit code {code}: {last[0]}" if code else "")
