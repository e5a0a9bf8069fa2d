"""The operator's decisions, top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from itertools import islice
from typing import get_args

from lockstep_api import constants
from lockstep_api.messages import FaultAck, FromOperator, Stop
from lockstep_api.v1alpha1 import Phase, TrainingJob, TrainingJobStatus
from lockstep_operator.plan import (
    departures,
    faults,
    images,
    ledger,
    lifecycle,
    losses,
    pool,
    requeue,
    resize,
    slots,
    story,
    swap,
    width,
)
from lockstep_operator.plan import status as status_rules
from lockstep_operator.plan.actions import ChildKind, DeletePod, Event, LabelPod, NewPod, Plan, Target
from lockstep_operator.plan.nodes import checked, jobwide
from lockstep_operator.plan.observed import Observed, Pod

PROBED_MEMBERS = 4
"""How many members are asked whether they hear a leader that the operator does not hear."""
PROBE_SECONDS = 0.25


def plan(job: TrainingJob, observed: Observed, now: float) -> Plan:
    """What is to be done for ``job`` at ``now`` (Unix seconds). A pure function: the same input, the same plan; after
    its effects, the same question gets an empty plan."""
    if job.spec.managed_by != constants.MANAGED_BY:
        return Plan(status=job.status)
    if job.status.phase and job.status.phase.terminal:
        return lifecycle.after_end(job, observed, now)

    # What has happened.
    status = lifecycle.begin(job, now)
    leader = _leader_target(status, observed)
    observed = _without_old_progress(status, observed)
    leads = _leads(status, leader, observed)
    if leads:
        status = status_rules.follow(status, job, observed, now)
        status = faults.refill(status)
    status = faults.fold_reports(status, observed)
    status = jobwide.locate(faults.confirm(status, observed, now))
    heard = observed.leader.progress if leads and status.slot_map_hash and observed.leader else None
    status = ledger.fold(status, observed.pods, job.spec.gpus_per_node, heard.ledger if heard else None, now)

    # Whether the job goes on.
    if saving := lifecycle.last_checkpoint(job, status, observed, leads, now):
        return replace(saving, leader=leader)
    if ending := lifecycle.ending(job, status, observed, leads, now):
        return lifecycle.finish(job, status, observed, ending, now)
    if job.spec.suspend:
        return replace(lifecycle.suspend(job, status, observed, leads, now), leader=leader)
    if waiting := requeue.waiting(job, status, observed, now):
        return waiting

    # Who is lost, and who takes the place.
    leaving = departures.departures(job, status, observed, now)
    moving, heirs = departures.moving(status, leaving), departures.heirs(status, observed, leaving, now)
    lost = losses.lost(job, status, observed, leaving, heirs=heirs >= len(moving), now=now)
    events = [story.loss_event(loss) for loss in lost]
    if lost:
        if any(loss.slot is not None for loss in lost):
            # What the leader has not reported when its epoch breaks went into noticing that it broke.
            status = ledger.close_epoch(status, ledger.DETECTING if status.phase == Phase.RUNNING else None)
        said = observed.leader.progress if observed.leader else None
        status = faults.record(
            status,
            lost,
            generation=said.term.generation if said else 0,
            spares_ready=len(_spares(status, observed, lost)),
            detect=max(0.0, now - said.newest.at) if said and said.newest else 0.0,
            now=now,
        )
    status, said_of_nodes = jobwide.exclude(job, status, now)
    events += said_of_nodes
    if lost:
        status = faults.charge_unfit(job.status, status, lost)
        if ending := lifecycle.overspent(job, status):
            return lifecycle.finish(job, status, observed, ending, now)
    status = checked.follow(job, status, observed)
    status, said_of_names = pool.pass_over(job, status, observed)
    events += said_of_names
    pods = pool.current(observed.pods, status.incarnations)
    # On how many nodes it goes on.
    have = width.supply(job, status, pods, observed, leaving=leaving.keys(), now=now)
    status = width.follow(job, status, have, now)
    still = bool(departures.moving(status, leaving))
    size = resize.decide(job, status, have, observed, leads=leads, moving=still, now=now)
    if size.requeue:
        return requeue.begin(job, status, observed, now)
    change = _new_epoch(job, status, pods, observed, nodes=size.nodes, leads=leads, leaving=set(leaving), now=now)
    fence = None
    if change:
        status = ledger.close_epoch(status)
        fence = slots.membership(
            job.uid,
            change.epoch,
            change.slots,
            pods={pod.name: pod for pod in pods.values()},
            agents=observed.agents,
            cause=change.cause,
        )
        status = resize.resized(job, status, len(change.slots)).model_copy(
            update={
                "epoch": change.epoch,
                "slots": {str(slot): name for slot, name in sorted(change.slots.items())},
                "slot_map_hash": slots.slot_map_hash(fence),
            }
        )
        events.append(Event("Normal", "MembershipChanged", f"Epoch {change.epoch}: {change.cause}"))
        leads = False
        leader = _leader_target(status, observed)

    # What the status says about it.
    live = sorted(pods.values(), key=lambda pod: pod.ordinal)
    status = status.model_copy(update={"phase": status_rules.phase(status, job, live, leads, observed)})
    members = status_rules.members(status, live, leads, observed)
    status = status.model_copy(update={"members": members, "ready": f"{members.ready}/{job.spec.nodes}"})
    status = status_rules.conditions(status, job, live, observed, leads=leads, now=now)
    events += status_rules.checkpoint_events(job.status, status)
    events += story.fault_events(job.status, status)
    events += story.verdict_events(job.status, status)
    events += story.injection_events(job.status, status)
    moving = departures.moving(status, leaving)
    status = swap.follow(status, job, observed, leaving=leaving.keys(), ready=heirs >= len(moving), now=now)
    events += swap.events(job.status, status)
    status = images.follow(status, job, pods, now)
    events += images.events(job.status, status)

    # What follows from the status.
    create, delete = _pods(job, status, observed, leaving, now)
    probe = _probes(job, status, pods, observed, leads=leads, moving=bool(moving), now=now)
    patience = losses.patient_until(status) if observed.leader and observed.leader.replace else now
    times = [
        patience if patience > now else None,
        lifecycle.deadline(job, status, now),
        lifecycle.startup_deadline(job, status),
        width.next_look(job, status, now),
        observed.refusal.retry_at if observed.refusal and observed.refusal.retry_at > now else None,
        *(time for pod in observed.pods if (time := losses.force_at(job, pod)) is not None and time > now),
        *(time for pod in observed.pods if pod.refused and (time := losses.refused_until(pod)) > now),
        *(time for pod in live if losses.loops_for_slot(pod, status) and (time := losses.looping_until(pod)) > now),
    ]
    if probe or (observed.leader and not observed.leader.connected):
        times.append(now + PROBE_SECONDS)
    kinds: tuple[ChildKind, ...] = get_args(ChildKind)
    trains, pace = _trains(leads, observed), heard.newest.seconds if heard and heard.newest else 0.0
    return Plan(
        status=status,
        children=tuple(kind for kind in kinds if kind not in observed.children),
        create=create,
        delete=delete,
        label=_labels(status, pods),
        leader=leader,
        fence=fence,
        send=(
            *_messages(job, status, leader, observed, None if change else size.stop),
            *(departures.ask(job, status, moving, step_seconds=pace) if trains and heirs >= len(moving) else ()),
        ),
        probe=probe,
        events=tuple(events),
        again_at=min((time for time in times if time is not None), default=None),
    )


# ---------------------------------------------------------------------------------------------- membership


@dataclass(frozen=True, slots=True)
class _Change:
    epoch: int
    slots: Mapping[int, str]
    cause: str


def _new_epoch(
    job: TrainingJob,
    status: TrainingJobStatus,
    pods: Mapping[int, Pod],
    observed: Observed,
    *,
    nodes: int | None,
    leads: bool,
    leaving: Set[str],
    now: float,
) -> _Change | None:
    """The next membership, of so many slots, if one is needed and every slot can be filled. ``nodes`` None: the job
    waits for pods."""
    usable = [pod for pod in pods.values() if slots.usable(pod, observed.agents)]
    holders = {int(slot): name for slot, name in status.slots.items()}
    if nodes is None:
        return None
    candidates = [pod for pod in usable if width.may_take(pod, status, observed, now)]
    assigned = slots.assign(nodes, holders, slots.preferred(candidates, observed.agents, leaving))
    known = {pod.name for pod in usable}
    if assigned is None or not known.issuperset(assigned.values()):
        return None
    taken = {slot: name for slot, name in assigned.items() if holders.get(slot) != name}
    before = width.current(job, status)
    cause: str | None
    if status.epoch and nodes != before:
        cause = resize.cause(job, before, nodes)
    elif not taken:
        cause = _why_again(job, status, assigned, {pod.name: pod for pod in usable}, observed, leads=leads)
    elif not holders and status.epoch == 0:
        cause = "first members"
    else:
        cause = ", ".join(f"slot {slot} goes to {name}" for slot, name in sorted(taken.items())[:8])
    if cause is None:
        return None
    seen = [agent.inventory.term.epoch for agent in observed.agents.values() if agent.inventory]
    return _Change(max([status.epoch, *seen]) + 1, assigned, cause)


def _why_again(
    job: TrainingJob,
    status: TrainingJobStatus,
    assigned: Mapping[int, str],
    pods: Mapping[str, Pod],
    observed: Observed,
    *,
    leads: bool,
) -> str | None:
    """Why the same pods need a new epoch, if they do."""
    leader = observed.leader
    if leader and leader.epoch_request and leader.epoch_request.epoch == status.epoch:
        return leader.epoch_request.cause
    if (
        leader
        and leader.finished
        and leader.finished.outcome == "stopped"
        and leader.finished.term.epoch == status.epoch
    ):
        return "the job is resumed"
    same = slots.membership(job.uid, status.epoch, assigned, pods=pods, agents=observed.agents, cause="")
    if slots.slot_map_hash(same) != status.slot_map_hash:
        return "a member came back as another"  # rebooted: its memory is empty, its address may be new
    fenced_here = observed.fenced is not None and observed.fenced.epoch == status.epoch
    if leader and leader.connected and leader.inventory and not leads and not fenced_here:
        # Only the process that wrote an epoch may send it: another one can't know what was already sent.
        return "another operator took over"
    return None


def _leader_target(status: TrainingJobStatus, observed: Observed) -> Target | None:
    name = status.slots.get("0")
    pod = next((pod for pod in observed.pods if pod.name == name), None)
    return _target(pod) if pod and pod.address and not pod.ended else None


def _leads(status: TrainingJobStatus, target: Target | None, observed: Observed) -> bool:
    """Whether the agent of slot 0 leads the current epoch."""
    leader = observed.leader
    return leader is not None and target is not None and leader.pod_uid == target.uid and leader.epoch == status.epoch


def _trains(leads: bool, observed: Observed) -> bool:
    """Whether there is something to stop: a job that saves its last step is over in a moment."""
    heard = observed.leader.progress if leads and observed.leader else None
    return heard is not None and heard.state == "running"


def _without_old_progress(status: TrainingJobStatus, observed: Observed) -> Observed:
    """What a leader said about an older epoch, which it may have led too, is no news."""
    leader = observed.leader
    if leader is None or leader.progress is None or leader.progress.term.epoch >= status.epoch:
        return observed
    return replace(observed, leader=replace(leader, progress=None))


def _messages(
    job: TrainingJob, status: TrainingJobStatus, target: Target | None, observed: Observed, stop: Stop | None
) -> tuple[FromOperator, ...]:
    leader, fenced = observed.leader, observed.fenced
    if leader is None or target is None or leader.pod_uid != target.uid or not leader.connected:
        return ()
    messages: list[FromOperator] = []
    if fenced and fenced.epoch == status.epoch and leader.inventory and not _leads(status, target, observed):
        messages.append(fenced)
    written = faults.cursor(job.status)  # as it stands in the API, not as this plan would have it
    if any(report.term <= written for report in leader.faults):
        messages.append(FaultAck(job.uid, written, len(_spares(status, observed, []))))
    if stop:
        messages.append(stop)
    return tuple(messages)


def _probes(
    job: TrainingJob,
    status: TrainingJobStatus,
    pods: Mapping[int, Pod],
    observed: Observed,
    *,
    leads: bool,
    moving: bool,
    now: float,
) -> tuple[Target, ...]:
    """Agents to ask who they are. Members are left in peace while nothing is to be changed, so that an operator that
    starts beside a healthy run of thousands of pods opens one connection; while the leader is silent, a few are asked
    whether they hear it."""
    leader = observed.leader
    members = set(status.slots.values())
    heard = leader is not None and leader.connected and leader.inventory is not None
    settled = len(members) == width.current(job, status) and (leads or not heard)
    if leader and (leader.epoch_request or leader.finished):
        settled = False
    vacant = moving or len(members) < job.spec.nodes
    unknown = [
        pod
        for pod in pods.values()
        if pod.address
        and pod.running
        and not pod.deleting
        and (
            (not slots.usable(pod, observed.agents) and not (settled and pod.name in members))
            or (vacant and pod.name not in members and not slots.fresh(pod, observed.agents, now))
        )
    ]
    witnesses: list[Pod] = []
    if leader and not leader.connected:
        others = (pod for pod in pods.values() if pod.name in members and pod.address and pod.uid != leader.pod_uid)
        witnesses = list(islice(others, PROBED_MEMBERS))
    return tuple(_target(pod) for pod in {pod.uid: pod for pod in (*unknown, *witnesses)}.values())


def _target(pod: Pod) -> Target:
    return Target(pod.name, pod.uid, pod.address, pod.restarts, pod.tls)


# ---------------------------------------------------------------------------------------------------- pods


def _pods(
    job: TrainingJob,
    status: TrainingJobStatus,
    observed: Observed,
    leaving: Mapping[str, departures.Departure],
    now: float,
) -> tuple[tuple[NewPod, ...], tuple[DeletePod, ...]]:
    """Besides the job's own pods there are as many more as members will leave, less the spares."""
    pods = pool.current(observed.pods, status.incarnations)
    members = set(status.slots.values())
    extra = max(0, len(departures.moving(status, leaving)) - job.spec.spares)
    wanted = pool.wanted_ordinals(
        job.spec.nodes + job.spec.spares + extra, [pod.ordinal for pod in pods.values() if pod.name in members], pods
    )
    left = {pod.node for pod in pods.values() if pod.name in leaving and pod.node}
    avoid, exclude = jobwide.avoided(status, observed, now), tuple(sorted({*jobwide.excluded(status, observed), *left}))
    known = tuple(status.checked_nodes)
    tls = pool.speaks_tls(job, observed.pods, otherwise=observed.tls)
    image = pool.image(pods)
    missing = [
        NewPod(pool.pod_name(job.name, ordinal, incarnation), ordinal, incarnation, avoid, exclude, known, tls, image)
        for ordinal in sorted(wanted - set(pods))
        for incarnation in [pool.incarnation_of(status.incarnations, ordinal)]
    ]
    held_back = observed.refusal is not None and now < observed.refusal.retry_at
    create = tuple(pod for pod in missing if pod.name not in observed.creating) if not held_back else ()

    given_up = [pod for pod in observed.pods if pods.get(pod.ordinal) is not pod]
    surplus = [pod for ordinal, pod in pods.items() if ordinal not in wanted]
    if held_back and status.epoch == 0 and observed.refusal and not observed.refusal.passing:
        # Nothing half-made is left: pods that wait for others that may not come hold GPUs for nothing.
        surplus = list(pods.values())
    delete = tuple(
        DeletePod(pod.name, pod.uid, losses.may_force(job, pod, observed, now), reason)
        for group, reason in ((given_up, "Another pod takes its place"), (surplus, "It is not needed"))
        for pod in group
        if not pod.deleting or losses.may_force(job, pod, observed, now)
    )
    return create, delete


def _labels(status: TrainingJobStatus, pods: Mapping[int, Pod]) -> tuple[LabelPod, ...]:
    slot_of = {name: int(slot) for slot, name in status.slots.items()}
    changes = []
    for pod in pods.values():
        slot = slot_of.get(pod.name)
        role = "member" if slot is not None else "spare" if status.epoch and pod.running else "starting"
        epoch = None if slot is None else pod.epoch if pod.slot == slot and pod.epoch is not None else status.epoch
        if (slot, epoch, role) != (pod.slot, pod.epoch, pod.role) and not pod.deleting:
            changes.append(LabelPod(pod.name, pod.uid, role, slot, epoch))
    return tuple(changes)


def _spares(status: TrainingJobStatus, observed: Observed, lost: list[losses.Loss]) -> list[Pod]:
    taken = {*status.slots.values(), *(loss.pod for loss in lost)}
    return [
        pod
        for pod in pool.current(observed.pods, status.incarnations).values()
        if pod.name not in taken and slots.usable(pod, observed.agents)
    ]
