"""The agent's loop: events in, effects out, in order."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import web

from lockstep_api import heap
from lockstep_api.constants import PREFLIGHT_EXIT_CODE
from lockstep_api.messages import Committed, Finished, Inventory, Start, Term, ToOperator
from lockstep_trainer.agent import sockets, streams
from lockstep_trainer.agent.containerlog import STDERR, STDOUT
from lockstep_trainer.agent.copies import Copies
from lockstep_trainer.agent.durable import DurableStore
from lockstep_trainer.agent.memory import Volume
from lockstep_trainer.agent.preflight import Unfit, devices, look_again
from lockstep_trainer.agent.rendezvous import RendezvousStore
from lockstep_trainer.agent.server import Server
from lockstep_trainer.agent.settings import Job, Settings, SettingsError
from lockstep_trainer.agent.snapshots import Snapshots
from lockstep_trainer.agent.streams import Inviter, LeaderStream
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.agent.uploads import Uploads
from lockstep_trainer.agent.workers import Workers
from lockstep_trainer.agent.zygote_client import ZygoteClient
from lockstep_trainer.protocol import effects, events, policy
from lockstep_trainer.protocol.member import Identity
from lockstep_trainer.protocol.node import Node

log = logging.getLogger(__name__)

TICK_SECONDS = 0.1
_END_SECONDS = 10.0
_LAST_WORDS_SECONDS = 15.0
"""How long the end of the job is held back from the operator for the journal's last lines."""


class Clock:
    """Unix time that never runs backwards or jumps: wall clock at start, monotonic from there."""

    def __init__(self) -> None:
        self._base = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._base + time.monotonic()


class Agent:
    """One pod's agent."""

    def __init__(self, settings: Settings, job: Job, trust: Trust) -> None:
        self.settings = settings
        self.job = job
        self.trust = trust
        self.clock = Clock()
        self.volume = Volume(settings.run_dir)
        me = Identity(
            job_uid=job.uid,
            pod=settings.pod,
            pod_uid=settings.pod_uid,
            boot_id=self.volume.boot_id,
            container_starts=self.volume.container_starts,
            agent_starts=self.volume.agent_starts,
            devices=devices(settings),
        )
        memory = self.volume.load()
        self.node = Node(me, job.plan(), memory, leaderless_seconds=job.leaderless_seconds, now=self.clock())
        self.snapshots = Snapshots(settings.run_dir, job.spec["gpusPerNode"], self.tell)
        self.server = Server(self)
        self.durable = DurableStore(job, settings.run_dir, self.tell)
        self._zygote = ZygoteClient(
            settings.run_dir, self.volume.agent_starts, on_warm=lambda warm: self.tell(events.Warmed(warm))
        )
        self.uploads = Uploads(job, self.snapshots.root, self.tell)
        self.copies = Copies(self.snapshots, job.spec["gpusPerNode"], trust, self.tell)
        self.workers = Workers(settings, job, self._zygote, self.tell, look=self.snapshots.look)
        self._rendezvous = RendezvousStore(settings, job, self._zygote, self.tell)
        self._queue: deque[events.Event] = deque()
        self._draining = False
        self._looking = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stream: LeaderStream
        self._inviter: Inviter
        self._perform: dict[type, Callable[[Any], None]] = {
            effects.Persist: lambda _: self.volume.save(self.node.memory()),
            effects.OpenStream: lambda effect: self._stream.open(effect.leader, effect.epoch),
            effects.CloseStream: lambda _: self._stream.close(),
            effects.SendLeader: lambda effect: self._stream.send(effect.message),
            effects.Launch: self._launch,
            effects.Leave: self._leave,
            effects.Kill: self._kill,
            effects.PostInvite: lambda effect: self._inviter.post(effect.address, effect.invite),
            effects.SendMember: lambda effect: self.server.send_member(effect.connection, effect.message),
            effects.DropMember: lambda effect: self.server.drop_member(effect.connection),
            effects.SendOperator: lambda effect: self._send_operator(effect.message),
            effects.ChooseRestore: lambda effect: self.durable.choose(effect.term, effect.cut, effect.at),
            effects.EnsureStore: lambda _: self._rendezvous.ensure(),
            effects.Commit: self.durable.commit,
            effects.CopySnapshot: self._copy,
            effects.PinSnapshot: lambda effect: self.snapshots.pin(effect.state),
            effects.KeepSnapshot: lambda effect: self.snapshots.keep(effect.state),
            effects.DropSnapshots: self._drop,
            effects.UploadState: lambda effect: self.uploads.order(effect, self.node.member.workers.slot or 0),
            effects.ExamineWorkers: lambda effect: self._spawn(self.workers.examine(effect.term)),
            effects.RequestSnapshot: lambda e: self.snapshots.request(hold=e.hold),
            effects.Journal: lambda effect: self._journal(effect.line),
        }

    def tell(self, event: events.Event) -> None:
        """Hand an event to the core and carry out what it asks for. An effect may tell a further event: it waits."""
        if isinstance(event, events.LeaderSaid) and isinstance(event.message, Committed):
            self.snapshots.durable(event.message.restore.state)
        if isinstance(event, events.WorkerEnded) and not self._looking and _of_the_device(event):
            self._spawn(self._look_again())
        self._queue.append(event)
        if self._draining:
            return
        self._draining = True
        try:
            while self._queue:
                self._carry_out(self.node.handle(self._queue.popleft(), self.clock()))
        finally:
            self._draining = False

    def inventory(self) -> Inventory:
        """Who this agent is."""
        return self.node.inventory(self.clock())

    @property
    def newest_start(self) -> Start | None:
        """Orders of the running generation."""
        return self.node.member.workers.running

    def ranks(self) -> str:
        """Ranks of this node, for people."""
        start = self.newest_start
        return ", ".join(map(str, self.node.member.workers.ranks(start))) if start else "none"

    async def run(self, listening: socket.socket, metrics: socket.socket) -> None:
        """Serve until SIGTERM; then end the workers. ``metrics`` is the port without TLS."""
        loop = asyncio.get_running_loop()
        ending = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ending.set)
        runner = web.AppRunner(self.server.app, access_log=None, shutdown_timeout=1.0)
        open_runner = web.AppRunner(self.server.open_app, access_log=None, shutdown_timeout=1.0)
        async with streams.session() as session:
            self._stream = LeaderStream(session, self.trust, self.tell)
            self._inviter = Inviter(session, self.trust, self.tell)
            self.copies.session = session
            await runner.setup()
            await web.SockSite(runner, listening, ssl_context=self.trust.server_context).start()
            await open_runner.setup()
            await web.SockSite(open_runner, metrics).start()
            background = [
                self._zygote.run(),
                self.workers.poll(),
                self.snapshots.watch(),
                self.durable.write_journal(),
                self.trust.watch(),
                heap.keep_trimmed(),
                self._tick(),
            ]
            for coroutine in background:
                self._spawn(coroutine, ending)
            member = self.node.member
            workers = member.workers
            if workers.running and workers.slot is not None:
                self.workers.adopt(workers.running, workers.slot)
            self.workers.end_strays()
            self.snapshots.look()  # what an earlier agent's workers have staged, before anybody asks for it
            self._carry_out(self.node.resume(self.clock()))
            await ending.wait()
            await self._end()
            await self.copies.close()
            self.uploads.close()
            self._stream.close()
            await self.server.close()
        await runner.cleanup()
        await open_runner.cleanup()
        for task in self._tasks:
            task.cancel()
        self.durable.close()
        await STDOUT.flush()

    # ---------------------------------------------------------------------------------------------

    def _carry_out(self, wanted: list[effects.Effect]) -> None:
        for effect in wanted:
            self._perform[type(effect)](effect)

    def _launch(self, effect: effects.Launch) -> None:
        start = effect.start
        if start.restore:
            self.snapshots.durable(start.restore.state)
        before = self.copies.fetch(start, effect.slot)
        if start.memory is None:
            self.snapshots.leave_only(self.node.member.workers.ranks(start))
            before = asyncio.create_task(self.snapshots.removed())  # the workers need its memory for their own
        self.workers.launch(start, effect.slot, before=before)

    def _leave(self, effect: effects.Leave) -> None:
        self.copies.stop_fetching()
        self.workers.leave(effect.term)

    def _kill(self, effect: effects.Kill) -> None:
        self.copies.stop_fetching()
        self.workers.kill(effect.term)

    def _copy(self, effect: effects.CopySnapshot) -> None:
        self.copies.copy(effect.state, effect.buddy, effect.keep, self.node.member.workers.slot or 0)

    def _drop(self, effect: effects.DropSnapshots) -> None:
        self.uploads.forget(effect.step, lambda state: Term(state.epoch, state.generation) < effect.term)
        self.snapshots.drop(effect.term, effect.step)

    def _spawn(self, coroutine: Any, fatal: asyncio.Event | None = None) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)

        def done(task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                log.error("the agent can't go on", exc_info=error)
                if fatal:  # a new agent adopts the workers; this one would only be half alive
                    STDERR.settle()
                    os._exit(1)

        task.add_done_callback(done)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.tell(events.Tick())

    async def _look_again(self) -> None:
        """A worker's error may be its GPU's. A node that is unfit is left at once: another worker there would fail too,
        or compute wrongly. The supervisor ends with this process, and the operator reads why."""
        self._looking = True
        try:
            await look_again(self.settings, self.job)
        except Unfit as unfit:
            log.error("this node is unfit and its pod ends: %s", unfit)
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    if self.node.leader:
                        await self.durable.flush()
            await STDOUT.flush()
            STDERR.settle()
            os._exit(PREFLIGHT_EXIT_CODE)
        finally:
            self._looking = False

    def _journal(self, line: dict[str, Any]) -> None:
        self.durable.journal(line)
        if line["kind"] in ("start", "fault", "recovered", "checkpoint", "finished"):
            log.info("%s", json.dumps(line, separators=(", ", ": ")))

    def _send_operator(self, message: ToOperator) -> None:
        if isinstance(message, Finished):
            self._spawn(self._send_last_words(message))
        else:
            self.server.send_operator(message)

    async def _send_last_words(self, message: Finished) -> None:
        """The pod is deleted once the operator knows: first the journal."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self.durable.flush()
        self.server.send_operator(message)

    async def _end(self) -> None:
        """SIGTERM: the pod goes. What it has done is saved, workers end, the journal gets its last lines."""
        await self._save_last()
        self.workers.kill(Term(1 << 62, 0))
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self.workers.all_ended()
                if self.node.leader:
                    await self.durable.flush()

    async def _save_last(self) -> None:
        """Let the job take a last checkpoint of what this pod is about to lose, as far as the grace period goes."""
        member, seconds = self.node.member, self.settings.grace - _END_SECONDS
        durable, origin = self.snapshots.last_durable, member.holdings.memory.origin
        saved = max(durable.step if durable else 0, origin.step if origin else 0)
        if not (member.workers.live and member.connected and member.workers.step > saved and seconds > 0):
            return  # there is nothing to save, or nobody to say so to
        if not self.job.spec.get("checkpoint"):
            return
        step = member.workers.step
        self.tell(events.PodEnding(seconds))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while member.workers.live and not ((now := self.snapshots.last_durable) and now.step >= step):
                    await asyncio.sleep(TICK_SECONDS)


def _of_the_device(end: events.WorkerEnded) -> bool:
    """Whether the error may be the GPU's. Whoever lost a peer names the fabric too, and is a victim."""
    victim = end.user_error or end.exit_code == policy.PEER_LOST_EXIT
    return not victim and policy.may_be_hardware(end.error or "")


def listen(settings: Settings) -> tuple[socket.socket, socket.socket]:
    """The agent's port, and that of its metrics; raises SettingsError."""
    wanted = (("LOCKSTEP_AGENT_PORT", settings.port, 4096), ("LOCKSTEP_METRICS_PORT", settings.metrics_port, 128))
    listening = []
    for variable, port, backlog in wanted:
        try:
            listening.append(sockets.watched(socket.create_server((settings.bind, port), backlog=backlog)))
        except OSError as error:
            raise SettingsError(
                f"{variable} {port} on {settings.bind} can't be listened on: {error.strerror}"
            ) from None
    return listening[0], listening[1]
