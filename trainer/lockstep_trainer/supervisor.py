"""PID 1 of a pod: starts the agent and the zygote, starts them again when they die, reaps what is left behind.

A second agent stands by: it has done its imports, which take a second of a busy core, and waits for a byte from the
supervisor. So whoever talks to an agent that dies has the next one within milliseconds. It is started
LOCKSTEP_STANDBY_SECONDS (20) behind the agent: first the workers' own start needs the cores.

It knows nothing of training, so that there is next to nothing in it that can fail: standard library, one thread, one
loop over signals. Workers are the zygote's children; if the zygote dies they become the supervisor's (it is the
subreaper), go on, and their exit codes are kept in ``exits/<pid>.json`` for the agent.

An agent that ends with PREFLIGHT_EXIT_CODE has found its node unfit: then everything ends, with that code.

It raises the soft limit of open files to the hard one, for itself and all that it starts: a leader has a stream of each
pod, a rendezvous store connections of each rank, and container runtimes give 1024.

SIGTERM is passed on to the agent, which ends its workers; what is still alive after LOCKSTEP_GRACE_SECONDS (25) is
killed. Its own death ends everything: in a pod because it is PID 1, in a local run because agent and zygote ask the
kernel for a signal when their parent dies (LOCKSTEP_DIE_WITH_PARENT, the id of its own parent, ties it to that too).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep_api.constants import PREFLIGHT_EXIT_CODE

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
_LONGEST_PAUSE = 10.0
SUPERVISOR_VARIABLE = "LOCKSTEP_SUPERVISOR_PID"
"""Its process id, in the environment of what it starts."""
STANDBY_VARIABLE = "LOCKSTEP_STANDBY"
"""Descriptor that a standby waits at, in its environment."""
OPEN_FILES_VARIABLE = "LOCKSTEP_OPEN_FILES"
"""Soft limit of open files that the container was given, in the environment: programs of the user get it back."""
STANDBY_NAME = "agent (standby)"
AGENT_NAME = "lockstep-agent"
_LIVED_WELL = 60.0
"""A service that lived this long, in seconds, is started again at once when it dies."""


def write_whole(path: Path, data: bytes) -> None:
    """Replace the file as a whole: a reader sees the old bytes or the new ones."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def write_json(path: Path, value: object) -> None:
    """The same for a value as JSON."""
    write_whole(path, json.dumps(value).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file; None where there is no file, or no JSON in it."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return raw


def die_with_parent(number: signal.Signals = signal.SIGTERM, parent: str | None = None) -> None:
    """Ask the kernel for this signal when the parent dies. One that is gone already counts: ``parent`` is its process
    id, as an environment has it, for who comes to this only behind its imports."""
    before = os.getppid() if parent is None else int(parent)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != before:
        os.kill(os.getpid(), number)


def name_process(name: str) -> None:
    """What ``ps`` shows as this process's name; at most 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def raise_open_files() -> int:
    """Raise the soft limit of open files to the hard one, as far as the kernel lets us; returns what it was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # the hard limit is above the kernel's own: preflight says what is left
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def stat_of(pid: int) -> list[str]:
    """State, parent and all that follows in proc_pid_stat(5), behind the name, which may hold anything. Raises OSError
    where there is no such process."""
    return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()


def descendants(root: int) -> Iterator[int]:
    """Processes below ``root``, in no order."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(stat_of(int(entry))[1])
            except OSError:
                continue  # it has ended meanwhile
            children.setdefault(parent, []).append(int(entry))
    waiting = [root]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            yield child
            waiting.append(child)


@dataclass
class Service:
    """A process that is to run as long as the supervisor does."""

    module: str
    pid: int | None = None
    started: float = 0.0  # monotonic
    next_start: float = 0.0
    pause: float = 0.0
    standby: int | None = None
    """Pid of a second one that waits."""
    _wake: int = -1  # where it is woken

    def start(self, now: float) -> None:
        """Wake the one that stands by, or start one."""
        if self.standby is not None:
            self.pid, self.standby = self.standby, None
            with suppress(BrokenPipeError):  # it has just died too: the next look finds that out
                os.write(self._wake, b"1")
            os.close(self._wake)
        else:
            self.pid = self._spawn()
        self.started = now

    def stand_by(self) -> None:
        """Start a second one that waits."""
        waits_at, self._wake = os.pipe()
        os.set_inheritable(waits_at, True)
        self.standby = self._spawn(**{STANDBY_VARIABLE: str(waits_at)})
        os.close(waits_at)

    def standby_ended(self) -> None:
        """Without having been needed."""
        self.standby = None
        os.close(self._wake)

    def _spawn(self, **environment: str) -> int:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", self.module],
            {**os.environ, SUPERVISOR_VARIABLE: str(os.getpid()), **environment},
            setsigmask=[],
            setsigdef=[signal.SIGTERM, signal.SIGINT],
        )

    def ended(self, now: float) -> None:
        """Start again at once the first time, then after 0.25, 0.5, 1 … 10 s."""
        self.pid = None
        self.pause = 0.0 if now - self.started >= _LIVED_WELL else self.pause
        self.next_start = now + self.pause
        self.pause = min(max(2 * self.pause, 0.25), _LONGEST_PAUSE)


class Supervisor:
    """The loop."""

    def __init__(self, run_dir: Path, grace: float, standby_pause: float) -> None:
        self.exits = run_dir / "exits"
        self.grace = grace
        self.standby_pause = standby_pause
        self.agent = Service("lockstep_trainer.agent")
        self.services = (self.agent, Service("lockstep_trainer.zygote"))
        self.standby_at = 0.0
        self.deadline: float | None = None  # set by SIGTERM
        self.exit_code = 0

    def run(self) -> None:
        """Returns when it was told to end and nothing is left."""
        while self.deadline is None or self.agent.pid is not None:
            now = time.monotonic()
            if self.deadline is not None and now >= self.deadline:
                break
            waits = [10.0] if self.deadline is None else [self.deadline - now]
            for service in self.services:
                if service.pid is None and self.deadline is None:
                    if now >= service.next_start:
                        service.start(now)
                        self.standby_at = now + self.standby_pause
                    else:
                        waits.append(service.next_start - now)
            if self.agent.standby is None and self.deadline is None:
                if now >= self.standby_at:
                    self.agent.stand_by()
                else:
                    waits.append(self.standby_at - now)
            caught = signal.sigtimedwait(_SIGNALS, max(0.0, min(waits)))
            if caught and caught.si_signo != signal.SIGCHLD and self.deadline is None:
                self.deadline = time.monotonic() + self.grace
                if self.agent.pid is not None:
                    os.kill(self.agent.pid, signal.SIGTERM)
            self.reap()
        self.kill_rest()

    def reap(self) -> None:
        """Collect every process that has ended. One signal may stand for many."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.agent.standby:
                self.agent.standby_ended()
                self.standby_at = time.monotonic() + max(1.0, self.standby_pause)
                continue
            service = next((service for service in self.services if service.pid == pid), None)
            code = os.waitstatus_to_exitcode(status)
            if service is None:
                write_json(self.exits / f"{pid}.json", {"pid": pid, "code": code, "at": time.time()})
            else:
                service.ended(time.monotonic())
                if service is self.agent and code == PREFLIGHT_EXIT_CODE and self.deadline is None:
                    self.deadline, self.exit_code = time.monotonic(), code
                if self.deadline is None:
                    print(f"supervisor: {service.module} (pid {pid}) ended with {code}; starting it again", flush=True)

    def kill_rest(self) -> None:
        """Kill all descendants. Orphans come to us, so the walk finds those whose parents die meanwhile."""
        while True:
            for pid in descendants(os.getpid()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def main() -> None:
    """Entry point of the container."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if parent := os.environ.get("LOCKSTEP_DIE_WITH_PARENT"):
        die_with_parent(parent=parent)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    run_dir = os.environ.get("LOCKSTEP_RUN_DIR")
    if not run_dir:
        sys.exit("LOCKSTEP_RUN_DIR is not set: name the memory-backed folder of this pod")
    os.environ[OPEN_FILES_VARIABLE] = str(raise_open_files())
    grace, pause = (os.environ.get(f"LOCKSTEP_{name}_SECONDS") for name in ("GRACE", "STANDBY"))
    supervisor = Supervisor(Path(run_dir), float(grace or 25), float(pause or 20))
    supervisor.exits.mkdir(parents=True, exist_ok=True)
    starts = Path(run_dir, "container-starts")
    write_whole(starts, str(int(starts.read_text()) + 1 if starts.exists() else 1).encode())
    supervisor.run()
    sys.exit(supervisor.exit_code)


if __name__ == "__main__":
    main()
