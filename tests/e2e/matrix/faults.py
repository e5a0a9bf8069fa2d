"""The table: every fault, and what it may lead to."""

from __future__ import annotations

from dataclasses import dataclass

from e2e.matrix import strikes
from e2e.matrix.strikes import LEADER, MEMBER, Strike

_SILENCE = ("MemberLost", "LeaderLost", "NodeLost", "PodLost")
"""Of a node: which of them depends on who sees it first; the node's condition follows."""
_CONTAINER = ("ContainerRestarted", "ContainerCrashLoop", *_SILENCE)
"""One that comes back later than a member is waited for is given up together with its pod."""
_PROCESS = frozenset({"inProcess", "process"})
_POD = frozenset({"pod"})
_HEIR = frozenset({"pod", "spare"})
"""Of a pod that still runs: its successor is made ready first, and takes the slot as a spare does."""
_ANY = frozenset({"inProcess", "process", "container", "pod", "spare"})
_INTERVALS = 30
"""Steps: what is staged and not yet kept is lost with it, at most two durable intervals and what ran meanwhile."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. Its causes and rungs are those that the job's status may name."""

    name: str
    strike: Strike
    causes: tuple[str, ...] = ()
    """One of these must be recorded; empty: the job must not be restarted at all."""
    rungs: frozenset[str] = _ANY
    """Rungs of the record with one of these causes."""
    restarts: int = 2
    """At most so many. One more than it takes: a machine that is short of time may add a fault of its own."""
    lost: int = _INTERVALS
    """Steps that may have to be computed again, at most."""
    everywhere: bool = False
    """Tried in the short job that runs with the other tests of the cluster; the rest have tests of their own there."""

    @property
    def silent(self) -> bool:
        """Whether the job must go on without a restart."""
        return not self.causes


FAULTS = {
    each.name: each
    for each in (
        Fault("worker_killed", strikes.kill_worker, ("WorkerExited",), rungs=_PROCESS),
        Fault("worker_exception", strikes.raise_in_worker, ("WorkerExited",), rungs=_PROCESS),
        Fault("out_of_memory", strikes.exhaust_memory, ("WorkerExited",), rungs=_PROCESS, everywhere=True),
        Fault("worker_stopped", strikes.stop_worker, ("Hang",), rungs=_PROCESS, everywhere=True),
        Fault("member_agent_killed", strikes.kill_agent(MEMBER)),
        Fault("leader_agent_killed", strikes.kill_agent(LEADER)),
        Fault("container_killed", strikes.kill_container(MEMBER), _CONTAINER,
               rungs=frozenset({"container", "pod"}), everywhere=True),
        Fault("member_pod_deleted", strikes.delete_pod(MEMBER), ("PodDeleted",), rungs=_POD),
        Fault("leader_pod_deleted", strikes.delete_pod(LEADER), ("PodDeleted",), rungs=_POD),
        Fault("member_node_cut", strikes.cut_power(MEMBER), _SILENCE, rungs=_POD),
        Fault("leader_node_cut", strikes.cut_power(LEADER), _SILENCE, rungs=_POD),
        Fault("member_partition", strikes.partition(MEMBER), _SILENCE, rungs=_POD, everywhere=True),
        Fault("leader_partition", strikes.partition(LEADER), _SILENCE, rungs=_POD, everywhere=True),
        Fault("operator_killed_in_recovery", strikes.kill_operator_in_a_recovery, ("PodDeleted", "PodLost"), rungs=_POD,
               everywhere=True),
        Fault("two_at_once", strikes.two_at_once, ("WorkerExited", "PodDeleted", *_CONTAINER),
               restarts=4, everywhere=True),
        Fault("killed_again_in_recovery", strikes.kill_worker_in_its_recovery, ("WorkerExited",), restarts=4,
               everywhere=True),
        Fault("store_away_worker", strikes.lose_store_while_a_worker_restarts, ("WorkerExited",), rungs=_PROCESS,
               everywhere=True),
        Fault("store_away_pod", strikes.lose_store_while_a_pod_is_replaced, ("PodDeleted",), rungs=_POD),
        Fault("api_server_restarted", strikes.restart_api_server, everywhere=True),
        Fault("gpu_unhealthy", strikes.fail_gpu, ("GpuUnhealthy",), rungs=_HEIR),
        Fault("drained", strikes.drain, ("NodeDrained",), rungs=_POD),
    )
}  # fmt: skip
