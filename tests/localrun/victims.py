"""Finds the processes of a local run, and kills a worker in a chosen section of its step."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep_trainer.steprecord import StepReader, StepRecordError
from lockstep_trainer.supervisor import AGENT_NAME, STANDBY_VARIABLE

_FOLDER = re.compile(r"e(\d+)-g(\d+)-r(\d+)")


@dataclass(frozen=True, slots=True)
class Victim:
    """A worker that is alive."""

    pid: int
    rank: int
    term: tuple[int, int]
    folder: Path


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def workers(state: Path) -> Iterator[Victim]:
    """Workers of all pods that are alive, newest term last."""
    found = []
    for file in state.glob("pods/*/workers/*/pid.json"):
        match = _FOLDER.fullmatch(file.parent.name)
        pid = json.loads(file.read_text())["pid"]
        if match and not (file.parent / "exit.json").exists() and alive(pid):
            epoch, generation, rank = map(int, match.groups())
            found.append(Victim(pid, rank, (epoch, generation), file.parent))
    yield from sorted(found, key=lambda victim: (victim.term, victim.rank))


def children_running(parent: int, module: str) -> list[int]:
    """Children of a process that run ``python -m module``, those that stand by left out."""
    return [pid for pid in _children(parent) if module in _command_line(pid) and not _stands_by(pid)]


def standing_by(parent: int) -> list[int]:
    """Children of a supervisor that wait for the end of the agent."""
    return [pid for pid in _children(parent) if _stands_by(pid)]


def _children(parent: int) -> list[int]:
    try:
        pids = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []
    return [pid for pid in pids if alive(pid)]


def _stands_by(pid: int) -> bool:
    """Whether it is such an agent, or is not even that yet."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return False
    return f"\0{STANDBY_VARIABLE}=".encode() in environment and name != AGENT_NAME


def descendants(root: int) -> set[int]:
    """All processes below ``root``."""
    found: set[int] = set()
    waiting = [root]
    while waiting:
        try:
            tasks = list(Path(f"/proc/{waiting.pop()}/task").iterdir())
        except OSError:
            continue
        for task in tasks:
            try:
                children = {int(pid) for pid in (task / "children").read_text().split()}
            except OSError:
                continue
            waiting += children - found
            found |= children
    return found


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def kill_in_section(
    state: Path, section: str, *, rank: int, seconds: float, after_term: tuple[int, int] = (0, 0)
) -> int:
    """SIGKILL to the worker of ``rank`` while it is in ``section``; the step it was in. Raises TimeoutError."""
    victim, step = stop_in_section(state, section, rank=rank, seconds=seconds, after_term=after_term)
    os.kill(victim.pid, signal.SIGKILL)
    return step


def stop_in_section(
    state: Path, section: str, *, rank: int, seconds: float, after_term: tuple[int, int] = (0, 0)
) -> tuple[Victim, int]:
    """SIGSTOP to the worker of ``rank`` while it is in ``section``; the worker, and the step it is in.

    The section is read from the step records' header, and once more behind the signal: it lands where it should however
    late it is. Raises TimeoutError.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        victim = next((v for v in workers(state) if v.rank == rank and v.term > after_term), None)
        if victim is None:
            time.sleep(0.002)
            continue
        step = _stop_if_seen(victim, section, deadline)
        if step is not None:
            return victim, step
    raise TimeoutError(f"the worker of rank {rank} was not seen in section {section} within {seconds:.0f} s")


def _stop_if_seen(victim: Victim, section: str, deadline: float) -> int | None:
    """Watches one worker until it is caught or gone."""
    try:
        reader = StepReader(victim.folder / "steps")
    except (FileNotFoundError, StepRecordError):
        time.sleep(0.002)
        return None
    step = 0
    looks = 0
    try:
        while time.monotonic() < deadline:
            looks += 1
            if reader.section == section:
                os.kill(victim.pid, signal.SIGSTOP)
                wait_stopped(victim.pid)
                step = max((record.step for record in reader.new_records()), default=step)
                if reader.section == section:
                    return step + 1
                os.kill(victim.pid, signal.SIGCONT)
            elif looks % 2000 == 0 and not alive(victim.pid):
                return None
    except ProcessLookupError:
        return None
    finally:
        reader.close()
    return None


def wait_stopped(pid: int) -> None:
    """A stop signal takes effect when the kernel next looks at the process. Raises ProcessLookupError."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            raise ProcessLookupError(pid) from None
        if state in "TtZX":
            return
        time.sleep(0)
