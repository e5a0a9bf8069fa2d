"""How each fault is done to a job, and how its cluster is put right again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from demonstration import faults
from e2e.jobs import NAMESPACE, RunningJob
from e2e.matrix import harmful
from e2e.matrix.grounds import Grounds, NothingThereError
from e2e.matrix.moments import Moment
from localcluster import Cluster
from lockstep_api.v1alpha1 import TrainingJob

PATIENCE = 240.0
"""Seconds that a recovery may take: a new pod imports torch, on whatever is left of this machine's cores."""


@dataclass
class Scene:
    """A job about to be struck. What puts its cluster right again is left on ``mending``."""

    job: RunningJob
    cluster: Cluster
    grounds: Grounds
    dice: random.Random
    before: TrainingJob
    moment: Moment
    mending: ExitStack
    say: Callable[[str], None]

    def pod(self, slot: int) -> dict[str, Any]:
        """The pod that holds a slot. Raises NothingThereError where a recovery has taken it away."""
        for pod in self.job.pods():
            if faults.slot_of(pod) == slot:
                return pod
        raise NothingThereError(f"no pod holds slot {slot}")

    def kill(self, pid: int, what: str) -> None:
        """SIGKILL."""
        self.say(f"SIGKILL to {what}, process {pid}")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            raise NothingThereError(f"{what} has gone by itself") from None

    def until_new_steps(self) -> None:
        """Waits until the job has restarted and made new steps."""
        self.job.mended(self.before, PATIENCE)


Strike = Callable[[Scene], None]

LEADER, MEMBER = 0, 1
"""Slots: the leader's, and another one."""


def uid(pod: dict[str, Any]) -> str:
    """A pod's."""
    return str(pod["metadata"]["uid"])


def node(pod: dict[str, Any]) -> int:
    """Number of the node that a pod is on."""
    name = pod["spec"].get("nodeName")
    if not name:
        raise NothingThereError(f"pod {pod['metadata']['name']} is on no node yet")
    return int(name.removeprefix("node"))


# --- processes -------------------------------------------------------------------------------------------------------


def kill_worker(scene: Scene) -> None:
    """The worker that stands still in the instant, else any."""
    worker = scene.moment.worker or scene.dice.choice(scene.grounds.workers() or [scene.grounds.worker()])
    scene.kill(worker.pid, f"the worker of rank {worker.rank}")
    scene.moment.keep()


def stop_worker(scene: Scene) -> None:
    """It stands still and never goes on by itself."""
    worker = scene.moment.worker or scene.dice.choice(scene.grounds.workers() or [scene.grounds.worker()])
    scene.say(f"SIGSTOP to the worker of rank {worker.rank}")
    os.kill(worker.pid, signal.SIGSTOP)
    scene.moment.keep()


def _order(scene: Scene, order: str) -> None:
    """Tells a loss to fail. The last ranks compute it in every layout."""
    scene.moment.let_go()
    pod = scene.job.pod_names()[-1]
    scene.say(f"{pod} is told: {order}")
    words = f"echo {order} > {harmful.ORDER}.new && mv {harmful.ORDER}.new {harmful.ORDER}"
    scene.job.target.exec(NAMESPACE, pod, ["sh", "-c", words])


def raise_in_worker(scene: Scene) -> None:
    """An exception in the user's code."""
    _order(scene, harmful.RAISE)


def exhaust_memory(scene: Scene) -> None:
    """A worker takes memory until the kernel ends it for the container's limit."""
    _order(scene, harmful.EAT)


def kill_agent(slot: int) -> Strike:
    """The agent of a slot's pod."""

    def strike(scene: Scene) -> None:
        scene.kill(scene.grounds.agent(uid(scene.pod(slot))), f"the agent of slot {slot}")

    return strike


def kill_container(slot: int) -> Strike:
    """The first process of a pod's container: the kubelet starts it again in place."""

    def strike(scene: Scene) -> None:
        scene.kill(scene.grounds.supervisor(uid(scene.pod(slot))), f"the container of slot {slot}")

    return strike


# --- pods and nodes --------------------------------------------------------------------------------------------------


def delete_pod(slot: int) -> Strike:
    """As somebody with kubectl does."""

    def strike(scene: Scene) -> None:
        name = scene.pod(slot)["metadata"]["name"]
        scene.say(f"pod {name} of slot {slot} is deleted")
        scene.job.kubectl("delete", "pod", name, "--wait=false")

    return strike


def cut_power(slot: int) -> Strike:
    """Of the node that a slot is on."""

    def strike(scene: Scene) -> None:
        number = node(scene.pod(slot))
        scene.say(f"node{number} of slot {slot} loses its power")
        scene.mending.callback(scene.cluster.power_on, number)
        scene.cluster.power_cut(number)

    return strike


def partition(slot: int) -> Strike:
    """The node that a slot is on is cut off, and goes on by itself."""

    def strike(scene: Scene) -> None:
        number = node(scene.pod(slot))
        scene.say(f"node{number} of slot {slot} is cut off")
        scene.mending.callback(scene.cluster.heal, number)
        scene.cluster.partition(number)

    return strike


def fail_gpu(scene: Scene) -> None:
    """The device plugin reports a GPU of a member as unhealthy."""
    scene.moment.let_go()
    pod = scene.pod(MEMBER)
    number = node(pod)
    devices = scene.job.target.exec(NAMESPACE, pod["metadata"]["name"], ["printenv", "NVIDIA_VISIBLE_DEVICES"])
    device = scene.dice.choice(devices.strip().split(","))
    scene.say(f"{device} of slot {MEMBER} becomes unhealthy")
    scene.mending.callback(scene.cluster.gpu_heal, number)
    scene.cluster.gpu_fail(number, device)


def drain(scene: Scene) -> None:
    """A member's node is drained."""
    scene.moment.let_go()
    name = f"node{node(scene.pod(MEMBER))}"
    scene.say(f"{name} of slot {MEMBER} is drained")
    scene.mending.enter_context(faults.drained(scene.job.target, name, scene.job.name))


# --- operator, API server, store -------------------------------------------------------------------------------------


def kill_operator_in_a_recovery(scene: Scene) -> None:
    """A member's pod is deleted, and the operator that is to replace it dies."""
    delete_pod(MEMBER)(scene)
    scene.say(f"SIGKILL to the operator that holds the lease, {faults.kill_operator(scene.job.target)}")


def restart_api_server(scene: Scene) -> None:
    """Killed and started again: all watches break."""
    scene.say("the API server is killed and started again")
    scene.moment.let_go()
    scene.cluster.apiserver_restart()
    scene.job.watch_again()


def lose_store_while_a_worker_restarts(scene: Scene) -> None:
    """The store is away until the job has made new steps: what it begins from is in memory."""
    _stop_store(scene)
    kill_worker(scene)
    scene.until_new_steps()


def lose_store_while_a_pod_is_replaced(scene: Scene) -> None:
    """The store is away until the job has made new steps: the new epoch begins from memory, and is tied to the chain
    when the store is back."""
    _stop_store(scene)
    delete_pod(scene.dice.choice((LEADER, MEMBER)))(scene)
    scene.until_new_steps()


def _stop_store(scene: Scene) -> None:
    scene.say("the store is stopped")
    scene.mending.callback(scene.cluster.s3_start)
    scene.cluster.s3_stop()


# --- more than one ---------------------------------------------------------------------------------------------------

_RESTARTING: tuple[Strike, ...] = (kill_worker, kill_container(MEMBER), delete_pod(LEADER), delete_pod(MEMBER))
_SILENT: tuple[Strike, ...] = (kill_agent(LEADER), kill_agent(MEMBER))


def two_at_once(scene: Scene) -> None:
    """Two others with nothing between them, one of which must be answered with a restart."""
    first = scene.dice.choice(_RESTARTING)
    second = scene.dice.choice([strike for strike in (*_RESTARTING, *_SILENT) if strike is not first])
    for strike in scene.dice.sample((first, second), 2):
        try:
            strike(scene)
        except NothingThereError as error:  # the first one has taken it along
            scene.say(str(error))


def kill_worker_in_its_recovery(scene: Scene) -> None:
    """A worker dies, and while its successors begin, one of these too."""
    term = max(worker.term for worker in scene.grounds.workers())
    kill_worker(scene)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        again = [worker for worker in scene.grounds.workers() if worker.term > term]
        if again:
            worker = scene.dice.choice(again)
            return scene.kill(worker.pid, f"the worker of rank {worker.rank}, term {worker.term}")
        time.sleep(0.01)
    raise AssertionError(f"no worker was started again within {PATIENCE:.0f} s")
