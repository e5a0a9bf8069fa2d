"""The operator's Prometheus metrics. A job's have the labels ``namespace`` and ``job_name``, as the agents' have: a
label called ``job`` would be renamed by Prometheus.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lockstep_api.v1alpha1 import Phase, TrainingJob
from lockstep_operator.plan import width
from lockstep_operator.plan.ledger import PRODUCTIVE
from lockstep_operator.plan.nodes.records import Records
from lockstep_operator.plan.nodes.score import scores
from lockstep_operator.plan.times import unix

_JOB = ["namespace", "job_name"]


class Remembered(Protocol):
    """The memory of nodes, as far as it is shown."""

    held: str

    @property
    def records(self) -> Records:
        """By node."""
        ...

    def excluded(self) -> frozenset[str]:
        """Nodes that new pods stay away from."""
        ...


class OperatorMetrics:
    """Everything that the operator exposes. ``jobs`` gives the jobs as they are known now."""

    def __init__(
        self, jobs: Callable[[], Iterable[TrainingJob]], watch_age: Callable[[], float], memory: Remembered
    ) -> None:
        self.registry = CollectorRegistry()
        self._reconcile = Histogram(
            "lockstep_operator_reconcile_seconds",
            "Time of one pass over a job: observe, plan, write the status, act",
            buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60),
            registry=self.registry,
        )
        self._errors = Counter(
            "lockstep_operator_reconcile_errors", "Passes that ended in an error", ["error"], registry=self.registry
        )
        watch = Gauge(
            "lockstep_operator_watch_age_seconds",
            "Time since the API server was last heard on the watch of pods",
            registry=self.registry,
        )
        watch.set_function(watch_age)
        self.leading = Gauge(
            "lockstep_operator_leading", "1 on the replica that holds the lease", registry=self.registry
        )
        self.registry.register(_JobCollector(jobs))
        self.registry.register(_NodeCollector(memory))

    def reconciled(self, job: TrainingJob, seconds: float, error: BaseException | None) -> None:
        """One pass has ended."""
        self._reconcile.observe(seconds)
        if error is not None:
            self._errors.labels(type(error).__name__).inc()


class _JobCollector(Collector):
    """Per-job values, read from the statuses when they are asked for: a job that is gone leaves none behind."""

    def __init__(self, jobs: Callable[[], Iterable[TrainingJob]]) -> None:
        self._jobs = jobs

    def collect(self) -> Iterable[Metric]:
        """Called at each scrape."""
        jobs = list(self._jobs())
        phases = GaugeMetricFamily("lockstep_operator_jobs", "TrainingJobs by phase", labels=["phase"])
        for phase in Phase:
            phases.add_metric([phase], sum(1 for job in jobs if job.status.phase == phase))
        yield phases
        for name, text, labels, values in _FAMILIES:
            family = GaugeMetricFamily(name, text, labels=[*_JOB, *labels])
            for job in jobs:
                for extra, value in values(job):
                    family.add_metric([job.namespace, job.name, *extra], value)
            yield family


class _NodeCollector(Collector):
    """What is remembered of nodes. Only nodes with faults have series: a few of thousands."""

    def __init__(self, memory: Remembered) -> None:
        self._memory = memory

    def collect(self) -> Iterable[Metric]:
        """Called at each scrape."""
        now, records = time.time(), self._memory.records
        score = GaugeMetricFamily(
            "lockstep_node_score", "Faults that speak against the node, each halved once a week", labels=["node"]
        )
        for node, value in scores(records, now).items():
            score.add_metric([node], value)
        yield score
        excluded = GaugeMetricFamily(
            "lockstep_node_excluded", "1 while new pods stay away from the node", labels=["node", "by"]
        )
        for node in self._memory.excluded():
            exclusion = records[node].exclusion
            excluded.add_metric([node, exclusion.by if exclusion else ""], 1)
        yield excluded
        held = GaugeMetricFamily(
            "lockstep_node_exclusion_held",
            "1 while the breaker keeps nodes in use that are over the threshold",
        )
        held.add_metric([], 1 if self._memory.held else 0)
        yield held


_Values = Callable[[TrainingJob], Iterable[tuple[list[str], float]]]


def _one(read: Callable[[TrainingJob], float | None]) -> _Values:
    def values(job: TrainingJob) -> Iterable[tuple[list[str], float]]:
        value = read(job)
        return [] if value is None else [([], value)]

    return values


def _checkpoint_time(job: TrainingJob) -> float | None:
    durable = job.status.checkpoint.durable
    return unix(durable.at) if durable else None


def _ledger(job: TrainingJob) -> Iterable[tuple[list[str], float]]:
    """A trainer that has made no step yet was productive for no time; of a script without steps that is not known."""
    classes = {PRODUCTIVE: 0.0, **job.status.ledger} if job.spec.trainer else job.status.ledger
    return [([name], value) for name, value in classes.items()]


_FAMILIES: tuple[tuple[str, str, list[str], _Values], ...] = (
    ("lockstep_job_nodes", "Nodes that the job wants", [], _one(lambda job: job.spec.nodes)),
    (
        "lockstep_job_nodes_training",
        "Nodes that the current membership has slots for: fewer than lockstep_job_nodes while the job is shrunk",
        [],
        _one(lambda job: width.current(job, job.status)),
    ),
    (
        "lockstep_job_gpus",
        "GPUs that the job trains on",
        [],
        _one(lambda job: width.current(job, job.status) * job.spec.gpus_per_node),
    ),
    ("lockstep_job_members_ready", "Members that are connected", [], _one(lambda job: job.status.members.ready)),
    ("lockstep_job_spares_ready", "Warm spares", [], _one(lambda job: job.status.members.spares)),
    ("lockstep_job_epoch", "Number of the current membership", [], _one(lambda job: job.status.epoch)),
    ("lockstep_job_step", "Optimizer steps done", [], _one(lambda job: job.status.progress.step)),
    (
        "lockstep_job_goodput_ratio",
        "Share of GPU time that was productive",
        [],
        _one(lambda job: job.status.goodput),
    ),
    (
        "lockstep_job_checkpoint_timestamp_seconds",
        "When the newest durable checkpoint was committed",
        [],
        _one(_checkpoint_time),
    ),
    (
        "lockstep_job_phase",
        "1 for the phase that the job is in",
        ["phase"],
        lambda job: [([job.status.phase], 1.0)] if job.status.phase else [],
    ),
    (
        "lockstep_job_restarts",
        "Restarts over the life of the job, by rung of the ladder",
        ["rung"],
        lambda job: [
            ([rung], float(count)) for rung, count in job.status.restarts.to_wire().items() if rung != "total"
        ],
    ),
    (
        "lockstep_job_ledger_gpu_seconds",
        "GPU time of the job by class; the classes sum to all time that pods were held",
        ["class"],
        _ledger,
    ),
)
