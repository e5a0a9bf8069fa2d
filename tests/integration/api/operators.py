"""The operator as a subprocess, against a real API server."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

from lockstep_operator.backends import ports


class Operator:
    """One `python -m lockstep_operator`. Its output goes to a file that a failing test shows."""

    def __init__(self, folder: Path, kubeconfig: Path, namespace: str, *options: str) -> None:
        self.folder, self.namespace = folder, namespace
        self._environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
        self._options = options
        key = folder / "master-key"
        if not key.exists():
            key.write_text(secrets.token_hex(32))
        self._key = key
        self._reserved = ports.reserve(2)  # for good: it may start again
        self.metrics_port, self.health_port = map(ports.number, self._reserved)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it may have been killed before."""
        with (self.folder / "operator.log").open("ab") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "lockstep_operator",
                    f"--master-key-file={self._key}",
                    "--bind-address=127.0.0.1",
                    f"--metrics-port={self.metrics_port}",
                    f"--health-port={self.health_port}",
                    f"--lease-namespace={self.namespace}",
                    f"--namespace={self.namespace}",
                    *self._options,
                ],
                env=self._environment,
                stdout=output,
                stderr=output,
            )

    def kill(self) -> None:
        """SIGKILL, as when its node loses power."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)

    @property
    def log(self) -> str:
        """All that it has said."""
        return (self.folder / "operator.log").read_text()
