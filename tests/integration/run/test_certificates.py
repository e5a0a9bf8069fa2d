"""A job whose certificates end and are renewed while it trains."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import ClientConnectionError, ClientSession

from integration.run import small
from localrun import victims
from localrun.run import QUICKSTART
from lockstep_api.tls import Material
from lockstep_api.v1alpha1 import TrainingJobStatus
from lockstep_cli import manifest
from lockstep_cli.commands.run import prepare
from lockstep_operator import local_run
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_operator.plan.renewal import Validity

pytestmark = [pytest.mark.run, pytest.mark.timeout(240)]

RENEWAL_SECONDS = 7.0
VALID_SECONDS = 35.0
"""The first certificate ends long before the job does."""


class Run:
    """A local run in this process, with an authority that the test has too."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "run"
        overrides = [f"checkpoint.uri={(folder / 'checkpoints').as_uri()}", *small.overrides(steps=100_000, every=200)]
        self.job = prepare(manifest.load(str(QUICKSTART), overrides), self.state)
        self.uid = self.job.uid
        self.status = TrainingJobStatus()
        self.credentials = Credentials(
            MasterKeys(b"a master key that the test has too"), Validity(VALID_SECONDS, RENEWAL_SECONDS)
        )
        self._changed = asyncio.Event()

    def start(self) -> asyncio.Task[TrainingJobStatus]:
        def show(status: TrainingJobStatus) -> None:
            self.status = status
            self._changed.set()

        running = local_run.run(self.job, state_dir=self.state, on_status=show, credentials=self.credentials)
        return asyncio.create_task(running)

    async def until(self, condition: Callable[[TrainingJobStatus], bool], seconds: float = 90) -> None:
        async with asyncio.timeout(seconds):
            while not condition(self.status):
                self._changed.clear()
                await self._changed.wait()

    def pods(self) -> list[dict[str, str]]:
        return [json.loads(file.read_text()) for file in sorted(self.state.glob("pods/*.json"))]

    def ends(self) -> list[float]:
        """When the certificates end that the agents use, as they say it."""
        pages = [urllib.request.urlopen(f"http://{pod['metrics']}/metrics", timeout=5).read() for pod in self.pods()]
        pattern = r"lockstep_agent_certificate_expiry_timestamp_seconds{.*} (\S+)"
        return [float(re.search(pattern, page.decode())[1]) for page in pages]  # type: ignore[index]

    def material(self, uid: str) -> Material:
        secret = self.credentials.secret(uid)
        return Material(secret["tls.crt"], secret["tls.key"], secret["ca.crt"])

    async def ask(self, context: ssl.SSLContext | None, scheme: str = "https") -> int:
        """Who the first pod is: the status of its answer."""
        headers = {"Authorization": f"Bearer {self.credentials.token(self.uid)}"}
        url = f"{scheme}://{self.pods()[0]['address']}/v1/inventory"
        async with ClientSession(headers=headers) as session, session.get(url, ssl=context or True) as answer:
            return answer.status


def without_verifying(material: Material) -> ssl.SSLContext:
    context = material.client()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def refuses_strangers(run: Run) -> None:
    """All of them have the job's token."""
    assert await run.ask(run.credentials.context(run.uid)) == 200
    assert await run.ask(without_verifying(run.material(run.uid))) == 200
    assert await run.ask(without_verifying(run.material("another-job"))) == 403
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    assert await run.ask(nobody) == 403
    own = Credentials(MasterKeys(b"a master key of one's own")).secret(run.uid)
    forged = without_verifying(Material(own["tls.crt"], own["tls.key"], own["ca.crt"]))
    with pytest.raises(ClientConnectionError):
        await run.ask(forged)
    with pytest.raises(ClientConnectionError):
        await run.ask(None, scheme="http")


def test_a_job_outlives_its_certificates(tmp_path: Path) -> None:
    async def main() -> None:
        run = Run(tmp_path)
        running = run.start()
        try:
            await run.until(lambda status: status.progress.step >= 5)
            first = run.ends()
            await refuses_strangers(run)

            # Renewed, and the first ones have ended: nothing was torn down for it.
            await run.until(lambda _: time.time() > max(first) and min(run.ends()) > time.time(), VALID_SECONDS + 60)
            assert (run.status.epoch, run.status.restarts.total) == (1, 0)
            await refuses_strangers(run)

            # A part that starts now has only the renewed one to come back with.
            supervisor = victims.children_running(os.getpid(), "lockstep_trainer.supervisor")[0]
            (agent,) = victims.children_running(supervisor, "lockstep_trainer.agent")
            step = run.status.progress.step
            os.kill(agent, signal.SIGKILL)
            await run.until(lambda status: status.progress.step > step + 5)
            assert (run.status.epoch, run.status.restarts.total) == (1, 0)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
