"""On which nodes the job's full preflight checks need not be repeated."""

from __future__ import annotations

from lockstep_api.v1alpha1 import Preflight, TrainingJob, TrainingJobStatus
from lockstep_operator.plan.nodes.blame import weigh
from lockstep_operator.plan.observed import Observed
from lockstep_operator.plan.slots import usable
from lockstep_operator.plan.times import unix


def follow(job: TrainingJob, status: TrainingJobStatus, observed: Observed) -> TrainingJobStatus:
    """Status with the nodes on which a pod of this job has passed: an agent that answers has. A fault that speaks
    against a node takes it out again, until a pod that was made after the fault has passed there."""
    if job.spec.resilience.preflight is not Preflight.FULL:
        return status
    suspected: dict[str, float] = {}
    for fault in status.faults:
        if fault.node and weigh(fault):
            suspected[fault.node] = max(unix(fault.at), suspected.get(fault.node, 0.0))
    passed = {
        pod.node
        for pod in observed.pods
        if pod.node and usable(pod, observed.agents) and pod.created > suspected.get(pod.node, 0.0)
    }
    nodes = sorted(passed | (set(status.checked_nodes) - suspected.keys()))
    return status if nodes == status.checked_nodes else status.model_copy(update={"checked_nodes": nodes})
