"""`lockstep preflight`: the Job that checks one node, and the table of all."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rich.console import Console

from lockstep_cli import preflight
from lockstep_cli.errors import CliError, NotFoundError
from lockstep_cli.preflight import Checked, checked, manifest
from lockstep_operator import errors, kube
from lockstep_operator.kube import Page

FOUND = {"severity": "fatal", "kind": "gpu.remap-pending", "text": "GPU 1: a row of its memory waits; reset the GPU"}
WARNING = {"severity": "warn", "kind": "host.shm-small", "text": "/dev/shm holds 64 bytes"}


def report(*findings: dict[str, Any], **measured: Any) -> dict[str, Any]:
    """Of a node of two GPUs."""
    gpus = [{"index": 0}, {"index": 1}]
    return {"readings": {"gpus": gpus}, "findings": list(findings), "burns": [], "collectives": [], **measured}


class Cluster:
    """Answers for nodes, and remembers which Jobs were made; no pod ever comes of them."""

    def __init__(self, *nodes: str, refused: bool = False, listing: bool = True) -> None:
        self.nodes, self.refused, self.listing = nodes, refused, listing
        self.made: list[str] = []

    async def get(self, path: str) -> dict[str, Any]:
        above, _, name = path.rpartition(f"{kube.NODES.path()}/")
        if self.refused:
            raise errors.RefusedError(403, "Forbidden", "no")
        if path == kube.NODES.path():
            return {"metadata": {}, "items": []}
        if above or name.removesuffix("/status") not in self.nodes:
            raise errors.NotFoundError(404, "NotFound", "no")
        return {"metadata": {"name": name.removesuffix("/status")}}

    async def list(self, path: str, *, labels: str = "") -> Page:
        if path != kube.NODES.path():
            return Page([], "1")
        if self.refused or not self.listing:
            raise errors.RefusedError(403, "Forbidden", "no")
        return Page([{"metadata": {"name": name}} for name in self.nodes if not labels or labels in name], "1")

    async def watch(self, path: str, version: str, *, labels: str = "") -> AsyncIterator[tuple[str, dict[str, Any]]]:
        await asyncio.sleep(3600)
        yield "BOOKMARK", {}

    async def create(self, path: str, body: dict[str, Any]) -> None:
        (term,) = body["spec"]["template"]["spec"]["affinity"]["nodeAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]["nodeSelectorTerms"]
        self.made += term["matchFields"][0]["values"]

    async def delete(self, path: str) -> None:
        pass


def call(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, *nodes: str, selector: str = "") -> list[Checked]:
    """`lockstep preflight` in that cluster; its time is over at once."""

    @asynccontextmanager
    async def connect(_: argparse.Namespace) -> AsyncIterator[tuple[Cluster, str]]:
        yield cluster, "default"

    monkeypatch.setattr(preflight, "connect", connect)
    arguments = argparse.Namespace(
        nodes=[*nodes], selector=selector, image="trainer:1", gpus=8, tier="Full", timeout=0.01
    )
    return asyncio.run(preflight.run(arguments))


@pytest.mark.parametrize("name", ["gpu-71", "", "node/gpu-17", "gpu-17/status"])
def test_a_node_that_is_not_there_is_refused_before_a_job_is_made(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its pod would wait until the time is over."""
    cluster = Cluster("gpu-17", "gpu-31")
    with pytest.raises(NotFoundError) as refused:
        call(monkeypatch, cluster, "gpu-17", name)
    assert str(refused.value) == (
        f"{name or '(an empty name)'}: the cluster has no such node; there are gpu-17, gpu-31"
    )
    assert cluster.made == []


def test_nodes_that_are_there_are_checked_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster("gpu-17", "gpu-31", "cpu-1")
    checks = call(monkeypatch, cluster, "gpu-31", "gpu-31", selector="gpu")
    assert [one.node for one in checks] == cluster.made == ["gpu-31", "gpu-17"]


def test_whoever_may_not_read_nodes_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(refused=True)
    assert [one.node for one in call(monkeypatch, cluster, "gpu-17")] == cluster.made == ["gpu-17"]


def test_whoever_may_not_list_nodes_is_told_how_they_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match=r"gpu-71: .* `kubectl get nodes` lists those that there are"):
        call(monkeypatch, Cluster("gpu-17", listing=False), "gpu-71")


def test_without_a_node_the_ways_to_choose_some_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CliError, match="name some, or give --selector"):
        call(monkeypatch, Cluster("gpu-17"), selector="tpu")


def test_of_many_nodes_those_are_named_that_are_closest_to_what_is_not_there() -> None:
    there = [f"rack-{rack}-gpu-{node}" for rack in range(40) for node in range(50)]
    told = preflight.unknown(["rack-7-gpu-71", "rack-77-gpu-3"], there)
    assert told.startswith("rack-7-gpu-71, rack-77-gpu-3: the cluster has no such nodes; the closest of the 2000 are ")
    assert "rack-7-gpu-7," in told
    assert "rack-7-gpu-3," in told
    assert len(told) < 300
    assert preflight.unknown(["x"], there).endswith("`kubectl get nodes` lists them")
    assert preflight.unknown(["x"], ["node0"]) == "x: the cluster has no such node; there is node0"


def test_a_job_comes_to_its_node_whatever_keeps_others_away_and_takes_all_its_gpus() -> None:
    made = manifest("c0ffee", 2, "gpu-17", image="trainer:1", gpus=8, tier="Full")
    pod = made["spec"]["template"]["spec"]
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term == {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["gpu-17"]}]}
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert pod["restartPolicy"] == "Never"
    assert made["spec"]["backoffLimit"] == 0
    assert made["spec"]["template"]["metadata"]["labels"] == made["metadata"]["labels"]


def test_the_report_is_found_among_what_the_pod_wrote() -> None:
    told = ["a warning of a library", json.dumps(report(FOUND)), "{ not JSON"]
    one = checked("n", told)
    assert one.fatal
    assert one.findings == [FOUND]
    assert checked("n", ["health: no such file"]).why == "health: no such file"
    assert checked("n", []).report is None


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            {"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull", "message": "no"}}}]},
            "ErrImagePull: no",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "Insufficient nvidia.com/gpu"}]},
            "Insuff",
        ),
        ({"phase": "Running"}, "did not end in time"),
    ],
)
def test_what_a_pod_waits_for_is_said(status: dict[str, Any], said: str) -> None:
    assert said in preflight.waits({"status": status})


def test_the_table_has_a_row_a_node_with_the_slowest_gpu_and_every_finding() -> None:
    rates = [{"rates": {"matmul": 680.0, "copy": 2900.0}}, {"rates": {"matmul": 512.5, "copy": 2800.0}}]
    rows = [
        {"operation": "all_reduce", "size": 1, "busbw": 3.0},
        {"operation": "all_reduce", "size": 9, "busbw": 470.0},
    ]
    checks = [
        Checked("fast", report(burns=rates, collectives=rows)),
        Checked("bad", report(FOUND, WARNING)),
        Checked("away", None, "Insufficient nvidia.com/gpu"),
    ]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(preflight.table(checks))
    _, fast, bad, more, away = (line.rstrip() for line in capture.get().splitlines())
    assert fast.split() == ["fast", "fit", "2", "512.5", "2800.0", "470.0", "nothing"]
    assert bad.split()[:3] == ["bad", "unfit", "2"]
    assert FOUND["text"] in bad
    assert WARNING["text"] in more
    assert away.split()[:3] == ["away", "not", "checked"]
    assert [one["result"] for one in preflight.wire(checks)["nodes"]] == ["fit", "unfit", "not checked"]
