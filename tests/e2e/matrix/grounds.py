"""Finds what a job's pods are on this machine: their run folders and their processes.

A node is a tree of processes of this machine, so its file system can be read through its first process, and its pods'
processes be signalled. A folder of links, one for each pod, looks like the pods' folder of a local run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from crash.instants import Place
from e2e.jobs import BUCKET, NAMESPACE, RunningJob
from localcluster import Cluster
from localcluster.processes import children
from localrun.victims import alive, children_running

_WORKER = re.compile(r"e(\d+)-g(\d+)-r(\d+)")
_VOLUMES = "volumes/kubernetes.io~empty-dir/lockstep-run"
_CONFIG = "volumes/kubernetes.io~configmap/lockstep-config/job.json"

Term = tuple[int, int]


class NothingThereError(Exception):
    """A process or folder that is to be broken is not there."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that is alive: its newest folder, and its process on this machine."""

    rank: int
    term: Term
    folder: Path
    pod_uid: str
    pid: int


class Grounds:
    """One job's pods, wherever they are."""

    def __init__(self, cluster: Cluster, job: RunningJob, folder: Path) -> None:
        """``folder``: an empty one for the links."""
        self._cluster = cluster
        self._uid = job.job.uid
        self._pods = folder / "pods"
        self._pods.mkdir(parents=True)
        bucket = cluster.layout.state / "s3" / BUCKET
        self.state = folder
        """Looks like the state folder of a local run."""
        self.place = Place(self._pods, bucket / "runs" / NAMESPACE / job.name / self._uid, bucket)
        self._numbers: dict[str, dict[int, int]] = {}  # pod → process number inside → on this machine

    def refresh(self) -> None:
        """Link the folders of pods that have come, on all nodes that have power."""
        for node in self._cluster.nodes:
            process = self._cluster.processes.get(node.name)
            for first in children(process.pid) if process and process.alive else ():
                self._link(Path(f"/proc/{first}/root/var/lib/kubelet/pods"))

    def _link(self, pods: Path) -> None:
        with suppress(OSError):  # a node whose power has just been cut
            for pod in list(pods.iterdir()):
                link, run = self._pods / pod.name, pod / _VOLUMES
                if link.is_symlink() and link.readlink() == run:
                    continue
                with suppress(OSError, ValueError):
                    mine = json.loads((pod / _CONFIG).read_text())["uid"] == self._uid
                    if mine and run.is_dir():
                        link.unlink(missing_ok=True)
                        link.symlink_to(run)

    def workers(self) -> list[Worker]:
        """Those that are alive, by rank; of each rank the newest."""
        self.refresh()
        found: dict[int, Worker] = {}
        for pod in list(self._pods.iterdir()):
            for worker in self._workers_of(pod):
                if worker.rank not in found or worker.term > found[worker.rank].term:
                    found[worker.rank] = worker
        return [found[rank] for rank in sorted(found)]

    def _workers_of(self, pod: Path) -> Iterator[Worker]:
        with suppress(OSError):
            for folder in list((pod / "workers").iterdir()):
                with suppress(OSError, ValueError):
                    match = _WORKER.fullmatch(folder.name)
                    if match is None or (folder / "exit.json").exists():
                        continue
                    number = json.loads((folder / "pid.json").read_text())["pid"]
                    pid = self._on_this_machine(pod.name, number)
                    if pid is not None:
                        epoch, generation, rank = map(int, match.groups())
                        yield Worker(rank, (epoch, generation), folder, pod.name, pid)

    def worker(self, rank: int | None = None, pod_uid: str | None = None) -> Worker:
        """The newest worker of a rank, or of a pod. Raises NothingThereError."""
        for worker in reversed(self.workers()):
            if rank in (None, worker.rank) and pod_uid in (None, worker.pod_uid):
                return worker
        raise NothingThereError(f"no worker of rank {rank}, pod {pod_uid} is alive")

    def supervisor(self, pod_uid: str) -> int:
        """The first process of a pod's container. Raises NothingThereError."""
        pid = self._on_this_machine(pod_uid, 1)
        if pid is None:
            raise NothingThereError(f"pod {pod_uid} has no process")
        return pid

    def agent(self, pod_uid: str) -> int:
        """The agent of a pod. Raises NothingThereError."""
        found = children_running(self.supervisor(pod_uid), "lockstep_trainer.agent")
        if not found:
            raise NothingThereError(f"pod {pod_uid} has no agent")
        return found[0]

    def _on_this_machine(self, pod_uid: str, number: int) -> int | None:
        known = self._numbers.get(pod_uid, {}).get(number)
        if known is None or not alive(known):
            numbers: dict[int, int] = {}
            self._numbers[pod_uid] = numbers
            for pid in having(f"LOCKSTEP_POD_UID={pod_uid}"):
                numbers.setdefault(_inside(pid), pid)
            known = numbers.get(number)
        return known


def having(variable: str) -> Iterator[int]:
    """Processes of this machine that live and began with ``NAME=VALUE`` in their environment."""
    wanted = variable.encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if wanted in Path(entry.path, "environ").read_bytes().split(b"\0") and alive(int(entry.name)):
                    yield int(entry.name)
            except OSError:
                continue


def _inside(pid: int) -> int:
    """A process's number in the innermost namespace that it is in; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), 0)
