"""The S3 server that all systems write to, and who has used how much of the processors."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.storage import ObjectStore, open_store

BUCKET, REGION = "checkpoint-bench", "us-east-1"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Server:
    """versitygw on loopback over a folder of this machine."""

    endpoint: str
    pid: int
    folder: Path  # of the bucket

    @property
    def spec(self) -> S3Spec:
        """How Lockstep's store reaches it."""
        return S3Spec(endpoint=self.endpoint, region=REGION, path_style=True)

    def store(self) -> ObjectStore:
        """The whole bucket, through Lockstep's client."""
        return open_store(f"s3://{BUCKET}", self.spec)

    def drop_data(self) -> None:
        """Remove the large objects of all checkpoints, so that a long run does not fill the disk."""
        for path in self.folder.rglob("*.distcp"):
            path.unlink()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Start it with an empty bucket; the credentials are in this process's environment from here on."""
    from localcluster import build

    program = build.programs().get("versitygw")
    if program is None:
        raise SystemExit("no S3 server; `python -m localcluster build versitygw` builds one")
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}
    os.environ.update(keys, AWS_EC2_METADATA_DISABLED="true")
    own = {"ROOT_ACCESS_KEY": keys["AWS_ACCESS_KEY_ID"], "ROOT_SECRET_KEY": keys["AWS_SECRET_ACCESS_KEY"]}
    (folder / BUCKET).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(program), f"--port=127.0.0.1:{port}", "--quiet", "posix", str(folder)]
    process = subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.DEVNULL)
    try:
        _wait_listening(process, port)
        yield Server(f"http://127.0.0.1:{port}", process.pid, folder / BUCKET)
    finally:
        process.terminate()
        process.wait()


def _wait_listening(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the S3 server does not start") from None
            time.sleep(0.05)


def cpu_seconds(*pids: int) -> float:
    """User and system time of these processes so far, all threads; those that are gone count nothing."""
    found = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        found += int(fields[11]) + int(fields[12])
    return found / _TICKS
