"""`lockstep preflight`: the Job that checks one node, and the table of all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from lockstep_cli import preflight
from lockstep_cli.preflight import Checked, checked, manifest

FOUND = {"severity": "fatal", "kind": "gpu.remap-pending", "text": "GPU 1: a row of its memory waits; reset the GPU"}
WARNING = {"severity": "warn", "kind": "host.shm-small", "text": "/dev/shm holds 64 bytes"}


def report(*findings: dict[str, Any], **measured: Any) -> dict[str, Any]:
    """Of a node of two GPUs."""
    gpus = [{"index": 0}, {"index": 1}]
    return {"readings": {"gpus": gpus}, "findings": list(findings), "burns": [], "collectives": [], **measured}


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
