"""Leader election among replicas of the operator, by a coordination.k8s.io Lease.

A lease lasts 8 s, its holder gives up when it could not renew it for 6 s, and everybody tries every second. Kubernetes'
own controllers have 15, 10 and 2: but a job whose pod and operator lose their node together waits for the Lease, with
all its GPUs, and two small requests a second are less than what two kubelets send. It can be this short since the Lease
only keeps two operators from working against each other; what makes a stale one harmless is the resource version on
every status write.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

from lockstep_operator.errors import AlreadyExistsError, ApiError, ConflictError, NotFoundError
from lockstep_operator.kube import LEASES, KubeClient, Manifest

log = logging.getLogger(__name__)

LEASE_SECONDS = 8
RENEW_DEADLINE_SECONDS = 6.0
RETRY_SECONDS = 1.0


class Lease:
    """``identity`` is this replica's name."""

    def __init__(self, client: KubeClient, namespace: str, name: str, identity: str) -> None:
        self._client, self._namespace, self._name, self._identity = client, namespace, name, identity
        self._seen: tuple[str, float] = ("", 0.0)  # another holder's renewal, and when we first saw it (monotonic)

    async def acquire(self) -> None:
        """Wait until this replica holds the lease."""
        while True:
            try:
                if await self._try():
                    log.info("holding the lease %s/%s as %s", self._namespace, self._name, self._identity)
                    return
            except ApiError as error:
                log.warning("lease %s/%s: %s", self._namespace, self._name, error)
            await asyncio.sleep(RETRY_SECONDS)

    async def hold(self) -> None:
        """Renew until the lease is lost; returns then."""
        renewed = time.monotonic()
        while time.monotonic() - renewed < RENEW_DEADLINE_SECONDS:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                async with asyncio.timeout(RENEW_DEADLINE_SECONDS - (time.monotonic() - renewed)):
                    if not await self._try():
                        break
                renewed = time.monotonic()
            except (ApiError, TimeoutError) as error:
                log.warning("lease %s/%s could not be renewed: %s", self._namespace, self._name, error)
        log.error("the lease %s/%s is lost", self._namespace, self._name)

    async def release(self) -> None:
        """Let another replica take over at once."""
        try:
            lease = await self._client.get(self._path())
            if lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._client.replace(self._path(), lease)
        except ApiError as error:
            log.warning("lease %s/%s could not be released: %s", self._namespace, self._name, error)

    async def _try(self) -> bool:
        """Take or renew the lease if that is allowed; whether this replica holds it now."""
        try:
            lease = await self._client.get(self._path())
        except NotFoundError:
            return await self._create()
        spec = lease.setdefault("spec", {})
        holder = spec.get("holderIdentity") or ""
        if holder not in ("", self._identity) and not self._expired(spec):
            return False
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if holder != self._identity:
            spec["leaseTransitions"] = spec.get("leaseTransitions", 0) + 1
            spec["acquireTime"] = now
        spec |= {"holderIdentity": self._identity, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now}
        try:
            await self._client.replace(self._path(), lease)
        except ConflictError:
            return False
        return True

    async def _create(self) -> bool:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        body: Manifest = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": LEASE_SECONDS,
                "acquireTime": now,
                "renewTime": now,
                "leaseTransitions": 0,
            },
        }
        try:
            await self._client.create(LEASES.path(self._namespace), body)
        except (AlreadyExistsError, ConflictError):
            return False
        return True

    def _expired(self, spec: Manifest) -> bool:
        """Whether the holder was silent for the lease's length, by our own clock: clocks of two machines may differ."""
        renewal = f"{spec.get('holderIdentity')} {spec.get('renewTime')}"
        if renewal != self._seen[0]:
            self._seen = (renewal, time.monotonic())
        limit: int = spec.get("leaseDurationSeconds", LEASE_SECONDS)
        return time.monotonic() - self._seen[1] > limit

    def _path(self) -> str:
        return LEASES.path(self._namespace, self._name)
