"""Preflight checks of chosen nodes without a training job: a batch Job for each node, and one table of all."""

from __future__ import annotations

import argparse
import asyncio
import difflib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from lockstep_api import constants
from lockstep_cli.cluster import connect
from lockstep_cli.clusterlogs import log_lines
from lockstep_cli.errors import CliError, NotFoundError
from lockstep_operator import errors, kube
from lockstep_operator.kube import KubeClient
from lockstep_operator.plan.pods import GPU_RESOURCE

LABEL = f"{constants.GROUP}/preflight"
"""On the Jobs and pods of one call; its value is the call's."""
LABEL_NODE = f"{constants.GROUP}/preflight-node"
"""On a pod: the place of its node among those of the call."""
KEPT_SECONDS = 600
"""The cluster deletes the Jobs by itself where this tool was killed before it could."""
LISTED = 10
"""Nodes that a sentence names at most: all of a small cluster, the closest of a larger one."""

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checked:
    """What has become of one node."""

    node: str
    report: Mapping[str, Any] | None  # of lockstep_trainer.health
    why: str = ""  # there is none

    @property
    def fatal(self) -> bool:
        """Whether it must not get work."""
        return any(one["severity"] == "fatal" for one in self.findings)

    @property
    def findings(self) -> Sequence[Mapping[str, Any]]:
        """The worst first."""
        return self.report["findings"] if self.report else ()

    @property
    def word(self) -> str:
        """For the table."""
        return "unfit" if self.fatal else "fit" if self.report else "not checked"


async def run(arguments: argparse.Namespace) -> list[Checked]:
    """Checks the nodes; raises CliError. What was made is deleted again."""
    call = secrets.token_hex(4)
    async with connect(arguments) as (client, namespace):
        nodes = await _nodes(client, arguments.nodes, arguments.selector)
        manifests = [
            manifest(call, index, node, image=arguments.image, gpus=arguments.gpus, tier=arguments.tier)
            for index, node in enumerate(nodes)
        ]
        made: list[str] = []
        try:
            for one in manifests:
                await client.create(kube.JOBS.path(namespace), one)
                made.append(one["metadata"]["name"])
            ended: dict[int, Manifest] = {}
            with suppress(TimeoutError):
                async with asyncio.timeout(arguments.timeout):
                    await _follow(client, namespace, f"{LABEL}={call}", len(nodes), ended)
            return [await _checked(client, namespace, node, ended.get(index)) for index, node in enumerate(nodes)]
        finally:
            for name in made:
                await client.delete(kube.JOBS.path(namespace, name))


async def _nodes(client: KubeClient, named: Iterable[str], selector: str) -> list[str]:
    chosen = list(dict.fromkeys(named))
    if selector:
        page = await client.list(kube.NODES.path(), labels=selector)
        chosen += [item["metadata"]["name"] for item in page.items if item["metadata"]["name"] not in chosen]
    if not chosen:
        raise CliError("no node is chosen: name some, or give --selector with labels that nodes have")
    # Whoever may not read nodes is believed, and a pod without a node waits until the time is over.
    with suppress(errors.RefusedError):
        # Each is asked for by itself: a list of all would be tens of megabytes in a large cluster.
        if missing := [name for name in dict.fromkeys(named) if not await _is_there(client, name)]:
            raise NotFoundError(unknown(missing, await _all(client)))
    return chosen


async def _is_there(client: KubeClient, name: str) -> bool:
    try:
        found = await client.get(kube.NODES.path(name=name))
    except errors.NotFoundError:
        return False
    # An empty name asks for the list, one with a slash for a part of a node.
    return bool(found.get("metadata", {}).get("name") == name)


async def _all(client: KubeClient) -> list[str]:
    """Names of the cluster's nodes; none where they can't be listed."""
    try:
        page = await client.list(kube.NODES.path())
    except errors.RefusedError:
        return []
    return [item["metadata"]["name"] for item in page.items]


def unknown(missing: Sequence[str], there: Sequence[str]) -> str:
    """That the cluster has no nodes of these names, and which it has. ``there`` is empty where that is not known."""
    what = f"{', '.join(name or '(an empty name)' for name in missing)}: the cluster has no such node"
    what += "s" if len(missing) > 1 else ""
    if not there:
        return f"{what}; `kubectl get nodes` lists those that there are"
    if len(there) <= LISTED:
        return f"{what}; there {'are' if len(there) > 1 else 'is'} {', '.join(sorted(there))}"
    close = dict.fromkeys(one for name in missing for one in difflib.get_close_matches(name, there))
    if not close:
        return f"{what}, nor one of the {len(there)} a name like it; `kubectl get nodes` lists them"
    return f"{what}; the closest of the {len(there)} are {', '.join([*close][:LISTED])}; `kubectl get nodes` lists all"


def manifest(call: str, index: int, node: str, *, image: str, gpus: int, tier: str) -> Manifest:
    """The Job of one node. It tolerates every taint: nodes that are put aside are checked before they come back."""
    labels = {LABEL: call, LABEL_NODE: str(index)}
    command = ["python3", "-m", "lockstep_trainer.health", "--json", "--tier", tier, "--gpus", str(gpus)]
    container = {
        "name": constants.CONTAINER_NAME,
        "image": image,
        "command": command,
        "env": [{"name": "LOCKSTEP_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        "resources": {"limits": {GPU_RESOURCE: str(gpus)}} if gpus else {},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    here = {"key": "metadata.name", "operator": "In", "values": [node]}
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
        "tolerations": [{"operator": "Exists"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": [here]}]}
            }
        },
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"lockstep-preflight-{call}-{index}", "labels": labels},
        "spec": {
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


async def _follow(client: KubeClient, namespace: str, labels: str, nodes: int, seen: dict[int, Manifest]) -> None:
    """Keeps the newest pod of each node in ``seen`` until all have ended."""
    path = kube.PODS.path(namespace)
    while True:
        page = await client.list(path, labels=labels)
        seen |= {_index(pod): pod for pod in page.items}
        if _all_ended(seen, nodes):
            return
        # A server ends watches every few minutes, and a connection may break: then it is listed again.
        with suppress(errors.ExpiredError, errors.UnavailableError):
            async for kind, pod in client.watch(path, page.resource_version, labels=labels):
                if kind in ("ADDED", "MODIFIED"):
                    seen[_index(pod)] = pod
                    if _all_ended(seen, nodes):
                        return


def _index(pod: Manifest) -> int:
    return int(pod["metadata"]["labels"][LABEL_NODE])


def _all_ended(seen: Mapping[int, Manifest], nodes: int) -> bool:
    return len(seen) == nodes and all(
        pod.get("status", {}).get("phase") in ("Succeeded", "Failed") for pod in seen.values()
    )


async def _checked(client: KubeClient, namespace: str, node: str, pod: Manifest | None) -> Checked:
    if pod is None:
        return Checked(node, None, "its Job made no pod: `kubectl describe job` while the command runs says why")
    if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
        return Checked(node, None, waits(pod))
    told = [line async for line in log_lines(client, namespace, pod["metadata"]["name"], follow=False)]
    return checked(node, told)


def checked(node: str, told: Sequence[str]) -> Checked:
    """From what the pod wrote: the report is the line that is a JSON object."""
    for line in reversed(told):
        if line.startswith("{"):
            with suppress(ValueError):
                report = json.loads(line)
                if "findings" in report:
                    return Checked(node, report)
    return Checked(node, None, told[-1] if told else "its pod ended without a word")


def waits(pod: Manifest) -> str:
    """Why the pod has not ended in time."""
    status = pod.get("status", {})
    for one in status.get("containerStatuses", []):
        if waiting := one.get("state", {}).get("waiting"):
            return f"{waiting.get('reason', '')}: {waiting.get('message', '')}".strip(": ")
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message", condition.get("reason", "")))
    return "its checks did not end in time; its GPUs or their driver may not answer"


def table(checks: Sequence[Checked]) -> Table:
    """A row a node: the slowest of its GPUs, the largest all-reduce, what was found."""
    grid = Table(box=None, pad_edge=False)
    for name in ("NODE", "", "GPUS"):
        grid.add_column(name)
    for name in ("TFLOP/s", "COPY GB/s", "BUS GB/s"):
        grid.add_column(name, justify="right")
    grid.add_column("FOUND", overflow="fold")
    for one in checks:
        found = [f"{finding['severity']}: {finding['text']}" for finding in one.findings] or [one.why or "nothing"]
        gpus = str(len(one.report["readings"]["gpus"])) if one.report else ""
        grid.add_row(one.node, one.word, gpus, *_rates(one.report), found[0])
        for more in found[1:]:
            grid.add_row("", "", "", "", "", "", more)
    return grid


def _rates(report: Mapping[str, Any] | None) -> tuple[str, str, str]:
    burns = [burn["rates"] for burn in report["burns"] if burn["rates"]] if report else []
    reduced = [row for row in report["collectives"] if row["operation"] == "all_reduce"] if report else []
    bus = max(reduced, key=lambda row: row["size"])["busbw"] if reduced else None
    slowest = [min(rates[name] for rates in burns) if burns else None for name in ("matmul", "copy")]
    product, copy, on_bus = ("" if rate is None else f"{rate:.1f}" for rate in (*slowest, bus))
    return product, copy, on_bus


def wire(checks: Sequence[Checked]) -> dict[str, Any]:
    """For programs."""
    return {"nodes": [{"node": one.node, "result": one.word, "why": one.why, "report": one.report} for one in checks]}
