"""What operators and agents use, read from this machine: a pod of the local cluster is a process of it.

Memory is the resident set without what is mapped from files (RssAnon): the kernel takes pages of libraries away and
brings them back as it likes, by megabytes, and the snapshots that an agent maps lie in a memory-backed volume with a
limit of its own.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

from demonstration import install
from e2e.jobs import NAMESPACE
from localcluster import Cluster, ClusterError, pods
from localcluster.processes import children, start_time
from lockstep_api import constants

ROLES = {"operator": "lockstep_operator", "agent": "lockstep_trainer.agent"}
"""Part → the module that its process runs."""
OF_PODS = ("/var/lib/kubelet/pods/", "/run/containerd/", "/run/netns/cni-")
"""Where a node mounts what belongs to pods. All else it has from this machine, as that was at its start."""
MB = 1e6


@dataclass(frozen=True, slots=True)
class Reading:
    """One process at one time."""

    at: float  # seconds since the soak began
    role: str
    process: str  # names it for good: its number and its start
    duty: str  # what it does now: it needs more for some duties than for others
    node: str
    pod_uid: str
    memory: float  # MB
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Nodes:
    """All nodes at one time."""

    at: float
    cgroups: int
    mounts: int


@dataclass
class Duties:
    """What each pod does: who holds the Lease, who a slot. While the API server can't be asked, as before."""

    cluster: Cluster
    _known: dict[str, str] = field(default_factory=dict)  # pod's uid → duty

    def refresh(self) -> None:
        """Ask anew."""
        with suppress(ClusterError, OSError, HTTPException):
            api = self.cluster.api
            lease = api.get(
                f"/apis/coordination.k8s.io/v1/namespaces/{install.SYSTEM_NAMESPACE}/leases/{install.RELEASE}"
            )
            holder = str(lease["spec"].get("holderIdentity", "")).partition("_")[0]
            for pod in api.get(f"/api/v1/namespaces/{install.SYSTEM_NAMESPACE}/pods")["items"]:
                self._known[pod["metadata"]["uid"]] = "works" if pod["metadata"]["name"] == holder else "stands by"
            for pod in api.get(f"/api/v1/namespaces/{NAMESPACE}/pods")["items"]:
                slot = pod["metadata"].get("labels", {}).get(constants.LABEL_SLOT)
                self._known[pod["metadata"]["uid"]] = {None: "spare", "0": "leader"}.get(slot, "member")

    def of(self, pod_uid: str) -> str:
        """What a pod does."""
        return self._known.get(pod_uid, "unknown")


def of_processes(cluster: Cluster, duties: Duties, at: float) -> Iterator[Reading]:
    """Every operator and every agent that is alive."""
    for process in pods.processes(cluster.layout):
        for role, module in ROLES.items():
            with suppress(OSError, KeyError):  # it has just ended
                if process.runs(module):
                    status = _status(process.pid)
                    yield Reading(
                        at, role, f"{process.pid}-{start_time(process.pid)}",
                        duty=duties.of(process.pod_uid),
                        node=process.node,
                        pod_uid=process.pod_uid,
                        memory=status["RssAnon"] * 1024 / MB,
                        descriptors=len(os.listdir(f"/proc/{process.pid}/fd")),
                        threads=status["Threads"],
                    )  # fmt: skip


def of_nodes(cluster: Cluster, at: float) -> Nodes:
    """Cgroups below the nodes' own, in one hierarchy, and what is mounted for pods."""
    return Nodes(at, sum(1 for _ in pods.cgroups(cluster.layout)), sum(map(_mounts, _firsts(cluster))))


def _firsts(cluster: Cluster) -> Iterator[int]:
    """The first process of each node that has power."""
    for node in cluster.nodes:
        process = cluster.processes.get(node.name)
        yield from children(process.pid)[:1] if process and process.alive else ()


def _mounts(pid: int) -> int:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        return sum(line.split()[4].startswith(OF_PODS) for line in lines)
    return 0


def _status(pid: int) -> dict[str, int]:
    """Those lines of a process's status that are numbers; memory in KiB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if (first := value.split()[:1]) and first[0].isdigit():
            found[name] = int(first[0])
    return found


class Reader:
    """Reads every few seconds, beside all else, into memory and a file of JSON lines."""

    def __init__(self, cluster: Cluster, path: Path, began: float, every: float = 5.0) -> None:
        """``began``: monotonic seconds that readings are counted from."""
        self.processes: list[Reading] = []
        self.nodes: list[Nodes] = []
        self._cluster, self._path, self._began, self._every = cluster, path, began, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="readings", daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        duties = Duties(self._cluster)
        with self._path.open("a") as file:
            while not self._over.wait(self._every):
                at = round(time.monotonic() - self._began, 1)
                duties.refresh()
                now, nodes = list(of_processes(self._cluster, duties, at)), of_nodes(self._cluster, at)
                self.processes += now
                self.nodes.append(nodes)
                file.writelines(json.dumps(asdict(one)) + "\n" for one in now)
                file.write(json.dumps(asdict(nodes)) + "\n")
                file.flush()
