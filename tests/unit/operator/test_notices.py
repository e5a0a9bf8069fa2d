"""What is read off a node and a pod: the words of clouds, kubelets and device plugins."""

from __future__ import annotations

from typing import Any

import pytest

from lockstep_operator.cache import trim_node, trim_pod
from lockstep_operator.plan.nodes.notices import LEAVING, LEAVING_CONDITIONS, OUT_OF_SERVICE, SICK_CONDITIONS


def node(
    *taints: str, conditions: dict[str, str] | None = None, gpus: tuple[str, str] | None = None, **spec: Any
) -> dict[str, Any]:
    stated = {"Ready": "True", **(conditions or {})}
    status: dict[str, Any] = {"conditions": [{"type": kind, "status": value} for kind, value in stated.items()]}
    if gpus:
        status |= {"capacity": {"cpu": "8", "nvidia.com/gpu": gpus[0]}, "allocatable": {"nvidia.com/gpu": gpus[1]}}
    spec["taints"] = [{"key": key, "effect": "NoSchedule"} for key in taints]
    return {"metadata": {"name": "n"}, "spec": spec, "status": status}


@pytest.mark.parametrize("taint", sorted(LEAVING))
def test_taints_that_announce_the_end_of_a_node(taint: str) -> None:
    trimmed = trim_node(node(taint))
    assert taint in trimmed.leaving
    assert not trimmed.down


@pytest.mark.parametrize("kind", sorted(LEAVING_CONDITIONS))
def test_conditions_that_announce_the_end_of_a_node(kind: str) -> None:
    assert kind in trim_node(node(conditions={kind: "True"})).leaving
    assert trim_node(node(conditions={kind: "False"})).leaving == ""


@pytest.mark.parametrize("taint", sorted(OUT_OF_SERVICE))
def test_taints_of_a_node_that_is_off(taint: str) -> None:
    assert trim_node(node(taint)).down


@pytest.mark.parametrize(
    "taint",
    [
        "DeletionCandidateOfClusterAutoscaler",  # comes and goes
        "kubernetes.azure.com/scalesetpriority",  # on every spot node, all its life
        "aws-node-termination-handler/rebalance-recommendation",  # promises nothing
        "node.kubernetes.io/unschedulable",  # cordoned: who drains it deletes the pods
        "nvidia.com/gpu",
    ],
)
def test_taints_that_are_no_notice(taint: str) -> None:
    trimmed = trim_node(node(taint))
    assert (trimmed.leaving, trimmed.down, trimmed.sick) == ("", False, "")


@pytest.mark.parametrize("kind", sorted(SICK_CONDITIONS))
def test_conditions_by_which_others_find_a_node_at_fault(kind: str) -> None:
    assert trim_node(node(conditions={kind: "True"})).sick == kind
    assert trim_node(node(conditions={kind: "Unknown"})).sick == ""


def test_readiness_cordon_gpus_and_our_own_taint() -> None:
    assert trim_node(node(conditions={"Ready": "Unknown"})).down
    assert trim_node(node("node.kubernetes.io/unreachable")).down
    assert trim_node(node(unschedulable=True)).cordoned
    trimmed = trim_node(node("lockstep.dev/excluded", gpus=("8", "7")))
    assert (trimmed.gpus, trimmed.gpus_healthy, trimmed.taint) == (8, 7, "")
    assert trim_node(node()).taint is None


def test_what_a_pod_says_of_its_end_and_of_its_devices() -> None:
    manifest = {
        "metadata": {
            "name": "run-0-0",
            "uid": "u",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "deletionTimestamp": "2026-01-01T00:01:30Z",  # when its time of grace will have passed
            "deletionGracePeriodSeconds": 30,
            "labels": {"lockstep.dev/job-uid": "j"},
        },
        "status": {
            "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}],
            "containerStatuses": [
                {
                    "name": "trainer",
                    "allocatedResourcesStatus": [
                        {
                            "name": "nvidia.com/gpu",
                            "resources": [
                                {"resourceID": "GPU-0", "health": "Healthy"},
                                {"resourceID": "GPU-1", "health": "Unhealthy"},
                                {"resourceID": "GPU-2", "health": "Unknown"},
                            ],
                        }
                    ],
                }
            ],
        },
    }
    _, pod = trim_pod(manifest)
    assert pod.deleted_at == pod.created + 60
    assert (pod.disruption, pod.bad_device) == ("PreemptionByScheduler", "GPU-1")
