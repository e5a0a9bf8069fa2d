"""A tag is given to another image while a job runs whose pods have it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from awaited import eventually
from demonstration import install
from demonstration.target import REPOSITORY, Target
from e2e.jobs import POD_SPEC, RunningJob
from localcluster import images
from lockstep_api import constants
from lockstep_api.v1alpha1 import Condition, TrainingJob

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

TAG = "lockstep-trainer:moving"
STEPS = 100_000


def give(target: Target, build: int, folder: Path) -> None:
    """Give the tag to the trainer's image with that label, on all nodes. Layers are the same, digests are not."""
    dockerfile = folder / "Dockerfile"
    dockerfile.write_text((REPOSITORY / "images/trainer.Dockerfile").read_text() + f"\nLABEL build={build}\n")
    install.load_images(target, [images.build_image(dockerfile, TAG)])


@pytest.fixture
def job(lockstep: Target, tmp_path: Path) -> Iterator[RunningJob]:
    """A job whose template names the tag, and lets a node keep the image that it has."""
    give(lockstep, 1, tmp_path)
    pod: dict[str, Any] = deepcopy(POD_SPEC)
    pod["containers"][0] |= {"image": TAG, "imagePullPolicy": "IfNotPresent"}
    with RunningJob.training(lockstep, "images", STEPS, every=20, template={"spec": pod}) as running:
        running.until_step(5, 240)
        yield running


def mixed(job: TrainingJob) -> Condition | None:
    kind = constants.CONDITION_MIXED_IMAGES
    return next((one for one in job.status.conditions if one.type == kind and one.status == "True"), None)


def test_pods_of_two_builds_are_told_of(job: RunningJob, tmp_path: Path) -> None:
    """The job goes on: whether the builds understand each other is not known."""
    assert mixed(job.job) is None
    give(job.target, 2, tmp_path)
    before, lost = job.job, job.pod_names()[1]
    assert mixed(before) is None, "what runs still is of one build"
    job.kubectl("delete", "pod", lost, "--wait=false")
    told = job.until(lambda j: mixed(j) is not None, 240, "MixedImages")
    condition = mixed(told)
    assert condition is not None
    assert f"{job.name}-1-" in condition.message, "the pod that came last, and so the odd one"
    assert lost not in condition.message
    eventually(lambda: "MixedImages" in job.event_reasons(), "the event", 30)
    job.mended(before, 240)
