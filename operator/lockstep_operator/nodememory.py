"""The memory of nodes across jobs: hears of faults, keeps them in a ConfigMap, says which nodes are to be avoided.

Decisions are in ``plan/nodes``. What this keeps in memory is a copy of the ConfigMap, which it watches: an
administrator changes it with ``lockstep nodes``. Jobs tell their faults again after every start of the operator, so a
fault that was heard and not yet written is not lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from lockstep_api.v1alpha1 import TrainingJob
from lockstep_operator.errors import AlreadyExistsError, ApiError, ConflictError
from lockstep_operator.events import EventPoster
from lockstep_operator.informer import Informer
from lockstep_operator.kube import CONFIG_MAPS, KubeClient
from lockstep_operator.nodemarks import NodeMarks
from lockstep_operator.noderecords import Stored, read, write
from lockstep_operator.plan.actions import Event
from lockstep_operator.plan.nodes.blame import remember
from lockstep_operator.plan.nodes.exclusion import Change, Limits, decide, excluded
from lockstep_operator.plan.nodes.records import Records
from lockstep_operator.plan.observed import Node

log = logging.getLogger(__name__)

TICK_SECONDS = 60.0
"""Scores decay: look so often whether an exclusion is over."""
RETRY_SECONDS = 5.0
"""After a write that failed."""


class NodeMemory:
    """One for the whole operator. ``nodes`` gives the cluster's nodes as they are known now."""

    def __init__(
        self,
        client: KubeClient,
        events: EventPoster,
        namespace: str,
        name: str,
        *,
        nodes: Callable[[], Mapping[str, Node]],
        limits: Limits,
        taint: bool = False,
        condition: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client, self._events, self._nodes = client, events, nodes
        self._limits, self._clock = limits, clock
        self._marks = NodeMarks(client, nodes, taint, condition)
        self._stored = Stored(namespace, name)
        self._told: dict[str, TrainingJob] = {}  # by uid: not yet in the records
        self._wake = asyncio.Event()
        self.held = ""
        """Why the breaker keeps nodes in use that should be excluded."""
        self._informer = Informer(
            client, CONFIG_MAPS, read, self._changed, namespace=namespace, fields=f"metadata.name={name}"
        )

    @property
    def records(self) -> Records:
        """What is remembered now."""
        return self._stored.records

    def excluded(self) -> frozenset[str]:
        """Nodes that new pods stay away from."""
        return frozenset(excluded(self._stored.records, self._clock()))

    def learn(self, job: TrainingJob) -> None:
        """Hear of the faults in a job's status."""
        if job.status.faults:
            self._told[job.uid] = job
            self._wake.set()

    async def synced(self) -> None:
        """Wait until what is remembered was read."""
        await self._informer.synced.wait()

    def look(self) -> None:
        """Something about the nodes has changed: a mark may be missing, or left over."""
        if self._marks.wanted:
            self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._informer.run())
            group.create_task(self._keep())

    async def _keep(self) -> None:
        await self._informer.synced.wait()
        pause = 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):  # wait_for loses a cancellation that comes with a change
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.review()
                pause = TICK_SECONDS
            except ConflictError:
                pause = RETRY_SECONDS / 10  # an administrator was faster; the watch brings it in a moment
            except ApiError as error:
                log.warning("memory of nodes %s/%s: %s", self._stored.namespace, self._stored.name, error)
                pause = RETRY_SECONDS
            except Exception:  # jobs must not end for want of a memory
                log.exception("memory of nodes %s/%s", self._stored.namespace, self._stored.name)
                pause = TICK_SECONDS

    async def review(self) -> None:
        """One pass: what was told, what is due, and the ConfigMap if that changes anything. Raises errors.ApiError."""
        told, now = dict(self._told), self._clock()
        nodes = self._nodes()
        known = sum(1 for node in nodes.values() if node.gpus) or len(nodes)
        outcome = decide(remember(self.records, told.values(), now), nodes=known, now=now, limits=self._limits)
        if outcome.records is not self.records or not self._stored.version:
            await self._write(outcome.records, now)
        for uid, job in told.items():
            if self._told.get(uid) is job:
                del self._told[uid]
        for change in outcome.changes:
            await self._say(change)
        if outcome.held and outcome.held != self.held:
            log.warning("%s", outcome.held)
            for node in outcome.kept_in_use:
                await self._say(Change(node, "NodeExclusionHeld", outcome.held))
        self.held = outcome.held
        if self._marks.wanted:
            await self._marks.show(self.records, now)

    async def _write(self, records: Records, now: float) -> None:
        manifest = write(self._stored, records, now)
        path = CONFIG_MAPS.path(self._stored.namespace)
        if self._stored.version:
            answer = await self._client.replace(f"{path}/{self._stored.name}", manifest)
        else:
            try:
                answer = await self._client.create(path, manifest)
            except AlreadyExistsError as error:  # the watch has not brought it yet
                raise ConflictError(error.code, error.reason, error.message) from None
        self._stored = read(answer)

    async def _say(self, change: Change) -> None:
        log.info("%s: %s: %s", change.node, change.kind, change.message)
        event = Event("Normal" if change.kind == "NodeReleased" else "Warning", change.kind, change.message)
        await self._events.post_on_node(change.node, event)

    def _changed(self, old: Stored | None, new: Stored | None) -> None:
        """The watch has something; what it is late with is older than our own last write."""
        if new is None:
            self._stored = Stored(self._stored.namespace, self._stored.name)
        elif _number(new.version) >= _number(self._stored.version):
            self._stored = new
        self._wake.set()


def _number(version: str) -> int:
    return int(version) if version.isdigit() else 0
