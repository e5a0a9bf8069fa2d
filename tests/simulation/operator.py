"""The operator's half, as docs/design/membership.md asks for it: names members, vacates slots on two witnesses, raises
the epoch.

The real one is ``lockstep_operator.plan``; here it is as small as the rules allow, so that what the simulation finds is
a fault of agents or of the rules.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from lockstep_api.messages import (
    EpochRequest,
    FaultAck,
    FaultReport,
    Finished,
    Inventory,
    Membership,
    ReplaceRequest,
    SlotInfo,
    Stop,
)
from lockstep_trainer.protocol import events

if TYPE_CHECKING:
    from simulation.agent import Agent
    from simulation.pods import Pod
    from simulation.world import World

LOOP_SECONDS = (0.4, 1.2)
SHRINK_SECONDS = 3.0
GROW_SECONDS = 10.0
"""What the leader may take for a last checkpoint before more nodes train."""
AGREED_SILENCE, LEAST_SILENCE = 5.0, 2.0
LEADER_DEADLINE = 20.0


class Operator:
    """One operator process; a new one knows only what the API server keeps."""

    numbers = count(1)

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True
        self.sent: Membership | None = None  # the epoch that this process has raised
        self.leader: Agent | None = None  # that it has a stream to
        self.leader_lost_at = world.clockwork.now
        self.inventories: dict[str, tuple[float, Inventory]] = {}  # pod uid → when, what
        self.wanted: set[int] = set()
        self.fresh_epoch = False
        self.stopping: Stop | None = None
        self.short_since: float | None = None  # since when a slot waits for a pod
        self.stopped: int | None = None  # the epoch whose leader has stopped, with a last checkpoint
        world.clockwork.after(world.clockwork.between(0.1, 1.0), self.loop)

    def die(self) -> None:
        """The process is gone."""
        self.alive = False
        if self.leader and self.leader.alive:
            self.leader.tell(events.OperatorClosed())

    def heard(self, agent: Agent, message: Any) -> None:
        """A message of the leader."""
        if not self.alive or agent is not self.leader:
            return
        epoch = self.world.status["epoch"]
        match message:
            case ReplaceRequest() if message.epoch == epoch:
                self.wanted |= set(message.slots)
            case Finished() if message.term.epoch == epoch and message.outcome == "stopped":
                self.stopped = epoch
            case EpochRequest() if message.epoch == epoch:
                self.fresh_epoch = True
            case FaultReport():
                ack = FaultAck(message.job_uid, message.term)
                self.world.network.send(
                    "operator", agent.pod.name, lambda: agent.tell(events.OperatorSaid(ack)) if agent.alive else None
                )

    def loop(self) -> None:
        """Observe, plan, act; forever."""
        if not self.alive:
            return
        self.world.clockwork.after(self.world.clockwork.between(*LOOP_SECONDS), self.loop)
        self._probe()
        self._keep_stream()
        self._plan()
        if self.stopping and self.leader:
            self._say_stop(replace(self.stopping, epoch=self.world.status["epoch"]))

    # ---------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        for pod in self.world.current_pods():
            agent = pod.agent
            if agent and agent.alive and self.world.network.reachable("operator", pod.name):
                now = self.world.clockwork.now
                self.inventories[pod.uid] = (now, agent.node.inventory(now))

    def _keep_stream(self) -> None:
        now, network = self.world.clockwork.now, self.world.network
        if self.leader and (not self.leader.alive or not network.reachable("operator", self.leader.pod.name)):
            if self.leader.alive:
                self.leader.tell(events.OperatorClosed())
            self.leader = None
            self.leader_lost_at = now
        first = self.world.status["slots"].get(0)
        pod = self.world.pods.get(first.pod) if first else None
        if self.leader and (pod is None or self.leader.pod is not pod):
            self.leader.tell(events.OperatorClosed())
            self.leader = None
            self.leader_lost_at = now
        if self.leader is None and pod and pod.agent and pod.agent.alive and network.reachable("operator", pod.name):
            self.leader = pod.agent
            self.leader.tell(events.OperatorConnected())
        epoch = self.world.status["epoch"]
        if self.sent and self.leader and self.sent.epoch == epoch != self.leader.node.inventory(now).leading:
            self._send(self.sent)

    def _say_stop(self, stop: Stop) -> None:
        assert self.leader is not None
        self.world.invariants.told_to_stop.add(stop.epoch)
        self.leader.tell(events.OperatorSaid(stop))

    def _send(self, membership: Membership) -> None:
        agent = self.leader
        if agent:
            self.world.network.send(
                "operator",
                agent.pod.name,
                lambda: agent.tell(events.OperatorSaid(membership)) if agent.alive else None,
            )

    def _plan(self) -> None:
        status, now = self.world.status, self.world.clockwork.now
        version, slots = status["version"], dict(status["slots"])
        for slot, info in list(slots.items()):
            pod = self.world.pods[info.pod]
            if self._lost(slot, pod):
                if pod.exists and self.world.network.reachable("operator", pod.name):
                    pod.delete()
                pod.exists = False
                del slots[slot]
                if self.world.pods[f"job-{pod.ordinal}-{self.world.incarnations[pod.ordinal]}"] is pod:
                    self.world.new_pod(pod.ordinal)
        held = {info.pod_uid for info in slots.values()}
        for pod in self.world.current_pods():
            if not pod.exists or (not pod.node_ready and pod.uid not in held):
                pod.exists = False
                self.world.new_pod(pod.ordinal)
        held = {info.pod_uid for info in slots.values()}
        ready = [pod for pod in self.world.current_pods() if pod.uid not in held and self._answers(pod, now)]
        nodes = self._width(slots, len(ready), now)
        moving = [slots.pop(slot) for slot in sorted(slots) if slot >= nodes]
        ready = [self.world.pods[info.pod] for info in moving] + ready
        for slot in range(nodes):
            if slot not in slots and ready:
                slots[slot] = self._info(slot, ready.pop(0))
        status["slots"] = slots
        if len(slots) < nodes:
            return
        status["nodes"], self.short_since = nodes, None
        current = {slot: self._info(slot, self.world.pods[info.pod]) for slot, info in slots.items()}
        mine = self.sent is not None and self.sent.epoch == status["epoch"] != self.stopped
        if mine and not self.fresh_epoch and current == {info.slot: info for info in self.sent.slots}:  # type: ignore[union-attr]
            return
        if any(self.inventories.get(info.pod_uid) is None for info in current.values()):
            return
        highest = max([status["epoch"], *(found.term.epoch for _, found in self.inventories.values())])
        if status["version"] != version:
            return  # 409: plan again
        status.update(epoch=highest + 1, slots=current, version=version + 1)
        self.sent = Membership("job-uid", highest + 1, tuple(current[slot] for slot in sorted(current)), cause="plan")
        self.wanted.clear()
        self.fresh_epoch = False
        self.leader_lost_at = now
        self._keep_stream()
        self._send(self.sent)

    def _width(self, slots: dict[int, SlotInfo], ready: int, now: float) -> int:
        """On how many nodes the job is to train. Fewer where a slot finds no pod for a while; more again where there
        are pods for them, once the leader has stopped with a last checkpoint."""
        nodes: int = self.world.status.get("nodes", self.world.plan.nodes)
        have = len(slots) + ready
        if len(slots) < nodes:
            self.short_since = now if self.short_since is None else self.short_since
            return have if self.world.status["epoch"] and 0 < have < nodes and self._waited(now) else nodes
        more = min(have, self.world.plan.nodes)
        if more == nodes or self.stopping:
            return nodes
        epoch = self.world.status["epoch"]
        if self.stopped == epoch:
            return more
        if self.leader:
            self._say_stop(Stop("job-uid", epoch, f"growing to {more} nodes", seconds=GROW_SECONDS))
        return nodes

    def _waited(self, now: float) -> bool:
        return self.short_since is not None and now - self.short_since > SHRINK_SECONDS

    def _lost(self, slot: int, pod: Pod) -> bool:
        now = self.world.clockwork.now
        if not pod.exists or slot in self.wanted:
            return True
        heard = self.inventories.get(pod.uid)
        if not pod.node_ready and (heard is None or now - heard[0] >= AGREED_SILENCE):
            return True  # the node's condition, and our own connection
        if slot != 0 or self.leader is not None:
            return False
        silence = now - self.leader_lost_at
        if silence >= LEADER_DEADLINE:
            return True
        others = [
            found.leader_silent
            for uid, (at, found) in self.inventories.items()
            if uid != pod.uid and now - at < AGREED_SILENCE and found.leader_silent is not None
        ]
        if not others or min(others) < AGREED_SILENCE:
            return False
        return silence >= max(LEAST_SILENCE, 2 * AGREED_SILENCE - min(others))

    def _answers(self, pod: Pod, now: float) -> bool:
        found = self.inventories.get(pod.uid)
        return pod.exists and found is not None and now - found[0] < 2.0

    def _info(self, slot: int, pod: Pod) -> SlotInfo:
        found = self.inventories.get(pod.uid)
        boot = found[1].boot_id if found else pod.boot_id
        return SlotInfo(slot, pod.name, pod.uid, boot, pod.address, f"node-{pod.name}", pod.ordinal)
