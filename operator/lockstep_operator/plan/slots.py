"""Who holds which slot. Survivors keep theirs: their memory and processes are bound to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Set

from lockstep_api.messages import Membership, SlotInfo
from lockstep_operator.plan.observed import Agent, Pod

FRESH_ANSWER = 5.0
"""Seconds for which an agent's answer proves that it is alive."""


def assign(nodes: int, holders: Mapping[int, str], candidates: Iterable[Pod]) -> dict[int, str] | None:
    """Slot → pod name for all of ``nodes`` slots, or None if candidates are too few. ``holders`` keep their slots;
    what is vacant goes to those that held one beyond ``nodes``, then to candidates, the first ones first."""
    kept = {slot: name for slot, name in holders.items() if slot < nodes}
    vacant = [slot for slot in range(nodes) if slot not in kept]
    free = [pod.name for pod in candidates if pod.name not in holders.values()]
    taking = [name for slot, name in sorted(holders.items()) if slot >= nodes] + free
    if len(taking) < len(vacant):
        return None
    return {**kept, **dict(zip(vacant, taking, strict=False))}


def usable(pod: Pod, agents: Mapping[str, Agent]) -> bool:
    """Whether the pod can hold a slot now: it runs, and its agent has said who it is."""
    agent = agents.get(pod.uid)
    known = agent is not None and agent.inventory is not None
    return known and pod.phase == "Running" and not pod.deleting and bool(pod.address)


def fresh(pod: Pod, agents: Mapping[str, Agent], now: float) -> bool:
    """Whether its agent answered a moment ago: what has been idle for hours may be dead for minutes."""
    agent = agents.get(pod.uid)
    return agent is not None and agent.answered is not None and now - agent.answered < FRESH_ANSWER


def warm(pod: Pod, agents: Mapping[str, Agent]) -> bool:
    """Whether its workers would start at once. What still imports is no reason to interrupt others."""
    agent = agents.get(pod.uid)
    return agent is not None and agent.inventory is not None and agent.inventory.warm


def preferred(candidates: Iterable[Pod], agents: Mapping[str, Agent], leaving: Set[str] = frozenset()) -> list[Pod]:
    """In the order in which they are to get slots: those that stay before those that must leave their node, the warm
    ones first, then by ordinal."""
    return sorted(candidates, key=lambda pod: (pod.name in leaving, not warm(pod, agents), pod.ordinal))


def slot_info(slot: int, pod: Pod, agents: Mapping[str, Agent]) -> SlotInfo:
    """The pod as a member. Its agent must be known."""
    inventory = agents[pod.uid].inventory
    assert inventory is not None, f"{pod.name} was given slot {slot} before its agent answered"
    return SlotInfo(
        slot=slot,
        pod=pod.name,
        pod_uid=pod.uid,
        boot_id=inventory.boot_id,
        address=pod.address,
        domain=pod.node,
        ordinal=pod.ordinal,
    )


def membership(
    job_uid: str,
    epoch: int,
    slots: Mapping[int, str],
    *,
    pods: Mapping[str, Pod],
    agents: Mapping[str, Agent],
    cause: str,
) -> Membership:
    """The message for these slots, spares included."""
    members = set(slots.values())
    spares = [pod for pod in pods.values() if pod.name not in members and usable(pod, agents)]
    return Membership(
        job_uid=job_uid,
        epoch=epoch,
        slots=tuple(slot_info(slot, pods[name], agents) for slot, name in sorted(slots.items())),
        spares=tuple(slot_info(-1, pod, agents) for pod in sorted(spares, key=lambda pod: pod.ordinal)),
        cause=cause,
    )


def slot_map_hash(message: Membership) -> str:
    """Names who is in which slot: pod, uid, boot and address. 16 hexadecimal digits."""
    entries = [(info.slot, info.pod, info.pod_uid, info.boot_id, info.address) for info in message.slots]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]
