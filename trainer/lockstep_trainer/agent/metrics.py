"""The agent's metrics, in OpenMetrics names with units.

They are read from the cores when Prometheus asks, so nothing is kept twice. Training and ledger metrics come from the
leader alone: one series a job, whichever pod leads. Imported at the first scrape.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from lockstep_trainer.protocol.reports import trained

if TYPE_CHECKING:
    from lockstep_trainer.agent.agent import Agent
    from lockstep_trainer.protocol.corruption import Replays
    from lockstep_trainer.protocol.leader import Leader

NAMES = {
    "lockstep_agent_running_workers": "Worker processes of this pod that are alive.",
    "lockstep_agent_starts_total": "Starts of this pod's agent in this boot.",
    "lockstep_agent_container_starts_total": "Starts of this pod's container in this boot.",
    "lockstep_agent_leader_connected": "1 while this pod has a stream to its leader.",
    "lockstep_agent_certificate_expiry_timestamp_seconds": "Unix time at which this agent's certificate ends.",
    "lockstep_agent_certificate_remaining_ratio": "Share of its validity that this agent's certificate has left; it is "
    "renewed before half of it is gone.",
    "lockstep_epoch": "Number of the current membership.",
    "lockstep_generation": "Number of the running generation in its epoch.",
    "lockstep_members_connected": "Members that have a stream to the leader.",
    "lockstep_step": "Newest optimizer step.",
    "lockstep_steps": "Optimizer steps in all.",
    "lockstep_loss_nats": "Mean training loss of the newest step, per token.",
    "lockstep_eval_loss_nats": "Loss on held-out files, per token.",
    "lockstep_grad_norm": "Gradient norm of the newest step, before clipping.",
    "lockstep_learning_rate": "Learning rate of the newest step.",
    "lockstep_step_seconds": "Wall time of the newest step.",
    "lockstep_section_seconds": "Time of the newest step by section, mean over ranks.",
    "lockstep_tokens": "Tokens trained on up to the newest step, recomputed ones left out.",
    "lockstep_tokens_per_second": "Throughput over the last steps.",
    "lockstep_mfu_ratio": "Model FLOPs utilisation of the newest step.",
    "lockstep_device_memory_bytes": "Device memory in use at most in the newest step, the largest over ranks.",
    "lockstep_goodput_ratio": "Productive share of the members' GPU time in this epoch.",
    "lockstep_ledger_gpu_seconds": "The members' GPU time in this epoch, by class.",
    "lockstep_checkpoint_step": "Step of the newest durable checkpoint.",
    "lockstep_checkpoint_age_seconds": "Time since the newest durable checkpoint was committed.",
    "lockstep_checkpoint_degraded": "1 while checkpoints can't be made durable.",
    "lockstep_snapshots_total": "Snapshots that this pod's workers have staged, seen by this agent.",
    "lockstep_snapshots_left_out_total": "Snapshots of this generation for which there was no free buffer.",
    "lockstep_snapshot_blocked_seconds": "Time that training stood still for the newest snapshot.",
    "lockstep_snapshot_copy_seconds": "Time that the newest snapshot's copy took beside training.",
    "lockstep_snapshot_staged_step": "Step of the newest snapshot of this pod.",
    "lockstep_snapshot_kept_step": "Step of the snapshot that all pods keep.",
    "lockstep_upload_seconds_total": "Time that this agent's finished uploads took.",
    "lockstep_upload_bytes_total": "Bytes that this agent brought to the store.",
    "lockstep_slow_rank_ratio": "How much longer what is slow takes than it should, 0.3 for 30 %, of each rank that is "
    "named as slow at the moment; rank is empty where the finding is of the whole job.",
    "lockstep_corrupt_rank_confidence_ratio": "Share of its computations that were wrong when it was last looked "
    "at, of each rank that is suspected of wrong numbers at the moment; 0 where nobody can say who is wrong.",
    "lockstep_corruption_verdicts_total": "Steps on which ranks of a node were accused of wrong numbers, by kind of "
    "verdict and node.",
    "lockstep_outliers_total": "Times that loss, gradientNorm or updateSize began to be far above what it lately was.",
    "lockstep_replayed_steps_total": "Steps that were computed twice and compared.",
    "lockstep_rejected_steps_total": "Computations of steps that were dropped since ranks disagreed.",
    "lockstep_faults_total": "Faults that this leader has judged, by cause and rung.",
}
"""Every metric of the agent and its help text; the reference is made from this."""

LABELS = {
    "lockstep_section_seconds": ("section",),
    "lockstep_ledger_gpu_seconds": ("class",),
    "lockstep_slow_rank_ratio": ("cause", "rank", "node"),
    "lockstep_corrupt_rank_confidence_ratio": ("kind", "rank", "node"),
    "lockstep_corruption_verdicts_total": ("kind", "node"),
    "lockstep_outliers_total": ("signal",),
    "lockstep_faults_total": ("cause", "rung"),
}
"""Labels beyond those of the job, ``namespace`` and ``job_name``."""

OF_PODS = ("lockstep_agent_", "lockstep_snapshot", "lockstep_upload_")
"""What the names of metrics begin with that every agent has, not only the leader's, with the label ``pod``."""


def render(agent: Agent, accept: str) -> tuple[bytes, str]:
    """The metrics in the format that ``accept`` asks for, and its content type."""
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry()
    registry.register(_Collector(agent))
    return encode(registry), content_type


class _Collector:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        agent, member = self._agent, self._agent.node.member
        base = {"namespace": agent.job.namespace, "job_name": agent.job.name, "pod": agent.settings.pod}
        yield _gauge("lockstep_agent_running_workers", base, len(member.workers.live))
        yield _counter("lockstep_agent_starts_total", base, member.me.agent_starts)
        yield _counter("lockstep_agent_container_starts_total", base, member.me.container_starts)
        yield _gauge("lockstep_agent_leader_connected", base, member.connected)
        if valid := agent.trust.valid:
            left = valid.share_left(time.time())
            yield _gauge("lockstep_agent_certificate_expiry_timestamp_seconds", base, valid.until)
            yield _gauge("lockstep_agent_certificate_remaining_ratio", base, left)
        yield from _of_snapshots(agent, base)
        leader = agent.node.leader
        if leader and not leader.superseded:
            job = {"namespace": agent.job.namespace, "job_name": agent.job.name}
            yield from _of_leader(leader, job, agent.clock())


def _of_snapshots(agent: Agent, base: dict[str, str]) -> Iterator[Metric]:
    snapshots, uploads = agent.snapshots, agent.uploads
    yield _counter("lockstep_snapshots_total", base, snapshots.taken)
    yield _counter("lockstep_upload_seconds_total", base, uploads.seconds)
    yield _counter("lockstep_upload_bytes_total", base, uploads.bytes)
    if newest := snapshots.newest:
        yield _counter("lockstep_snapshots_left_out_total", base, newest.left_out)
        yield _gauge("lockstep_snapshot_blocked_seconds", base, newest.blocked)
        yield _gauge("lockstep_snapshot_copy_seconds", base, newest.copied)
        yield _gauge("lockstep_snapshot_staged_step", base, newest.state.step)
    if kept := snapshots.kept:
        yield _gauge("lockstep_snapshot_kept_step", base, kept.step)


def _of_leader(leader: Leader, job: dict[str, str], now: float) -> Iterator[Metric]:
    yield _gauge("lockstep_epoch", job, leader.epoch)
    yield _gauge("lockstep_generation", job, leader.generation)
    yield _gauge("lockstep_members_connected", job, sum(peer.connected for peer in leader.roster.members.values()))
    if leader.plan.steps is not None:
        yield _gauge("lockstep_steps", job, leader.plan.steps)
    reports, durability = leader.reports, leader.durability
    if step := reports.newest:
        yield _gauge("lockstep_step", job, step.step)
        yield _gauge("lockstep_loss_nats", job, step.loss)
        yield _gauge("lockstep_grad_norm", job, step.grad_norm)
        yield _gauge("lockstep_learning_rate", job, step.lr)
        yield _gauge("lockstep_step_seconds", job, step.seconds)
        yield _gauge("lockstep_tokens", job, trained(step))
        yield _by_label("lockstep_section_seconds", job, step.sections)
        if step.mfu is not None:
            yield _gauge("lockstep_mfu_ratio", job, step.mfu)
        if step.memory:
            yield _gauge("lockstep_device_memory_bytes", job, step.memory)
    if reports.tokens_per_second is not None:
        yield _gauge("lockstep_tokens_per_second", job, reports.tokens_per_second)
    if reports.eval_loss is not None:
        yield _gauge("lockstep_eval_loss_nats", job, reports.eval_loss)
    if (goodput := leader.ledger.goodput()) is not None:
        yield _gauge("lockstep_goodput_ratio", job, goodput)
    yield _by_label("lockstep_ledger_gpu_seconds", job, leader.ledger.totals())
    if durability.durable and durability.durable_at is not None:
        yield _gauge("lockstep_checkpoint_step", job, durability.durable.state.step)
        yield _gauge("lockstep_checkpoint_age_seconds", job, max(0.0, now - durability.durable_at))
    yield _gauge("lockstep_checkpoint_degraded", job, leader.keeping.problem(leader) is not None)
    name = "lockstep_slow_rank_ratio"
    slow = GaugeMetricFamily(name, NAMES[name], labels=[*job, *LABELS[name]])
    for verdict in (one for one in reports.slow if one.ended is None):
        for rank in verdict.ranks or ("",):
            node = verdict.nodes[0] if len(verdict.nodes) == 1 else ""
            slow.add_metric([*job.values(), verdict.cause, str(rank), node], verdict.slowdown)
    yield slow
    yield from _of_replays(reports.replays, job)
    name = "lockstep_outliers_total"
    outliers = CounterMetricFamily("lockstep_outliers", NAMES[name], labels=[*job, *LABELS[name]])
    for signal, count in reports.outliers.counts:
        outliers.add_metric([*job.values(), signal], count)
    yield outliers
    name = "lockstep_faults_total"
    faults = CounterMetricFamily("lockstep_faults", NAMES[name], labels=[*job, *LABELS[name]])
    for (cause, rung), count in reports.fault_counts().items():
        faults.add_metric([*job.values(), cause, rung], count)
    yield faults


def _of_replays(replays: Replays, job: dict[str, str]) -> Iterator[Metric]:
    yield _counter("lockstep_replayed_steps_total", job, replays.compared)
    yield _counter("lockstep_rejected_steps_total", job, replays.rejected)
    name = "lockstep_corrupt_rank_confidence_ratio"
    corrupt = GaugeMetricFamily(name, NAMES[name], labels=[*job, *LABELS[name]])
    for verdict in (one for one in replays.verdicts if one.ended is None):
        node = verdict.nodes[0] if len(verdict.nodes) == 1 else ""
        for rank in verdict.ranks:
            corrupt.add_metric([*job.values(), verdict.kind, str(rank), node], verdict.confidence)
    yield corrupt
    name = "lockstep_corruption_verdicts_total"
    accused = CounterMetricFamily(name.removesuffix("_total"), NAMES[name], labels=[*job, *LABELS[name]])
    for kind, node, count in replays.accused:
        accused.add_metric([*job.values(), kind, node], count)
    yield accused


def _gauge(name: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, NAMES[name], labels=list(labels))
    family.add_metric(list(labels.values()), float(value))
    return family


def _counter(name: str, labels: dict[str, str], value: float) -> Metric:
    family = CounterMetricFamily(name.removesuffix("_total"), NAMES[name], labels=list(labels))
    family.add_metric(list(labels.values()), float(value))
    return family


def _by_label(name: str, labels: dict[str, str], values: dict[str, float]) -> Metric:
    family = GaugeMetricFamily(name, NAMES[name], labels=[*labels, *LABELS[name]])
    for value, number in values.items():
        family.add_metric([*labels.values(), value], number)
    return family
