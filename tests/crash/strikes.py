"""What is killed and when: drawn first, then done to a run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crash.instants import Appears, Place, wait_for
from localrun import LocalRun, victims
from s3server import S3Server

WORKER, LEADER, MEMBER = "worker", "leader's agent", "member's agent"
LEADER_POD, MEMBER_POD, SERVER, ALL = "leader's pod", "member's pod", "S3 server", "all pods"

_PATIENCE = 20.0  # seconds that an aimed kill waits for its instant; then it kills at once


@dataclass(frozen=True, slots=True)
class Aim:
    """When: in a worker's section, just after a file has appeared, or at any time."""

    section: str = ""
    file: Appears | None = None
    delay: float = 0.0  # seconds after the instant

    def __str__(self) -> str:
        return f"section {self.section}" if self.section else self.file.name if self.file else "any time"


@dataclass(frozen=True, slots=True)
class Strike:
    """What is killed, and when."""

    part: str
    aim: Aim
    rank: int = 0  # of a worker
    down: float = 0.0  # seconds until a killed server is started again


@dataclass(frozen=True, slots=True)
class Kill:
    """A strike as it was done."""

    part: str
    aim: str
    hit: bool  # at the instant that was aimed at
    delay: float
    what: str = ""  # the file that had appeared, or the step that the worker was in


class Striker:
    """Kills parts of one run."""

    def __init__(self, run: LocalRun, server: S3Server, place: Place, over: Callable[[], bool]) -> None:
        self._run, self._server, self._place, self._over = run, server, place, over

    def strike(self, strike: Strike, harm: Callable[[], None] = lambda: None) -> Kill | None:
        """Wait for the instant, and kill. None where there was nothing left to kill: the run is over.

        ``harm`` is done while nothing is alive, where all pods are killed.
        """
        aim = strike.aim
        if strike.part == WORKER and aim.section:
            return self._in_section(strike)
        pid = None if strike.part in (SERVER, ALL) else self._pid(strike)
        if strike.part not in (SERVER, ALL) and pid is None:
            return None
        what = wait_for(aim.file, self._place, _PATIENCE, self._over) if aim.file else ""
        if self._over():
            return None
        time.sleep(aim.delay)
        if strike.part == ALL:
            self.blackout(harm)
        elif strike.part == SERVER:
            self._server.kill()
            time.sleep(strike.down)
            self._server.start()
        else:
            pid = pid if pid is not None and victims.alive(pid) else self._pid(strike)
            if pid is None or not kill(pid):
                return None
        return Kill(strike.part, str(aim), what is not None, round(aim.delay, 4), what or "")

    def _in_section(self, strike: Strike) -> Kill | None:
        section = strike.aim.section
        term = max((victim.term for victim in victims.workers(self._run.state)), default=(0, 0))
        # One that restores is one that has not been started yet.
        after = term if section == "restore" else (0, 0)
        try:
            step = victims.kill_in_section(
                self._run.state, section, rank=strike.rank, seconds=_PATIENCE, after_term=after
            )
        except TimeoutError:
            pid = None if self._over() else self._pid(strike)
            return Kill(WORKER, str(strike.aim), False, 0.0) if pid is not None and kill(pid) else None
        return Kill(WORKER, str(strike.aim), True, 0.0, f"step {step}")

    def _pid(self, strike: Strike) -> int | None:
        """Of the process to kill, where it lives; its successor may take a moment to come."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not self._over():
            if (pid := self._find(strike)) is not None:
                return pid
            time.sleep(0.02)
        return None

    def _find(self, strike: Strike) -> int | None:
        if strike.part == WORKER:
            found = [v for v in victims.workers(self._run.state) if v.rank == strike.rank]
            return found[-1].pid if found else None
        pod = self._run.supervisor(0 if strike.part in (LEADER, LEADER_POD) else 1)
        if pod is None or strike.part in (LEADER_POD, MEMBER_POD):
            return pod
        return next(iter(victims.children_running(pod, "lockstep_trainer.agent")), None)

    def blackout(self, harm: Callable[[], None] = lambda: None) -> None:
        """All pods and the server lose their power at once; ``harm`` is done before any comes back. Whoever replaces
        the pods, the operator within the command, stands still meanwhile: it is no part of the job's memory."""
        os.kill(self._run.process.pid, signal.SIGSTOP)
        try:
            while pids := processes_of(self._run.state):
                for pid in pids:
                    kill(pid)
                time.sleep(0.005)
            self._server.kill()
            harm()
        finally:
            self._server.start()
            os.kill(self._run.process.pid, signal.SIGCONT)


def processes_of(state: Path) -> set[int]:
    """The processes of all pods of a local run: they have its folder in their environment."""
    wanted = f"LOCKSTEP_RUN_DIR={state.resolve()}/".encode()
    found = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if wanted in Path(entry.path, "environ").read_bytes() and victims.alive(int(entry.name)):
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def kill(pid: int) -> bool:
    """SIGKILL; whether there was such a process."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
