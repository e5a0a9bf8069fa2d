"""Pods of one job whose images differ, though their names are the same.

A tag that moves (``latest``, ``main``) names another image by the time a lost pod gets a successor. Ranks of different
builds may compute the same steps differently, or not understand each other and fail as long as there are budgets; none
of that looks like what it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.plan import pool
from lockstep_operator.plan.actions import Event
from lockstep_operator.plan.observed import Pod
from lockstep_operator.plan.status import end_condition, find_condition, set_condition

_NAMED = 4
"""Pods whose names a sentence has."""
_DIGITS = 12
"""Of a digest, as in ``docker images``."""


def follow(status: TrainingJobStatus, job: TrainingJob, pods: Mapping[int, Pod], now: float) -> TrainingJobStatus:
    """Status with the condition MixedImages, from when on images differ."""
    kind, groups = constants.CONDITION_MIXED_IMAGES, _by_image(pods)
    if len(groups) < 2:
        return end_condition(status, job, kind, reason="SameImage", message="All pods run the same image.", now=now)
    (image, odd), *others = sorted(groups.items(), key=lambda one: (len(one[1]), -one[1][0].ordinal))
    usual = ", ".join(f"{digest[:_DIGITS]} in {len(same)} more" for digest, same in others)
    message = (
        f"Pods run different images by the name of {odd[0].image}: {image[:_DIGITS]} in {_list(odd)}, {usual}. "
        "The name was given to another image while the job ran. Start a job that resumes from this one, with the image "
        "named by its digest; or suspend and resume this one, if its pods have imagePullPolicy: Always."
    )
    return set_condition(status, job, kind, "True", reason="ImageMoved", message=message, now=now)


def events(before: TrainingJobStatus, after: TrainingJobStatus) -> tuple[Event, ...]:
    """That images differ, once."""
    old, new = (find_condition(one, constants.CONDITION_MIXED_IMAGES) for one in (before, after))
    if new is None or new.status != "True" or (old and old.status == "True"):
        return ()
    return (Event("Warning", "MixedImages", new.message),)


def _by_image(pods: Mapping[int, Pod]) -> dict[str, list[Pod]]:
    """Digest → the pods that run it, where more than one of a form is known.

    A runtime says of an image that it has pulled which digest the registry has it under, and of one that was loaded
    from a file only its own: one image may have one of each, on two nodes, so that they can't be compared.
    """
    pulled: dict[str, list[Pod]] = defaultdict(list)
    loaded: dict[str, list[Pod]] = defaultdict(list)
    name = pool.image(pods)
    for _, pod in sorted(pods.items()):
        if pod.running and pod.image == name and pod.image_id:
            _, at, digest = pod.image_id.rpartition("@")
            (pulled if at else loaded)[digest.rpartition(":")[2]].append(pod)
    return pulled if len(pulled) > 1 else loaded


def _list(pods: list[Pod]) -> str:
    more = len(pods) - _NAMED
    return ", ".join(pod.name for pod in pods[:_NAMED]) + (f" and {more} more" if more > 0 else "")
