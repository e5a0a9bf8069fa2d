"""Every fault of the matrix at instants of every phase, one after another in one long job for each layout.

What is protected: whatever breaks, the job trains again by the rung that the fault is worth, without looping; at its
end each sample was used once, and every step of every generation has bit for bit the loss of a job that nobody
disturbed.

CONTRIBUTING.md says how to run one fault, another seed, or every pair on every layout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from demonstration.target import Target
from e2e.matrix import judge
from e2e.matrix.campaign import Campaign
from e2e.matrix.deal import Case, deal, pairs, short
from e2e.matrix.faults import FAULTS, Fault
from e2e.matrix.moments import PHASES
from e2e.matrix.topologies import SHORT, TOPOLOGIES, Topology, install_code
from lockstep_api.constants import API_VERSION, KIND
from lockstep_api.v1alpha1 import TrainingJob

pytestmark = [pytest.mark.cluster]

SEED = int(os.environ.get("LOCKSTEP_MATRIX_SEED", "1"))
EVERYWHERE = os.environ.get("LOCKSTEP_MATRIX_PAIRS") == "all"
"""Each pair of fault and phase on each layout, rather than on one of them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of a class's layout."""
    if "case" in metafunc.fixturenames and issubclass(metafunc.cls, Matrix):
        mine = metafunc.cls.topology.name
        dealt = [*short(SEED, SHORT.name), *deal(SEED, list(TOPOLOGIES), everywhere=EVERYWHERE)]
        cases = [case for case in dealt if case.topology == mine]
        metafunc.parametrize("case", cases, ids=str)


class Matrix:
    """The tests of one layout. Its end is a test of its own: with ``-k`` ask for it, too."""

    topology: Topology

    @pytest.fixture(scope="class")
    @classmethod
    def campaign(cls, lockstep: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
        """The jobs of the layout."""
        install_code(lockstep)
        topology = cls.topology
        one = Campaign(lockstep, topology, SEED, tmp_path_factory.mktemp(f"matrix-{topology.name}"))
        yield one
        one.close()

    @pytest.mark.timeout(1800)
    def test_the_job_goes_on_after(self, campaign: Campaign, case: Case) -> None:
        campaign.play(case)

    @pytest.mark.timeout(1800)
    def test_its_jobs_end_as_if_nothing_had_been(self, campaign: Campaign) -> None:
        campaign.finish()
        assert campaign.finished > 0


class TestShort(Matrix):
    """The faults that no other test of the cluster does, once each."""

    topology = SHORT


@pytest.mark.slow
class TestDataParallel(Matrix):
    """Each rank has all of the work and a part of the data."""

    topology = TOPOLOGIES["dp2"]


@pytest.mark.slow
class TestPipeline(Matrix):
    """Half of the layers on each node."""

    topology = TOPOLOGIES["pp2"]


@pytest.mark.slow
class TestTensorParallel(Matrix):
    """Two ranks in each pod."""

    topology = TOPOLOGIES["tp2dp2"]


# --- the parts -------------------------------------------------------------------------------------------------------


def test_a_seed_names_its_cases() -> None:
    assert deal(1, ["a", "b"]) == deal(1, ["a", "b"])
    assert deal(1, ["a", "b"]) != deal(2, ["a", "b"])


def test_each_pair_comes_once_before_any_comes_twice() -> None:
    every = {(fault, phase) for fault in FAULTS for phase in PHASES}
    together = deal(3, list(TOPOLOGIES))
    assert sorted((case.fault, case.phase) for case in together) == sorted(every)
    apart = deal(3, list(TOPOLOGIES), everywhere=True)
    assert len({(case.topology, case.fault, case.phase) for case in apart}) == len(every) * len(TOPOLOGIES)
    assert pairs(3) != pairs(4)


def job(restarts: int = 0, **fault: Any) -> TrainingJob:
    """A running job; ``fault``: its newest record."""
    status: dict[str, Any] = {"phase": "Running", "restarts": {"total": restarts}}
    if fault:
        status["faults"] = [{"at": "2026-01-01T00:00:01Z", "epoch": 1, "generation": 2, **fault}]
    spec: dict[str, Any] = {"nodes": 1, "gpusPerNode": 1, "command": ["true"]}
    meta = {"name": "a", "namespace": "b"}
    return TrainingJob.model_validate(
        {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec, "status": status}
    )


KILLED, SILENT = FAULTS["worker_killed"], FAULTS["member_agent_killed"]
RECORD = {"cause": "WorkerExited", "rung": "process", "stepsLost": 4}


@pytest.mark.parametrize(
    ("fault", "after", "said"),
    [
        (KILLED, job(1, **RECORD), ""),
        (KILLED, job(9, **RECORD), "9 restarts instead of at most 2"),
        (KILLED, job(1, **{**RECORD, "cause": "Hang"}), "no fault of"),
        (KILLED, job(1, **{**RECORD, "rung": "pod"}), "was the rung"),
        (KILLED, job(1, **{**RECORD, "stepsLost": 500}), "500 steps were lost"),
        (SILENT, job(), ""),
        (SILENT, job(1, **RECORD), "1 restarts instead of at most 0"),
    ],
)
def test_what_a_fault_may_not_lead_to_is_said(fault: Fault, after: TrainingJob, said: str) -> None:
    found = judge.problems(job(), after, fault, PHASES["forward"])
    assert said in found[0] if said else not found, found


def test_it_has_not_recovered_before_the_record_says_what_it_cost() -> None:
    open_record = {name: value for name, value in RECORD.items() if name != "stepsLost"}
    assert not judge.recovered(job(), job(1, **open_record), KILLED)
    assert not judge.recovered(job(1, **RECORD), job(1, **RECORD), KILLED), "it is an earlier one's"
    assert judge.recovered(job(), job(1, **RECORD), KILLED)
