"""One run goes through every fault that a single machine can have, and ends as if nothing had happened.

The faults are done to one job one after another, since starting a job costs more than mending it; each test waits
until its own fault is mended. The last one compares the whole run with a run in which nothing broke.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable

import pytest

from integration.run import small
from localrun import LocalRun, victims
from lockstep_api.v1alpha1 import Phase, TrainingJobStatus

pytestmark = [pytest.mark.run, pytest.mark.timeout(180)]

_RANDOM = random.Random(20)


def mended_after(run: LocalRun, do: Callable[[], object]) -> tuple[TrainingJobStatus, TrainingJobStatus]:
    """Does something at a random instant; (status before, status once new steps are done after it)."""
    start = run.status.progress.step
    before = run.until_step(start + _RANDOM.randint(1, 6))
    do()
    after = run.until(
        lambda status: status.restarts.total > before.restarts.total and status.phase == Phase.RUNNING,
        60, "recovery",
    )  # fmt: skip
    run.until_step(max(after.progress.step, before.progress.step) + 2)
    return before, run.status


@pytest.mark.parametrize("section", ["load", "forward", "backward", "collective", "optimizer", "stage"])
def test_a_worker_killed_in(section: str, journey: LocalRun) -> None:
    pods = set(journey.supervisors())
    agents = {journey.part("lockstep_trainer.agent", pod) for pod in range(2)}
    rank = _RANDOM.randrange(2)
    workers = processes(journey)
    before, after = mended_after(
        journey, lambda: victims.kill_in_section(journey.state, section, rank=rank, seconds=30)
    )
    assert after.restarts.process == before.restarts.process + 1
    fault = after.faults[-1]
    assert (fault.cause, fault.rung, fault.rank, fault.exit_code) == ("WorkerExited", "process", rank, -9)
    # Survivors keep what they have: the other worker's process, the same pods, the same agents.
    assert {at for at, pid in processes(journey).items() if pid == workers[at]} == {1 - rank}
    assert set(journey.supervisors()) == pods
    assert {journey.part("lockstep_trainer.agent", pod) for pod in range(2)} == agents


def test_a_worker_killed_while_it_recovers(journey: LocalRun) -> None:
    def twice() -> None:
        term = max(victim.term for victim in victims.workers(journey.state))
        victims.kill_in_section(journey.state, "forward", rank=0, seconds=30)
        victims.kill_in_section(journey.state, "restore", rank=1, seconds=30, after_term=term)

    before, after = mended_after(journey, twice)
    journey.until(lambda s: s.restarts.process >= before.restarts.process + 2, 30, "the second fault")
    assert after.epoch == before.epoch


def test_the_rendezvous_store_killed(journey: LocalRun) -> None:
    before = journey.until_step(journey.status.progress.step + 2)
    workers = processes(journey)
    os.kill(journey.store_server(), signal.SIGKILL)
    after = journey.until(
        lambda status: status.restarts.in_process > before.restarts.in_process, 30, "a restart in the same processes"
    )
    journey.until_step(after.progress.step + 15)
    fault = after.faults[-1]
    assert (fault.cause, fault.rung) == ("StoreLost", "inProcess")
    assert processes(journey) == workers


@pytest.mark.parametrize("pod", [0, 1])
def test_an_agent_killed_costs_no_step(pod: int, journey: LocalRun) -> None:
    before = journey.until_step(journey.status.progress.step + 2)
    workers = {victim.pid for victim in victims.workers(journey.state)}
    os.kill(journey.part("lockstep_trainer.agent", pod), signal.SIGKILL)
    journey.until_step(before.progress.step + 25)
    # The workers were adopted by the next agent: nothing was started again.
    assert {victim.pid for victim in victims.workers(journey.state)} == workers


def test_a_zygote_killed_costs_no_step(journey: LocalRun) -> None:
    before = journey.until_step(journey.status.progress.step + 2)
    os.kill(journey.part("lockstep_trainer.zygote", 1), signal.SIGKILL)
    after = journey.until_step(before.progress.step + 15)
    assert after.restarts.total == before.restarts.total


@pytest.mark.parametrize("slot", [1, 0], ids=["member", "leader"])
def test_a_pod_killed_is_replaced(slot: int, journey: LocalRun) -> None:
    names = dict(journey.status.slots)
    pid = _supervisor_of(journey, names[str(slot)])
    survivors = set(journey.supervisors()) - {pid}
    before, after = mended_after(journey, lambda: os.kill(pid, signal.SIGKILL))
    assert after.restarts.pod == before.restarts.pod + 1
    assert after.epoch > before.epoch
    assert after.slots[str(slot)] != names[str(slot)]
    assert survivors <= set(journey.supervisors())


def test_the_run_ends_as_if_nothing_had_happened(journey: LocalRun, reference: list[float]) -> None:
    result = journey.finish(240)
    assert result.code == 0, result.errors
    verdict = journey.check(small.STEPS)
    assert verdict.exact, verdict
    assert verdict.recomputed > 0
    assert journey.losses() == reference  # bitwise
    assert result.status.goodput is not None


def processes(run: LocalRun) -> dict[int, int]:
    """Rank → pid of its newest worker."""
    return {victim.rank: victim.pid for victim in victims.workers(run.state)}


def _supervisor_of(run: LocalRun, pod: str) -> int:
    """Pid of a pod's supervisor: the one that has the pod's name in its environment."""
    wanted = f"LOCKSTEP_POD_NAME={pod}".encode()
    for pid in run.supervisors():
        with open(f"/proc/{pid}/environ", "rb") as environ:
            if wanted in environ.read().split(b"\0"):
                return pid
    raise AssertionError(f"no supervisor of pod {pod}")
