"""Kubernetes events on jobs and nodes: what was decided, for `kubectl describe`."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from uuid import uuid4

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_operator.errors import ApiError
from lockstep_operator.kube import EVENTS, KubeClient, Manifest
from lockstep_operator.plan.actions import Event
from lockstep_operator.plan.times import rfc3339

log = logging.getLogger(__name__)

REPEAT_SECONDS = 300.0
"""The same event on the same job is posted once in so long."""
REMEMBERED = 4096
MESSAGE_LIMIT = 1024


class EventPoster:
    """Posts events, each once."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._posted: OrderedDict[tuple[str, Event], float] = OrderedDict()

    async def post(self, job: TrainingJob, event: Event) -> None:
        """On a job. Never fails: an event is a courtesy."""
        about = {
            "apiVersion": constants.API_VERSION,
            "kind": constants.KIND,
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
        }
        await self._post(about, job.namespace, event)

    async def post_on_node(self, node: str, event: Event) -> None:
        """On a node, with its name for a uid, as the kubelet does: `kubectl describe node` looks for that one. Events
        on what is in no namespace are in ``default``. Never fails."""
        await self._post({"apiVersion": "v1", "kind": "Node", "name": node, "uid": node}, "default", event)

    async def _post(self, about: Manifest, namespace: str, event: Event) -> None:
        now = time.time()
        key = (about["uid"], event)
        if now - self._posted.get(key, 0.0) < REPEAT_SECONDS:
            return
        self._posted[key] = now
        while len(self._posted) > REMEMBERED:
            self._posted.popitem(last=False)
        stamp = rfc3339(now)
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{about['name']}.{uuid4().hex[:16]}", "namespace": namespace},
            "involvedObject": about,
            "type": event.type,
            "reason": event.reason,
            "message": event.message[:MESSAGE_LIMIT],
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
            "source": {"component": "lockstep-operator"},
            "reportingComponent": "lockstep.dev/operator",
            "reportingInstance": os.environ.get("POD_NAME", "lockstep-operator"),
        }
        try:
            await self._client.create(EVENTS.path(namespace), body)
        except ApiError as error:
            log.warning("%s: event %s could not be posted: %s", about["name"], event.reason, error)
