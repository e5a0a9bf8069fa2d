"""Kopf's part: it lists and watches the TrainingJobs and hands each over. No finalizers, no annotations, no events of
its own: handlers of the event kind write nothing on the object."""

from __future__ import annotations

from typing import Any

import kopf

from lockstep_api import constants
from lockstep_operator.jobs import Jobs
from lockstep_operator.kube import PAGE, credentials


def registry(jobs: Jobs) -> kopf.OperatorRegistry:
    """The handlers, bound to ``jobs``."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return credentials()

    @kopf.on.event(constants.GROUP, constants.VERSION, constants.PLURAL, registry=handlers)
    async def changed(event: Any, **_: Any) -> None:
        manifest = event["object"]
        if event["type"] == "DELETED":
            await jobs.gone(manifest["metadata"]["uid"])
        else:
            await jobs.changed(manifest)

    return handlers


def settings() -> kopf.OperatorSettings:
    """Kopf without what is done better here, or not wanted."""
    chosen = kopf.OperatorSettings()
    chosen.peering.standalone = True  # the Lease decides who works
    chosen.posting.enabled = False  # events are written by decision
    chosen.scanning.disabled = True  # no rights on CRDs and namespaces needed, and no start-up delay without them
    chosen.watching.chunk_size = PAGE
    chosen.networking.error_backoffs = [0.2, 0.5, 1, 2, 5]
    chosen.queueing.idle_timeout = 1.0
    return chosen
