"""The S3 server that all systems write to, and who has used how much of the processors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.storage import ObjectStore, open_store
from peers.link import link
from s3server import BUCKET, S3Server, ServerProgramMissingError

REGION = "us-east-1"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Server:
    """versitygw over a folder of this machine."""

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
def serving(folder: Path, *, megabits: float | None = None) -> Iterator[Server]:
    """Start it with an empty bucket; the credentials are in this process's environment from here on. ``megabits``: a
    second that get to it, and as many back; None: it is on loopback."""
    with ExitStack() as stack:
        place: dict[str, Any] = {}
        if megabits is not None:
            over = stack.enter_context(link(megabits))
            place = {"host": over.host, "within": over.within}
            os.environ["NO_PROXY"] = os.environ["no_proxy"] = over.host
        try:
            server = S3Server(folder, **place)
        except ServerProgramMissingError as error:
            raise SystemExit(str(error)) from None
        os.environ.update(server.credentials, AWS_EC2_METADATA_DISABLED="true")
        stack.enter_context(server)
        yield Server(server.endpoint, server.pid, server.bucket)


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
