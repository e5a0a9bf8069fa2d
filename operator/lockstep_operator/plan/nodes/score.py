"""The lemon score of a node: the weights of its faults, each halved once a week.

Meta's clusters find lemon nodes by thresholds on signals per node over 28 days, the number of jobs that avoid a node
among them; taking those nodes out cut the failures of jobs with 512 GPUs and more from 14 to 4 % (arXiv:2410.21680,
§IV). The same clusters count 2.3 and 6.5 failures per 1,000 node-days.

By chance alone a node at 6.5 collects 0.07 of score on average (0.0065 a day x 7 days / ln 2), and three faults within
ten days happen to one node in 24,000. So three lost nodes within about ten days (a score of 2) are no chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from lockstep_operator.plan.nodes.records import NodeFault, NodeRecord, Records

HALF_LIFE = 7 * 86_400.0
"""Seconds after which a fault counts half. Four of them are the 28 days of arXiv:2410.21680."""
HORIZON = 4 * HALF_LIFE
"""Older faults are forgotten: what is left of them is a sixteenth."""
THRESHOLD = 2.0
"""A node with this score is excluded."""
RELEASE = 1.0
"""And used again below this one: one half-life later, if nothing else happens."""
SOFT_LIMIT = 1.0
"""What one job's soft faults may add: a job's own error looks like a node's as long as it is the only witness.
Meta's signal is the number of distinct jobs too (``excl_jobid_count``)."""
OUTAGE_NODES = 3
"""So many nodes within OUTAGE_SECONDS have lost something that they share: a switch, a power feed, the API server, a
driver update. At 13 faults a day (2,000 nodes) three by chance within two minutes come once in 400 days."""
OUTAGE_SECONDS = 120.0
"""The node controller calls nodes NotReady 40 to 55 s after they fell silent: one outage is spread over so long."""


def score(faults: Iterable[NodeFault], now: float) -> float:
    """The score that these faults give now; those of an outage must have been left out."""
    hard = 0.0
    soft: dict[str, float] = defaultdict(float)
    for fault in faults:
        value = fault.weight * 0.5 ** (max(0.0, now - fault.at) / HALF_LIFE)
        if fault.hard:
            hard += value
        else:
            soft[fault.job] += value
    return hard + sum(min(value, SOFT_LIMIT) for value in soft.values())


def counted(records: Records, now: float) -> Mapping[str, tuple[NodeFault, ...]]:
    """Node → the faults that count: within the horizon, not forgiven, and no part of an outage. A verdict that names
    the node (weight of a whole exclusion) counts whatever happens elsewhere."""
    times = sorted((fault.at, name) for name, record in records.items() for fault in _valid(record, now))
    shared = _outages(times)
    return {
        name: tuple(
            fault for fault in _valid(record, now) if fault.weight >= THRESHOLD or (fault.at, name) not in shared
        )
        for name, record in records.items()
    }


def scores(records: Records, now: float) -> dict[str, float]:
    """Node → score."""
    return {name: score(faults, now) for name, faults in counted(records, now).items()}


def _valid(record: NodeRecord, now: float) -> list[NodeFault]:
    return [
        fault
        for fault in record.faults
        if now - fault.at < HORIZON and (record.forgiven is None or fault.at > record.forgiven)
    ]


def _outages(times: list[tuple[float, str]]) -> set[tuple[float, str]]:
    """Of these (time, node), sorted by time, those within OUTAGE_SECONDS of which OUTAGE_NODES nodes have one."""
    shared: set[tuple[float, str]] = set()
    start = 0
    for end, (at, _) in enumerate(times):
        while at - times[start][0] > OUTAGE_SECONDS:
            start += 1
        window = times[start : end + 1]
        if len({name for _, name in window}) >= OUTAGE_NODES:
            shared.update(window)
    return shared
