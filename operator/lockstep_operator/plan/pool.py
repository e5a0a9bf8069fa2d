"""Which pods a job should have: ``nodes + spares`` ordinals, each with one current incarnation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.plan.actions import Event
from lockstep_operator.plan.observed import Observed, Pod


def pod_name(job: str, ordinal: int, incarnation: int) -> str:
    """``<job>-<ordinal>-<incarnation>``: a replacement never waits for the name of a pod that hangs in Terminating."""
    return f"{job}-{ordinal}-{incarnation}"


def incarnation_of(incarnations: Mapping[str, int], ordinal: int) -> int:
    """The incarnation in use; status leaves zeros out."""
    return incarnations.get(str(ordinal), 0)


def current(pods: Iterable[Pod], incarnations: Mapping[str, int]) -> dict[int, Pod]:
    """Ordinal → its pod of the current incarnation, if there is one. Older ones were given up."""
    return {pod.ordinal: pod for pod in pods if pod.incarnation == incarnation_of(incarnations, pod.ordinal)}


def image(pods: Mapping[int, Pod]) -> str:
    """The image that most of these pods were made with; empty where there is none. A job keeps it over an upgrade of
    the operator whose own default is another one, since its pods could not train together."""
    names = Counter(pod.image for _, pod in sorted(pods.items()) if pod.image)
    return max(names, key=names.__getitem__, default="")


def wanted_ordinals(count: int, members: Iterable[int], existing: Iterable[int]) -> set[int]:
    """The ordinals that should have a pod: every member's, then existing ones, then new ones, lowest first, until
    there are ``count``. So a smaller ``spares`` takes the highest spare away and never a member."""
    wanted = set(members)
    for ordinal in sorted(set(existing) - wanted):
        if len(wanted) < count:
            wanted.add(ordinal)
    candidate = 0
    while len(wanted) < count:
        wanted.add(candidate)
        candidate += 1
    return wanted


def speaks_tls(job: TrainingJob, existing: Iterable[Pod], *, otherwise: bool) -> bool:
    """Whether a new pod's agent speaks TLS: as the job's other pods, since members call each other. So a job whose pods
    were made before an upgrade, or another setting, goes on as it began, until none of them is left."""
    spoken = [pod.tls for pod in existing]
    if spoken:
        return all(spoken)
    return otherwise and template_annotations(job).get(constants.ANNOTATION_TLS) != "off"


def template_annotations(job: TrainingJob) -> Mapping[str, Any]:
    """Those of the template. What is no mapping has none: it is refused when the first pod is made from it."""
    given = job.spec.template.metadata.get("annotations")
    return given if isinstance(given, Mapping) else {}


def bump(incarnations: Mapping[str, int], ordinals: Iterable[int]) -> dict[str, int]:
    """Incarnations after giving up the current pods of these ordinals."""
    return {
        **incarnations,
        **{str(ordinal): incarnation_of(incarnations, ordinal) + 1 for ordinal in ordinals},
    }


def pass_over(
    job: TrainingJob, status: TrainingJobStatus, observed: Observed
) -> tuple[TrainingJobStatus, tuple[Event, ...]]:
    """Past names that others have and keep: a pod of a deleted job of the same name, say, on a node that is dead."""
    ordinals = [
        ordinal
        for ordinal, incarnation in sorted(observed.taken)
        if incarnation == incarnation_of(status.incarnations, ordinal)
    ]
    if not ordinals:
        return status, ()
    before, after = status.incarnations, bump(status.incarnations, ordinals)
    old, new = (pod_name(job.name, ordinals[0], incarnation_of(names, ordinals[0])) for names in (before, after))
    others = f" So it is with {len(ordinals) - 1} others." if len(ordinals) > 1 else ""
    message = f"A pod {old} that was not made for this job stays; {new} takes its place.{others}"
    return status.model_copy(update={"incarnations": after}), (Event("Warning", "NameTaken", message),)
