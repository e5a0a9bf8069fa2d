"""An S3 server that can be killed and started again on the same port, over a folder whose objects can be damaged."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from localcluster import build
from lockstep_operator.backends import ports

BUCKET = "lockstep-test"


class ServerProgramMissingError(Exception):
    """versitygw is not built."""


class S3Server:
    """versitygw over a folder; as a context manager, as often as one likes, or started and killed."""

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", within: Sequence[str] = ()) -> None:
        """``host``: the address that it listens on; ``within``: words before its command, as of a network namespace."""
        program = build.programs().get("versitygw")
        if program is None:
            raise ServerProgramMissingError("no S3 server; `python -m localcluster build versitygw` builds one")
        self.bucket = folder / BUCKET
        """A key of the bucket is a path below it."""
        self.bucket.mkdir(parents=True)
        self._secret = secrets.token_hex(16)
        self._reserved = ports.reserve(1)  # for good: the port must be free again after a kill
        self._port = ports.number(self._reserved[0])
        self._host = host
        self._command = [*within, str(program), f"--port={host}:{self._port}", "--quiet", "posix", str(folder)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://{self._host}:{self._port}"

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def credentials(self) -> dict[str, str]:
        """Environment of its clients."""
        return {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": self._secret}

    def start(self) -> None:
        """Start it and wait until it listens."""
        own = {"ROOT_ACCESS_KEY": "test", "ROOT_SECRET_KEY": self._secret}
        nowhere = subprocess.DEVNULL
        self._process = subprocess.Popen(
            self._command, env={**os.environ, **own}, stdin=nowhere, stdout=nowhere, stderr=nowhere,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection((self._host, self._port), timeout=1).close()
                return
            except OSError:
                code = self._process.poll()
                assert code is None, f"the S3 server ended with {code}"
                assert time.monotonic() < deadline, "the S3 server does not listen"
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def server_or_skip(folder: Path) -> S3Server:
    """One over a folder; without its program the test is skipped, but in CI it fails."""
    try:
        return S3Server(folder)
    except ServerProgramMissingError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
