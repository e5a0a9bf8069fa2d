"""Starting, recording and ending processes.

What is started is written down with the time it started, so that a later run can end it and never another process that
was given the same number since.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class ClusterError(RuntimeError):
    """Something the user can act on: the message says what failed and which log to read."""


def run(*argv: str | Path, check: bool = True, stdin: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return what it printed; what it printed is in the error, too."""
    words = [str(a) for a in argv]
    result = subprocess.run(words, text=True, capture_output=True, check=False, input=stdin, env=env)
    if check and result.returncode:
        raise ClusterError(f"{' '.join(map(str, argv))}\n{result.stdout}{result.stderr}".rstrip())
    return result.stdout


def in_network(namespace: str, *argv: str | Path) -> list[str]:
    """The command line that runs a program in a network namespace.

    `ip netns exec` would do as well for plain programs, but it remounts /sys, which hides the cgroups.
    """
    return ["nsenter", f"--net=/run/netns/{namespace}", *map(str, argv)]


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is gone or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name, in parentheses, can hold blanks
    # A killed process's first thread is a zombie while others still end, and until the last one has, its ports are in
    # use. Every tenth restart of the API server on a busy machine failed to bind by that.
    return None if fields[0] in "ZX" and len(threads) <= 1 else int(fields[19])


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@dataclass(frozen=True)
class Process:
    """A process that was started: its number and the time it started."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return start_time(self.pid) == self.started

    def kill(self, timeout: float = 10) -> None:
        """End it without asking, then wait until it is gone."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.wait_gone(timeout)

    def wait_gone(self, timeout: float = 10) -> None:
        """Wait until it is gone, and reap it where it is a child of ours."""
        end = time.monotonic() + timeout
        while self.alive:
            if time.monotonic() > end:
                raise ClusterError(f"process {self.pid} does not end")
            time.sleep(0.01)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)


class Processes:
    """The processes of one cluster, by name, written down in a folder."""

    def __init__(self, records: Path, logs: Path, path: Path) -> None:
        self.records, self.logs, self.path = records, logs, path

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
        """Start a program in a session of its own, its output in a log of its name."""
        self.records.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.log(name), "ab") as log:
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PATH": f"{self.path}:{os.environ['PATH']}", **(env or {})},
            )
        popen.returncode = 0  # it outlives this process; without a code here, Python warns that it still runs
        process = Process(popen.pid, start_time(popen.pid) or 0)
        record = self.records / f"{name}.json"
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"pid": process.pid, "started": process.started, "argv": list(argv)}))
        temporary.replace(record)
        return process

    def log(self, name: str) -> Path:
        """Where a process's output goes."""
        return self.logs / f"{name}.log"

    def get(self, name: str) -> Process | None:
        """The process of this name as it was written down, running or not."""
        try:
            record = json.loads((self.records / f"{name}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return Process(record["pid"], record["started"])

    def alive(self, name: str) -> bool:
        """Whether the process of this name runs."""
        process = self.get(name)
        return process is not None and process.alive

    def names(self) -> list[str]:
        """The names of all that was started and not yet stopped."""
        return sorted(f.stem for f in self.records.glob("*.json"))

    def stop(self, name: str) -> None:
        """End the process of this name, then forget it; with it goes the namespace whose first process is its child."""
        process = self.get(name)
        if process is None:
            return
        # `unshare --kill-child` takes the first process of the node's namespace with it, and that one all others, but
        # only when it is gone itself are its mounts and sockets gone as well.
        first = [Process(pid, start_time(pid) or 0) for pid in children(process.pid)]
        process.kill()
        for child in first:
            child.wait_gone()
        (self.records / f"{name}.json").unlink(missing_ok=True)


def wait_for(what: str, ready: Callable[[], bool], seconds: float, log: Path, every: float = 0.1) -> None:
    """Wait until something holds, with a bound, and name the log to read when it never does."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-5:]) if log.is_file() else ""
            raise ClusterError(f"{what}: not within {seconds:g} s; see {log}\n{tail}".rstrip())
        time.sleep(every)
