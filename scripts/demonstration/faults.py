"""Breaks things in a running job, from outside: what a demonstration and the end-to-end tests do to it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from demonstration import install
from demonstration.target import DemoError, Target
from localcluster import pods as pods_of_cluster
from lockstep_api import constants

# Runs inside the pod. A worker's folder has pid.json from its start and exit.json from its end.
_FIND = """
import json, os, pathlib, signal, sys
folders = sorted(pathlib.Path("/lockstep/run/workers").glob("e*-g*-r*"), key=lambda f: f.stat().st_mtime)
alive = []
for folder in folders:
    if (folder / "exit.json").exists() or not (folder / "pid.json").exists():
        continue
    pid = json.loads((folder / "pid.json").read_text())["pid"]
    if os.path.exists(f"/proc/{pid}"):
        alive.append((folder.name, pid))
if not alive:
    sys.exit("no worker is alive in this pod")
name, pid = alive[-1]
os.kill(pid, signal.Signals[sys.argv[1]])
print(json.dumps({"worker": name, "pid": pid, "rank": int(name.rpartition("-r")[2])}))
"""


def pods(target: Target, namespace: str, job: str) -> list[dict[str, Any]]:
    """The job's pods that hold a slot and are not being deleted, by slot."""
    selector = f"{constants.LABEL_JOB_NAME}={job},{constants.LABEL_SLOT}"
    items = target.get("pods", "-n", namespace, "-l", selector)["items"]
    live = [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]
    return sorted(live, key=slot_of)


def slot_of(pod: dict[str, Any]) -> int:
    """The slot that a pod holds."""
    return int(pod["metadata"]["labels"][constants.LABEL_SLOT])


def kill_worker(target: Target, namespace: str, pod: str, sent: signal.Signals = signal.SIGKILL) -> dict[str, Any]:
    """SIGKILL, or another signal, to the last worker of a pod; which one it was."""
    told: dict[str, Any] = json.loads(target.exec(namespace, pod, ["python3", "-c", _FIND, sent.name]))
    return told


def kill_operator(target: Target) -> str:
    """SIGKILL to the operator that holds the Lease, on the local cluster; its pod. Its successor has to wait until the
    Lease runs out."""
    holder = install.lease_holder(target).partition("_")[0]
    for pod in install.operator_pods(target):
        if pod["metadata"]["name"] == holder:
            kill_in_pod(target, pod["metadata"]["uid"], "lockstep_operator")
            return holder
    raise DemoError(f"no operator holds the Lease and runs: its holder is {holder or 'nobody'}")


def kill_in_pod(target: Target, pod_uid: str, module: str) -> int:
    """SIGKILL to the process of a pod that runs ``python -m module``, on the local cluster; its number on this machine.
    From inside no signal reaches a container's first process."""
    if target.cluster is None:
        raise DemoError("pods are processes of this machine on the local cluster only")
    for pid in pods_of_cluster.running(target.cluster.layout, pod_uid, module):
        os.kill(pid, signal.SIGKILL)
        return pid
    raise DemoError(f"pod {pod_uid} runs no {module}")


def pod_away_from(target: Target, namespace: str, job: str, node: str) -> dict[str, Any]:
    """A member pod on another node than ``node``, of the highest slot."""
    for pod in reversed(pods(target, namespace, job)):
        if pod["spec"].get("nodeName") not in (None, node):
            return dict(pod)
    raise DemoError(f"all pods of {job} are on {node}")


def cut_node(target: Target, node: str) -> None:
    """Cuts a node's power. Only where the nodes are ours: raises DemoError on an existing cluster."""
    if target.cluster is None:
        raise DemoError(f"{node} is not ours to cut; use the local cluster")
    target.cluster.power_cut(int(node.removeprefix("node")))


def lose_pod(target: Target, namespace: str, pod: str) -> None:
    """Takes one pod away without a word, the nearest to a lost node where the machines are somebody else's."""
    target.kubectl("delete", "pod", pod, "-n", namespace, "--force", "--grace-period=0", "--wait=false")


@contextmanager
def drained(target: Target, node: str, job: str) -> Iterator[None]:
    """Evicts the job's pods from a node, waits until they are gone, and opens the node again in the end."""
    try:
        selector = f"{constants.LABEL_JOB_NAME}={job}"
        target.kubectl("drain", node, f"--pod-selector={selector}", "--delete-emptydir-data", "--timeout=90s")
        yield
    finally:
        target.kubectl("uncordon", node)
