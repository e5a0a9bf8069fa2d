"""One `lockstep run`, as a subprocess."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checker.check import Verdict, check
from checker.stores import FolderObjects
from localrun import victims
from lockstep_api.v1alpha1 import TrainingJobStatus
from lockstep_cli import journal
from lockstep_cli.store import open_uri

QUICKSTART = Path(__file__).resolve().parents[2] / "examples/quickstart.yaml"
POLL_SECONDS = 0.02
"""Status is a file; a file has no way to be waited for that is worth its code here."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended."""

    code: int
    answer: dict[str, Any]  # the command's JSON
    errors: str

    @property
    def status(self) -> TrainingJobStatus:
        """The job's last status."""
        return TrainingJobStatus.model_validate(self.answer["status"])


class LocalRun:
    """A run that goes on in the background; use as a context manager, so that nothing is left behind.

    With overrides, checkpoints go into the given folder too; without, the manifest is run as it is. Overrides that name
    another store come with ``store``: the folder where the server of that store keeps what is below checkpoint.uri.
    """

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str] = (),
        *,
        manifest: Path = QUICKSTART,
        store: Path | None = None,
        environment: Mapping[str, str] | None = None,
        program: str = "lockstep_cli",
        options: Sequence[str] = (),
    ) -> None:
        """``program``: the module that is run; ``localrun.apart`` gives each pod a node of its own."""
        self.state = folder / "run"
        self.store = store or folder / "checkpoints"
        self.errors_file = folder / "errors.txt"
        self.output_file = folder / "answer.json"
        folder.mkdir(parents=True, exist_ok=True)
        own = [f"checkpoint.uri={self.store.as_uri()}"] if overrides and store is None else []
        settings = [*own, *overrides]
        command = [
            *(sys.executable, "-m", program, "run", str(manifest)),
            *("--workdir", str(self.state), "--output", "json", *options),
            *(word for setting in settings for word in ("--set", setting)),
        ]
        self.started = time.time()
        with self.output_file.open("wb") as output, self.errors_file.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )  # fmt: skip

    def __enter__(self) -> LocalRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """Ends it. What the operator could not do, and tried again, fails a test that has nothing else against it."""
        self._end()
        trouble = self.errors_file.read_text(errors="replace")
        assert kind or "Traceback" not in trouble, trouble[-6000:]

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                for pid in victims.descendants(self.process.pid):
                    _kill(pid)
                self.process.kill()
                self.process.wait()

    # --- looking ------------------------------------------------------------------------------------------------

    @property
    def status(self) -> TrainingJobStatus:
        """The job's status now."""
        try:
            job = json.loads((self.state / "status.json").read_text())
        except (FileNotFoundError, ValueError):
            return TrainingJobStatus()
        return TrainingJobStatus.model_validate(job.get("status") or {})

    def until(self, condition: Callable[[TrainingJobStatus], bool], seconds: float, what: str) -> TrainingJobStatus:
        """Waits for a status; raises AssertionError with the run's own words when it does not come."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            status = self.status
            if condition(status):
                return status
            if ended or time.monotonic() > deadline:
                why = f"the run ended with {self.process.returncode}" if ended else f"{seconds:.0f} s have passed"
                raise AssertionError(f"{what} did not come: {why}; status: {status.to_wire()}\n{self.output()}")
            time.sleep(POLL_SECONDS)

    def until_step(self, step: int, seconds: float = 90) -> TrainingJobStatus:
        """Waits until a step is done."""
        return self.until(lambda status: status.progress.step >= step, seconds, f"step {step}")

    def finish(self, seconds: float = 180) -> Result:
        """Waits for the end."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {seconds:.0f} s: {self.status.to_wire()}\n{self.output()}"
            ) from None
        text = self.output_file.read_text()
        # A run that fails answers twice: what became of it, and the error.
        answer, _ = json.JSONDecoder().raw_decode(text) if text.strip() else ({}, 0)
        return Result(code, answer, self.errors_file.read_text())

    def output(self, lines: int = 25) -> str:
        """The last words of the command and of each pod, for a test's failure."""
        files = [self.errors_file, *sorted(self.state.glob("pods/*.log"))]
        return "\n".join(
            f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
            for file in files
            if file.exists()
        )

    # --- its parts ----------------------------------------------------------------------------------------------

    def supervisors(self) -> list[int]:
        """Pids of the pods' supervisors."""
        return victims.children_running(self.process.pid, "lockstep_trainer.supervisor")

    def part(self, module: str, pod: int = 0) -> int:
        """Pid of a supervisor's agent or zygote."""
        found = victims.children_running(self.supervisors()[pod], module)
        assert found, f"no {module} below supervisor {pod}"
        return found[0]

    def supervisor(self, slot: int) -> int | None:
        """Pid of the supervisor of the pod that holds a slot: the one that has its name in its environment."""
        wanted = f"LOCKSTEP_POD_NAME={self.status.slots.get(str(slot))}".encode()
        for pid in self.supervisors():
            try:
                if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
            except OSError:
                continue
        return None

    def store_server(self) -> int:
        """Pid of the rendezvous store."""
        for file in self.state.glob("pods/*/**/pid.json"):
            pid = int(json.loads(file.read_text())["pid"])
            if "workers" not in file.parts and victims.alive(pid):
                return pid
        raise AssertionError("no rendezvous store is alive")

    # --- afterwards ---------------------------------------------------------------------------------------------

    @property
    def run_store(self) -> Path:
        """The run's folder in the store."""
        job = json.loads((self.state / "status.json").read_text())["metadata"]
        return Path(self.store, job["namespace"], job["name"], job["uid"])

    def check(self, steps: int) -> Verdict:
        """The checker's verdict."""
        return check(FolderObjects(self.run_store), steps=steps)

    def journal(self) -> journal.Journal:
        """What happened."""
        return journal.fold(journal.read(open_uri(str(self.run_store))))

    def losses(self) -> list[float]:
        """The loss of every step of the lineage."""
        return [step.loss for step in self.journal().lineage]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
