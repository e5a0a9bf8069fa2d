"""What counts against a node, when it is excluded, and when the operator stops to believe that it is the nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockstep_api.v1alpha1 import Fault, TrainingJobStatus
from lockstep_operator.plan.nodes.blame import KEPT_FAULTS, remember, weigh
from lockstep_operator.plan.nodes.exclusion import (
    Limits,
    allowance,
    clear,
    decide,
    exclude,
    excluded,
    release_at,
)
from lockstep_operator.plan.nodes.records import NodeFault, NodeRecord, Records
from lockstep_operator.plan.nodes.score import HALF_LIFE, HORIZON, score, scores
from lockstep_operator.plan.times import rfc3339
from unit.operator.builders import START, make_job

DAY = 86_400.0
NOW = START
LIMITS = Limits()


def lost(at: float, job: str = "a", weight: float = 1.0, hard: bool = True, cause: str = "NodeLost") -> NodeFault:
    return NodeFault(at, job, f"{job}-0-0", cause, weight, hard)


def lemon(at: float = NOW) -> NodeRecord:
    """Three power cuts within an hour."""
    return NodeRecord(tuple(lost(at - 1800 * n) for n in (2, 1, 0)))


def lemons(count: int, at: float = NOW) -> dict[str, NodeRecord]:
    """So many of them, none of whose faults were together."""
    return {f"n{number}": lemon(at - 300 * number) for number in range(count)}


def told(*faults: dict[str, Any], uid: str = "job") -> Any:
    status = TrainingJobStatus(faults=[Fault(**{"rung": "pod", "pod": "p", **one}) for one in faults])
    job = make_job(status=status)
    return job.model_copy(update={"metadata": {**job.metadata, "uid": uid}})


# ------------------------------------------------------------------------------------------------ score


def test_a_fault_counts_half_after_a_week_and_nothing_after_four() -> None:
    faults = (lost(NOW),)
    assert score(faults, NOW) == 1.0
    assert score(faults, NOW + HALF_LIFE) == pytest.approx(0.5)
    assert score(faults, NOW + 3 * HALF_LIFE) == pytest.approx(0.125)
    assert scores({"n": NodeRecord(faults)}, NOW + HORIZON) == {"n": 0.0}


def test_one_jobs_word_alone_condemns_no_node() -> None:
    """A program's own error looks like its node's for as long as that program is the only witness."""
    own = tuple(lost(NOW - n, "a", 0.5, hard=False, cause="Hang") for n in range(8))
    assert score(own, NOW) == 1.0
    assert score((*own, lost(NOW, "b", 0.5, hard=False), lost(NOW, "c", 0.5, hard=False)), NOW) == 2.0


@pytest.mark.parametrize(
    ("times", "counts"),
    [
        ((0, 60, 119), False),  # three nodes within two minutes
        ((0, 60, 120), False),
        ((0, 60, 121), True),
        ((0, 60), True),  # two may be chance
    ],
)
def test_many_nodes_at_once_are_an_outage_and_no_nodes_fault(times: tuple[float, ...], counts: bool) -> None:
    records = {f"n{number}": NodeRecord((lost(NOW + at),)) for number, at in enumerate(times)}
    assert all((value > 0) is counts for value in scores(records, NOW + 200).values())


def test_an_outage_takes_back_what_its_first_nodes_were_blamed_for() -> None:
    before: Records = {"n0": NodeRecord((lost(NOW),)), "n1": NodeRecord((lost(NOW + 5),))}
    assert scores(before, NOW + 10)["n0"] > 0
    assert scores({**before, "n2": NodeRecord((lost(NOW + 20),))}, NOW + 30)["n0"] == 0


def test_an_outage_hides_no_other_fault_of_its_nodes_and_no_verdict() -> None:
    records = {f"n{number}": NodeRecord((lost(NOW - DAY), lost(NOW))) for number in range(1)}
    records |= {f"m{number}": NodeRecord((lost(NOW),)) for number in range(3)}
    records["v"] = NodeRecord((lost(NOW, weight=2.0, cause="Corruption"),))
    values = scores(records, NOW)
    assert values["n0"] == pytest.approx(0.5 ** (1 / 7))
    assert values["m0"] == 0
    assert values["v"] == 2.0


# ------------------------------------------------------------------------------------------------ blame


@pytest.mark.parametrize(
    ("fault", "weight"),
    [
        ({"cause": "NodeLost"}, (1.0, True)),
        ({"cause": "GpuUnhealthy"}, (1.5, True)),
        ({"cause": "Corruption", "blame": "Named"}, (2.0, True)),
        ({"cause": "PreflightFailed"}, (1.0, False)),  # the word of a user's container
        ({"cause": "Hang"}, (0.5, False)),
        ({"cause": "MemberLost"}, (0.25, False)),
        ({"cause": "WorkerExited", "exit_code": -9}, None),  # killed, for memory most often
        ({"cause": "WorkerExited", "exit_code": 1, "message": "IndexError"}, None),
        ({"cause": "WorkerExited", "blame": "Suspected"}, (0.5, False)),
        ({"cause": "WorkerExited", "blame": "Named"}, (1.0, False)),
        ({"cause": "ContainerRestarted"}, None),
        ({"cause": "PodDeleted"}, None),
        ({"cause": "PodFailed"}, None),
        ({"cause": "NodeDrained"}, None),
        ({"cause": "NodeLeaving"}, None),
        ({"cause": "AgentLost"}, None),
        ({"cause": "StoreLost"}, None),
    ],
)
def test_what_speaks_against_a_node(fault: dict[str, Any], weight: tuple[float, bool] | None) -> None:
    made = Fault(at=rfc3339(NOW), rung="pod", node="n", pod="p", **fault)
    assert weigh(made) == weight
    assert weigh(made.model_copy(update={"node": None})) is None


def test_telling_the_same_again_changes_nothing() -> None:
    """Every start of the operator tells all jobs' faults again."""
    job = told({"at": rfc3339(NOW), "cause": "NodeLost", "node": "n"})
    once = remember({}, [job], NOW)
    assert remember(once, [job, job], NOW + 60) is once
    assert len(once["n"].faults) == 1


def test_a_fault_that_turns_out_to_be_worse_counts_once_and_as_that() -> None:
    records = remember({}, [told({"at": rfc3339(NOW), "cause": "MemberLost", "node": "n"})], NOW)
    records = remember(records, [told({"at": rfc3339(NOW), "cause": "NodeLost", "node": "n"})], NOW + 50)
    assert [(fault.cause, fault.weight) for fault in records["n"].faults] == [("NodeLost", 1.0)]
    late = told(
        {"at": rfc3339(NOW), "cause": "MemberLost", "node": "n"}
    )  # the leader's own word, behind the operator's
    assert remember(records, [late], NOW + 60) is records


def test_a_record_stays_small() -> None:
    faults = [{"at": rfc3339(NOW + n), "cause": "Hang", "node": "n", "pod": f"p{n}"} for n in range(40)]
    records = remember({}, [told(*faults)], NOW + 40)
    assert len(records["n"].faults) == KEPT_FAULTS
    assert records["n"].faults[-1].at == NOW + 39
    assert remember(records, [told(*faults)], NOW + 40) is records


# ------------------------------------------------------------------------------------- exclusion, breaker


def test_a_lemon_is_excluded_once_and_used_again_when_its_score_has_decayed() -> None:
    records: Records = {"n": lemon()}
    first = decide(records, nodes=100, now=NOW, limits=LIMITS)
    assert excluded(first.records, NOW) == ("n",)
    assert [change.kind for change in first.changes] == ["NodeExcluded"]
    assert "score 3.0 of 2" in first.changes[0].message
    again = decide(first.records, nodes=100, now=NOW + DAY, limits=LIMITS)
    assert again.records is first.records
    assert again.changes == ()

    over = release_at(first.records["n"].faults, NOW)
    assert over == pytest.approx(NOW + HALF_LIFE * 1.585, abs=3600)  # three halves to one: log2(3) half-lives
    before = decide(first.records, nodes=100, now=over - 7200, limits=LIMITS)
    assert excluded(before.records, over - 7200) == ("n",)
    after = decide(first.records, nodes=100, now=over + 60, limits=LIMITS)
    assert excluded(after.records, over + 60) == ()
    assert [change.kind for change in after.changes] == ["NodeReleased"]


def test_an_exclusion_does_not_flutter_around_the_threshold() -> None:
    decided = decide({"n": lemon()}, nodes=100, now=NOW, limits=LIMITS)
    later = decide(decided.records, nodes=100, now=NOW + HALF_LIFE, limits=LIMITS)
    assert scores(later.records, NOW + HALF_LIFE)["n"] < 2.0
    assert excluded(later.records, NOW + HALF_LIFE) == ("n",)


@pytest.mark.parametrize(
    ("ages", "per_hour", "left"),
    [
        ((), 4, 4),
        ((0, 10, 3599), 4, 1),
        ((0, 10, 3599, 3599.5), 4, 0),
        ((0, 10, 3600), 4, 2),  # an hour ago is not within the hour
        ((0, 0, 0, 0, 0), 4, 0),  # the limit was lowered
        ((), 0, 0),
    ],
)
def test_the_allowance_at_its_edges(ages: tuple[float, ...], per_hour: int, left: int) -> None:
    assert allowance((NOW - age for age in ages), NOW, per_hour) == left


def test_the_breaker_stops_at_its_number_and_takes_the_worst_first() -> None:
    records: dict[str, NodeRecord] = lemons(6)
    records["worst"] = NodeRecord(tuple(lost(NOW - 7000 - n * 600) for n in range(5)))
    decided = decide(records, nodes=1000, now=NOW, limits=LIMITS)
    out = excluded(decided.records, NOW)
    assert len(out) == 4
    assert "worst" in out
    assert len(decided.kept_in_use) == 3
    assert "4 in an hour (nodes.excludePerHour)" in decided.held

    soon = decide(decided.records, nodes=1000, now=NOW + 3599, limits=LIMITS)
    assert len(excluded(soon.records, NOW + 3599)) == 4
    assert soon.held
    later = decide(decided.records, nodes=1000, now=NOW + 3600, limits=LIMITS)
    assert len(excluded(later.records, NOW + 3600)) == 7
    assert not later.held


@pytest.mark.parametrize(("nodes", "most"), [(3, 1), (10, 1), (19, 1), (20, 2), (0, 4)])
def test_no_more_than_a_share_of_the_cluster_is_excluded(nodes: int, most: int) -> None:
    decided = decide(lemons(5), nodes=nodes, now=NOW, limits=LIMITS)
    assert len(excluded(decided.records, NOW)) == most
    if nodes:
        assert "nodes.excludeShare" in decided.held


def test_zero_switches_exclusion_off_and_says_so() -> None:
    decided = decide({"n": lemon()}, nodes=100, now=NOW, limits=Limits(per_hour=0))
    assert excluded(decided.records, NOW) == ()
    assert decided.held


def test_an_administrators_word_counts_for_itself() -> None:
    """Not against the breaker, without a score, and for as long as was said."""
    records: Records = {}
    for number in range(5):
        records = exclude(records, f"mine{number}", reason="cable", until=NOW + 100 if number else None, now=NOW)
    decided = decide({**records, "n": lemon()}, nodes=20, now=NOW, limits=LIMITS)
    assert len(excluded(decided.records, NOW)) == 6
    later = decide(decided.records, nodes=20, now=NOW + 100, limits=LIMITS)
    assert excluded(later.records, NOW + 100) == ("mine0", "n")
    assert {change.node for change in later.changes} == {f"mine{number}" for number in range(1, 5)}


def test_what_an_administrator_forgave_does_not_come_back_with_the_jobs_status() -> None:
    job = told({"at": rfc3339(NOW), "cause": "Corruption", "node": "n"})
    records = decide(remember({}, [job], NOW), nodes=100, now=NOW, limits=LIMITS).records
    assert excluded(records, NOW) == ("n",)
    cleared = clear(records, "n", NOW + 10)
    again = decide(remember(cleared, [job], NOW + 20), nodes=100, now=NOW + 20, limits=LIMITS)
    assert excluded(again.records, NOW + 20) == ()
    fresh = told({"at": rfc3339(NOW + 30), "cause": "Corruption", "node": "n"})
    blamed = decide(remember(again.records, [job, fresh], NOW + 30), nodes=100, now=NOW + 30, limits=LIMITS)
    assert excluded(blamed.records, NOW + 30) == ("n",)
    with pytest.raises(KeyError):
        clear(records, "unknown", NOW)


def test_what_is_old_is_forgotten() -> None:
    records: Records = {"n": NodeRecord((lost(NOW),)), "m": clear({"m": NodeRecord()}, "m", NOW)["m"]}
    assert decide(records, nodes=9, now=NOW + HORIZON - 1, limits=LIMITS).records is records
    assert decide(records, nodes=9, now=NOW + HORIZON, limits=LIMITS).records == {}


def test_an_outage_excludes_nobody() -> None:
    """A whole cluster goes dark three times in an hour: no node is to blame."""
    faults = tuple(lost(NOW - 1000 * n) for n in (2, 1, 0))
    records = {
        f"n{number}": NodeRecord(tuple(replace(one, at=one.at + number) for one in faults)) for number in range(50)
    }
    decided = decide(records, nodes=50, now=NOW + 60, limits=LIMITS)
    assert excluded(decided.records, NOW + 60) == ()
    assert not decided.held
