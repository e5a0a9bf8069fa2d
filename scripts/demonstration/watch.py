"""Follows a TrainingJob through one ``kubectl get --watch``: no polling, no process per look."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from demonstration.target import DemoError, Target
from lockstep_api.v1alpha1 import TrainingJob


class JobWatch:
    """The job's state, as it changes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._process = process
        self._pipe = process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._text = ""
        self._decoder = json.JSONDecoder()
        self.job: TrainingJob | None = None

    def next(self, seconds: float) -> TrainingJob | None:
        """The next state; None when there is none for so long. Raises DemoError when the watch has ended."""
        deadline = time.monotonic() + seconds
        while True:
            job = self._decode()
            if job is not None:
                self.job = job
                return job
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                return None
            chunk = os.read(self._pipe, 1 << 16)
            if not chunk:
                raise DemoError("kubectl's watch of the job has ended; is the API server reachable?")
            self._text += chunk.decode()

    def _decode(self) -> TrainingJob | None:
        text = self._text.lstrip()
        try:
            value, end = self._decoder.raw_decode(text)
        except ValueError:  # not whole yet
            return None
        self._text = text[end:]
        return TrainingJob.model_validate(value)

    def until(
        self,
        condition: Callable[[TrainingJob], bool],
        seconds: float,
        what: str,
        each: Callable[[TrainingJob], None] = lambda job: None,
    ) -> TrainingJob:
        """Waits for ``condition``; raises DemoError when it takes longer than ``seconds``, or the job fails first."""
        deadline = time.monotonic() + seconds
        job = self.job
        while True:
            if job is not None:
                each(job)
                if condition(job):
                    return job
                if job.status.phase == "Failed":
                    raise DemoError(f"the job failed before {what}: {failure(job)}")
            left = deadline - time.monotonic()
            if left <= 0:
                at = f"phase {job.status.phase}, step {job.status.progress.step}" if job else "it was never seen"
                raise DemoError(f"waited {seconds:.0f} s for {what}: {at}")
            job = self.next(min(left, 1.0)) or job


@contextmanager
def watch(target: Target, namespace: str, name: str) -> Iterator[JobWatch]:
    """A watch of one job."""
    command = target.command("kubectl", "get", "trainingjob", name, "-n", namespace, "--watch", "-o", "json")
    process = subprocess.Popen(command, env=target.environment, stdout=subprocess.PIPE)
    try:
        yield JobWatch(process)
    finally:
        process.kill()
        process.wait()


def failure(job: TrainingJob) -> str:
    """Why a job failed."""
    failed = [c.message for c in job.status.conditions if c.type == "Failed" and c.status == "True"]
    return failed[0] if failed else "its status has no reason"
