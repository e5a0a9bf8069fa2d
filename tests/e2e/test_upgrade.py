"""``helm upgrade`` from the version before this one, under a running job: training never notices.

The job is made by the old operator and its pods run the old trainer; it ends under the new operator.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from awaited import eventually
from demonstration import faults, install
from demonstration.target import Target
from e2e.jobs import BUCKET, NAMESPACE, RunningJob
from e2e.previous import NoPrevious, Previous, previous
from lockstep_api.v1alpha1 import TrainingJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STEPS = 800  # more than are taken meanwhile on a fast machine
TWO: dict[str, str | int] = {"replicas": 2}  # one takes over from the other


@pytest.fixture(scope="module")
def before(prepared: Target, tmp_path_factory: pytest.TempPathFactory) -> Previous:
    """The version before this one, ready to be installed."""
    install.prepare_namespace(prepared, NAMESPACE, BUCKET)
    try:
        return previous(prepared, tmp_path_factory.mktemp("before"))
    except NoPrevious as reason:
        pytest.skip(str(reason))


@pytest.fixture
def job(before: Previous, request: pytest.FixtureRequest) -> Iterator[RunningJob]:
    """A job of the old version, training."""
    before.install(TWO)
    name = request.node.name.replace("_", "-").removeprefix("test-")
    with RunningJob.training(before.target, name[:30].rstrip("-"), STEPS, every=20) as running:
        running.until_step(5, 240)
        yield running


def old_and_new(target: Target, old: set[str]) -> tuple[list[str], list[str]]:
    """Names of the operators' pods that are of the old version, and of the new one."""
    names = [pod["metadata"]["name"] for pod in install.operator_pods(target)]
    return [name for name in names if name in old], [name for name in names if name not in old]


def uids(job: RunningJob) -> list[str]:
    """The job's pods, by slot."""
    return [pod["metadata"]["uid"] for pod in job.pods()]


def untouched(job: RunningJob, before: TrainingJob, pods: list[str]) -> TrainingJob:
    """The job some steps later, which has lost neither a step nor a pod nor begun anew."""
    at = job.job.status.progress.step
    after = job.until_step(at + 20)
    assert after.status.phase == "Running", "the job ended meanwhile: it needs more steps"
    assert after.status.epoch == before.status.epoch
    assert after.status.restarts.total == before.status.restarts.total
    assert uids(job) == pods
    return after


def test_an_upgrade_costs_a_job_nothing(job: RunningJob, before: Previous, prepared: Target) -> None:
    old = {pod["metadata"]["name"] for pod in install.operator_pods(prepared)}
    began, pods = job.job, uids(job)
    install.helm_install(prepared, TWO)
    eventually(lambda: not old_and_new(prepared, old)[0], "the old operators to go", 30)
    _, new = old_and_new(prepared, old)
    eventually(lambda: install.lease_holder(prepared).partition("_")[0] in new, "a new operator to hold the Lease", 30)
    upgraded = untouched(job, began, pods)
    faults.kill_worker(prepared, NAMESPACE, job.pod_names()[1])
    mended = job.mended(upgraded)
    assert mended.status.faults[-1].rung == "process"
    assert uids(job) == pods
    job.until_phase("Succeeded", 300)
    verdict = job.check(STEPS)
    assert verdict.exact, verdict


@pytest.mark.slow
def test_an_operator_killed_in_the_middle_of_an_upgrade(job: RunningJob, before: Previous, prepared: Target) -> None:
    """Nobody gives the Lease back: the new operators wait until it runs out. What was begun goes on to its end."""
    old = {pod["metadata"]["name"] for pod in install.operator_pods(prepared)}
    began, pods = job.job, uids(job)
    command = prepared.command("helm", *install.helm_words(prepared, TWO))
    helm = subprocess.Popen(command, env=prepared.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: all(old_and_new(prepared, old)), "operators of both versions side by side", 60)
        killed = faults.kill_operator(prepared)
        told, _ = helm.communicate(timeout=150)
    finally:
        helm.kill()
    assert helm.returncode == 0, told.decode()
    eventually(lambda: not old_and_new(prepared, old)[0], "the old operators to go", 30)
    _, new = old_and_new(prepared, old)
    eventually(lambda: install.lease_holder(prepared).partition("_")[0] in new, "a new operator to hold the Lease", 60)
    assert killed not in new
    upgraded = untouched(job, began, pods)
    # The operator's default image has changed with it; a job keeps the one that its pods have.
    job.kubectl("delete", "pod", job.pod_names()[1], "--wait=false")
    job.mended(upgraded)
    images = {pod["spec"]["containers"][0]["image"] for pod in job.pods()}
    assert images == {before.target.trainer_image}
    job.until_phase("Succeeded", 300)
    verdict = job.check(STEPS)
    assert verdict.exact, verdict
