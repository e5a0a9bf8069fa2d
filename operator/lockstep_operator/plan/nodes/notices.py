"""What the taints and conditions of other systems mean for a job. Data with sources, since nobody keeps one list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

OUT_OF_SERVICE: frozenset[str] = frozenset(
    {
        # An administrator: it is shut down, its pods are dead.
        # https://kubernetes.io/docs/concepts/cluster-administration/node-shutdown/#non-graceful-node-shutdown
        "node.kubernetes.io/out-of-service",
        # The cloud's controller: the machine is shut down.
        # https://kubernetes.io/docs/reference/labels-annotations-taints/#node-cloudprovider-kubernetes-io-shutdown
        "node.cloudprovider.kubernetes.io/shutdown",
    }
)
"""Taints that say that nothing runs there any more."""

LEAVING: Mapping[str, str] = {
    # AWS node termination handler with taints enabled: notices of 2 minutes (spot) or days (maintenance).
    # https://github.com/aws/aws-node-termination-handler, pkg/node/node.go
    "aws-node-termination-handler/spot-itn": "spot interruption",
    "aws-node-termination-handler/scheduled-maintenance": "scheduled maintenance",
    "aws-node-termination-handler/asg-lifecycle-termination": "scaled down",
    # GKE: host maintenance, up to an hour ahead for GPUs, and preemption, 30 s ahead.
    # https://cloud.google.com/kubernetes-engine/docs/concepts/handle-disruption-gpu-tpu
    "cloud.google.com/impending-node-termination": "termination by Google Cloud",
    # Karpenter: spot interruption, drift, consolidation; the first since v1, the other before.
    # https://karpenter.sh/docs/concepts/disruption/
    "karpenter.sh/disrupted": "disrupted by Karpenter",
    "karpenter.sh/disruption": "disrupted by Karpenter",
    # https://github.com/kubernetes/autoscaler, cluster-autoscaler/utils/taints/taints.go. The one for mere candidates
    # (DeletionCandidateOfClusterAutoscaler) is none of these: it comes and goes.
    "ToBeDeletedByClusterAutoscaler": "scaled down by the cluster autoscaler",
}
"""Taint → what it announces: the node is about to be taken away, and running pods should go first. Not among them:
``aws-node-termination-handler/rebalance-recommendation``, which promises nothing, and ``kubernetes.azure.com/
scalesetpriority``, which every spot node has all its life."""

LEAVING_CONDITIONS: Mapping[str, str] = {
    # https://learn.microsoft.com/azure/aks/node-auto-repair#node-auto-drain: 30 s ahead of a spot eviction. Not among
    # them: VMEventScheduled, which covers freezes of a few seconds too.
    "PreemptScheduled": "spot eviction by Azure",
    "TerminateScheduled": "termination by Azure",
    "RedeployScheduled": "redeployment by Azure",
    "RebootScheduled": "reboot by Azure",
}
"""Condition that is True → what it announces."""

SICK_CONDITIONS: frozenset[str] = frozenset(
    {
        # node-problem-detector: https://github.com/kubernetes/node-problem-detector, config/kernel-monitor.json
        "KernelDeadlock",
        "ReadonlyFilesystem",
        # Its GPU checks on AKS: https://learn.microsoft.com/azure/aks/gpu-health-monitoring
        "GPUMissing",
        "XIDErrors",
        "NVLinkStatusInactive",
    }
)
"""Conditions of node-problem-detector by which a node is at fault while it is Ready. New pods stay away; a running one
is moved only when something else says so too, since it may not be touched by it."""
SICK_TAINTS: frozenset[str] = frozenset(
    {
        # SageMaker HyperPod puts it on while it checks or replaces a node.
        # https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-hyperpod-eks-resiliency-deep-health-checks.html
        "sagemaker.amazonaws.com/node-health-status",
    }
)


def leaving(taints: Iterable[str], conditions: Mapping[str, str]) -> str:
    """The first notice that the node is about to go, or ""."""
    for key in taints:
        if key in LEAVING:
            return f"{LEAVING[key]} (taint {key})"
    for kind, words in LEAVING_CONDITIONS.items():
        if conditions.get(kind) == "True":
            return f"{words} (condition {kind})"
    return ""


def sick(taints: Iterable[str], conditions: Mapping[str, str]) -> str:
    """The first sign that others found its hardware at fault, or ""."""
    found = [kind for kind in sorted(SICK_CONDITIONS) if conditions.get(kind) == "True"]
    found += [key for key in taints if key in SICK_TAINTS]
    return found[0] if found else ""
