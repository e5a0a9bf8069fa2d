"""Does to the cluster what the deck says, and puts right again what Lockstep can't."""

from __future__ import annotations

import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from demonstration import faults, install
from demonstration.target import DemoError
from e2e.jobs import NAMESPACE, RunningJob
from localcluster import Cluster, ClusterError
from lockstep_api import constants
from soak import deck
from soak.deck import Card, Seat, Spared

_POD_SELECTOR = f"{constants.LABEL_JOB_NAME}="


@dataclass(frozen=True, slots=True)
class Blow:
    """A fault as it was done."""

    at: float  # seconds since the soak began
    kind: str
    target: str
    step: int  # that the job was at
    hold: float
    missed: str = ""  # why it could not be done: what it was to strike had just gone


@dataclass
class Harm:
    """Faults on one job. Those that take time, or must be put right later, go on beside the next ones."""

    job: RunningJob
    cluster: Cluster
    began: float  # monotonic
    spared: Spared = field(default_factory=Spared)
    _away: set[str] = field(default_factory=set)  # what is to be put right: kinds
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, thread_name_prefix="harm"))
    _mending: list[Future[None]] = field(default_factory=list)
    _over: bool = False

    def __enter__(self) -> Harm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        self._pool.shutdown()

    def settle(self) -> None:
        """Put everything right now; waits until it is. Raises what went wrong with that."""
        self._over = True
        for each in self._mending:
            each.result()

    def fits(self, kind: str) -> bool:
        """Whether a fault of this kind may come now: one node at a time is away, and the store once."""
        if kind in deck.OF_NODES:
            return not self._away & set(deck.OF_NODES)
        return kind not in self._away

    def spare(self) -> Spared:
        """From now on the operator that works and its node are spared."""
        holder = install.lease_holder(self.job.target).partition("_")[0]
        node = next((one.node for one in self._operators() if one.pod == holder), "")
        self.spared = Spared(node, holder)
        return self.spared

    def strike(self, card: Card, step: int) -> Blow:
        """Do it. What it meant to strike may have gone a moment ago; the blow says so."""
        at = round(time.monotonic() - self.began, 1)
        try:
            holder = install.lease_holder(self.job.target).partition("_")[0]
            seat = deck.aim(card, self._pods(), self._operators(), holder, self.spared)
            if card.kind == deck.STORE_AWAY:
                self._away_for(card, self.cluster.s3_stop, self.cluster.s3_start)
                return Blow(at, card.kind, "S3 server", step, card.hold)
            if seat is None:
                raise DemoError("nobody to strike")
            return Blow(at, card.kind, self._done(card, seat), step, card.hold)
        except (DemoError, ClusterError, ProcessLookupError) as error:
            return Blow(at, card.kind, "", step, 0, missed=str(error).splitlines()[0][:160])

    def _done(self, card: Card, seat: Seat) -> str:
        target, number = self.job.target, int(seat.node.removeprefix("node"))
        if card.kind in (deck.WORKER_KILLED, deck.WORKER_STOPPED):
            sent = signal.SIGKILL if card.kind == deck.WORKER_KILLED else signal.SIGSTOP
            return f"rank {faults.kill_worker(target, NAMESPACE, seat.pod, sent)['rank']} on {seat.node}"
        if card.kind == deck.AGENT_KILLED:
            faults.kill_in_pod(target, seat.uid, "lockstep_trainer.agent")
        elif card.kind == deck.OPERATOR_KILLED:
            faults.kill_in_pod(target, seat.uid, "lockstep_operator")
        elif card.kind == deck.POD_DELETED:
            self.job.kubectl("delete", "pod", seat.pod, "--wait=false")
        elif card.kind == deck.POWER_CUT:
            self._away_for(card, lambda: self.cluster.power_cut(number), lambda: self.cluster.power_on(number))
            return seat.node
        elif card.kind == deck.PARTITION:
            self._away_for(card, lambda: self.cluster.partition(number), lambda: self.cluster.heal(number))
            return seat.node
        elif card.kind == deck.DRAIN:
            self._away_for(card, lambda: self._drain(seat.node), lambda: self._uncordon(seat.node))
            return seat.node
        slot = "" if seat.slot is None else f"slot {seat.slot} "
        return f"{slot}{seat.pod} on {seat.node}"

    def _away_for(self, card: Card, harm: Any, mend: Any) -> None:
        """Do the harm at once, and put it right when its time has come, or all is over."""
        self._away.add(card.kind)
        done = self._pool.submit(harm)

        def later() -> None:
            try:
                done.result()
            finally:
                end = time.monotonic() + card.hold
                while time.monotonic() < end and not self._over:
                    time.sleep(0.1)
                mend()
                self._away.discard(card.kind)

        self._mending.append(self._pool.submit(later))

    def _drain(self, node: str) -> None:
        """Of the job's pods only."""
        selector = f"{_POD_SELECTOR}{self.job.name}"
        with suppress(DemoError):  # a pod that is already going may be in the way
            self.job.target.kubectl(
                "drain", node, f"--pod-selector={selector}", "--delete-emptydir-data", "--timeout=30s"
            )

    def _uncordon(self, node: str) -> None:
        self.job.target.kubectl("uncordon", node)

    def _pods(self) -> list[Seat]:
        found = self.job.target.get("pods", "-n", NAMESPACE, "-l", f"{_POD_SELECTOR}{self.job.name}")["items"]
        return [_seat(pod) for pod in found if _runs(pod)]

    def _operators(self) -> list[Seat]:
        return [_seat(pod) for pod in install.operator_pods(self.job.target) if _runs(pod)]


def _runs(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and pod["status"].get("phase") == "Running"


def _seat(pod: dict[str, Any]) -> Seat:
    slot = pod["metadata"]["labels"].get(constants.LABEL_SLOT)
    node = pod["spec"].get("nodeName", "")
    return Seat(pod["metadata"]["name"], pod["metadata"]["uid"], node, int(slot) if slot is not None else None)
