"""Real supervisors, agents, zygotes and workers as local processes, under a stand-in for the operator.

The stand-in does what the protocol asks of an operator and nothing else: it names members once their agents answer,
acknowledges faults, and raises the epoch when the leader asks for other members.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from aiohttp import ClientError, ClientSession, WSMsgType

from localrun import victims
from lockstep_api.messages import (
    EpochRequest,
    FaultAck,
    FaultReport,
    Finished,
    Inventory,
    Membership,
    Message,
    Progress,
    Recovered,
    ReplaceRequest,
    SlotInfo,
)
from lockstep_api.wire import decode, encode
from lockstep_operator.backends import ports

TOKEN = "harness"
UID = "11111111-2222-3333-4444-555555555555"


@dataclass
class Pod:
    """One supervisor with a run folder of its own."""

    name: str
    uid: str
    run_dir: Path
    ports: list[socket.socket]
    process: asyncio.subprocess.Process

    @property
    def address(self) -> str:
        return f"127.0.0.1:{ports.number(self.ports[0])}"

    @property
    def log(self) -> str:
        return (self.run_dir.parent / "pod.log").read_text()

    def agent_pid(self) -> int:
        """Pid of the agent that runs now."""
        return _child(self.process.pid, "lockstep_trainer.agent")

    def standby_pid(self) -> int | None:
        """Pid of the agent that stands by; None before there is one."""
        return next(iter(victims.standing_by(self.process.pid)), None)

    def zygote_pid(self) -> int:
        """Pid of the zygote that runs now."""
        return _child(self.process.pid, "lockstep_trainer.zygote")

    def worker_pid(self, rank: int, generation: int, epoch: int = 1) -> int:
        """Pid of a worker."""
        path = self.run_dir / "workers" / f"e{epoch}-g{generation}-r{rank}" / "pid.json"
        return int(json.loads(path.read_text())["pid"])

    def store_pid(self) -> int:
        """Pid of the rendezvous store."""
        return int(json.loads((self.run_dir / "store" / "pid.json").read_text())["pid"])


def _child(parent: int, module: str) -> int:
    for pid in victims.children_running(parent, module):
        return pid
    raise LookupError(f"process {parent} has no child {module}")


@dataclass
class Cluster:
    """N pods and the stand-in operator."""

    folder: Path
    spec: dict[str, Any]
    pods: list[Pod] = field(default_factory=list)
    heard: list[Message] = field(default_factory=list)
    epoch: int = 0
    spare_pods: list[Pod] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _count: int = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def up(cls, folder: Path, spec: dict[str, Any]) -> AsyncIterator[Self]:
        """Start the pods and the operator; take everything down at the end."""
        cluster = cls(folder, spec)
        try:
            cluster.pods = [await cluster.start_pod() for _ in range(spec["nodes"])]
            cluster._tasks.append(asyncio.create_task(cluster._operate()))
            yield cluster
        finally:
            for task in cluster._tasks:
                task.cancel()
            await asyncio.gather(*cluster._tasks, return_exceptions=True)
            await asyncio.gather(*(stop_pod(pod) for pod in [*cluster.pods, *cluster.spare_pods]))

    async def start_pod(self) -> Pod:
        """A fresh pod."""
        number, self._count = self._count, self._count + 1
        home = self.folder / f"pod-{number}"
        run_dir = home / "run"
        run_dir.mkdir(parents=True)
        (self.folder / "token").write_text(TOKEN)
        job = {"name": "job", "namespace": "default", "uid": UID, "spec": self.spec}
        (self.folder / "job.json").write_text(json.dumps(job))
        reserved = ports.reserve(2)
        port, store_port = map(ports.number, reserved)
        env = {
            **os.environ,
            "LOCKSTEP_POD_NAME": f"job-{number}-0",
            "LOCKSTEP_POD_UID": f"pod-uid-{number}",
            "LOCKSTEP_NAMESPACE": "default",
            "LOCKSTEP_NODE_NAME": f"node-{number}",
            "LOCKSTEP_HOST": "127.0.0.1",
            "LOCKSTEP_BIND": "127.0.0.1",
            "LOCKSTEP_AGENT_PORT": str(port),
            "LOCKSTEP_METRICS_PORT": "0",
            "LOCKSTEP_STORE_PORT": str(store_port),
            "LOCKSTEP_ORDINAL": str(number),
            "LOCKSTEP_INCARNATION": "0",
            "LOCKSTEP_RUN_DIR": str(run_dir),
            "LOCKSTEP_CONFIG_DIR": str(self.folder),
            "LOCKSTEP_TOKEN_DIR": str(self.folder),
            "LOCKSTEP_DIE_WITH_PARENT": str(os.getpid()),
            "LOCKSTEP_GRACE_SECONDS": "5",
            "OMP_NUM_THREADS": "1",
        }
        with (home / "pod.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lockstep_trainer.supervisor", env=env, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return Pod(f"job-{number}-0", f"pod-uid-{number}", run_dir, reserved, process)

    # ------------------------------------------------------------------------------------ operator

    async def _operate(self) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with ClientSession(headers=headers) as session:
            while True:
                membership = await self._new_epoch(session)
                with contextlib.suppress(ClientError, OSError):
                    await self._converse(session, membership)

    async def _new_epoch(self, session: ClientSession) -> Membership:
        slots = []
        for slot, pod in enumerate(self.pods):
            inventory = await self._inventory(session, pod)
            slots.append(
                SlotInfo(slot, pod.name, pod.uid, inventory.boot_id, pod.address, domain=f"node-{slot}", ordinal=slot)
            )
        self.epoch += 1
        return Membership(UID, self.epoch, tuple(slots), cause="test")

    async def until_warm(self, pod: Pod, warm: bool, timeout: float = 60.0) -> None:
        """Wait until a pod's agent says so of its zygote."""
        async with asyncio.timeout(timeout), ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session:
            while (await self._inventory(session, pod)).warm != warm:
                await asyncio.sleep(0.02)

    async def _inventory(self, session: ClientSession, pod: Pod) -> Inventory:
        while True:
            with contextlib.suppress(ClientError, OSError):
                async with session.get(f"http://{pod.address}/v1/inventory") as response:
                    inventory = decode(await response.text())
                    assert isinstance(inventory, Inventory)
                    return inventory
            await asyncio.sleep(0.02)  # nothing to wait on before the agent listens

    async def _converse(self, session: ClientSession, membership: Membership) -> None:
        while True:
            try:
                socket_ = await session.ws_connect(f"http://{self.pods[0].address}/v1/operator")
            except (ClientError, OSError):
                await asyncio.sleep(0.02)
                continue
            async with socket_:
                await socket_.send_str(encode(membership))
                async for frame in socket_:
                    if frame.type is not WSMsgType.TEXT:
                        continue
                    message = decode(frame.data)
                    self.heard.append(message)
                    self._news.set()
                    if isinstance(message, FaultReport):
                        await socket_.send_str(encode(FaultAck(UID, message.term)))
                    elif isinstance(message, EpochRequest) and message.epoch == self.epoch:
                        return
                    elif isinstance(message, ReplaceRequest) and message.epoch == self.epoch:
                        for slot in message.slots:
                            self.spare_pods.append(self.pods[slot])
                            self.pods[slot] = await self.start_pod()
                        return

    # -------------------------------------------------------------------------------------- waiting

    async def wait_for(self, what: Callable[[Message], bool], since: int = 0, timeout: float = 60.0) -> Message:
        """The first message since that index for which ``what`` is true."""
        position = since
        try:
            async with asyncio.timeout(timeout):
                while True:
                    while position < len(self.heard):
                        message = self.heard[position]
                        position += 1
                        if what(message):
                            return message
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            logs = "\n".join(f"--- {pod.name}\n{pod.log[-6000:]}" for pod in self.pods)
            raise AssertionError(f"not heard within {timeout} s; last {self.heard[-3:]}\n{logs}") from None

    async def running(self, generation: int, *, step: int = 0, epoch: int = 1, timeout: float = 60.0) -> Progress:
        """Wait until this generation, or a newer one, runs and has done this step."""

        def there(message: Message) -> bool:
            if isinstance(message, Finished):
                raise AssertionError(f"the job ended: {message}")
            if not isinstance(message, Progress) or message.state != "running":
                return False
            done = message.newest.step if message.newest else 0
            return (message.term.epoch, message.term.generation) >= (epoch, generation) and done >= step

        message = await self.wait_for(there, timeout=timeout)
        assert isinstance(message, Progress)
        return message

    async def finished(self, timeout: float = 60.0) -> Finished:
        """Wait for the end of the job."""
        message = await self.wait_for(lambda m: isinstance(m, Finished), timeout=timeout)
        assert isinstance(message, Finished)
        return message

    def faults(self) -> list[FaultReport]:
        """Faults heard of, each once."""
        found = {message.term: message for message in self.heard if isinstance(message, FaultReport)}
        return [found[term] for term in sorted(found)]

    def recoveries(self) -> list[Recovered]:
        """Recoveries heard of."""
        return [message for message in self.heard if isinstance(message, Recovered)]


async def stop_pod(pod: Pod) -> None:
    """End a pod as the kubelet does, and see that nothing of it is left."""
    if pod.process.returncode is None:
        pod.process.terminate()
        try:
            async with asyncio.timeout(10):
                await pod.process.wait()
        except TimeoutError:
            pod.process.kill()
            await pod.process.wait()
    ports.release(pod.ports)


async def gone(pid: int, timeout: float = 10.0) -> None:
    """Wait until a process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(timeout):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def until(question: Callable[[], int | None], timeout: float = 20.0) -> int:
    """The answer, once there is one."""
    async with asyncio.timeout(timeout):
        while (answer := question()) is None:
            await asyncio.sleep(0.02)
    return answer


def kill(pid: int) -> float:
    """SIGKILL; returns the moment, Unix seconds."""
    os.kill(pid, signal.SIGKILL)
    return time.time()
