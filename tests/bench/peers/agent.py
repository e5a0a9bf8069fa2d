"""The agent's part, in a process of its own as in a pod, with the agent's own code: uploads, and copies at a buddy."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aiohttp import ClientSession, web

from lockstep_api.messages import RestorePoint, StateId, Term
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_trainer.agent.copies import Copies
from lockstep_trainer.agent.copyroutes import CopyRoutes
from lockstep_trainer.agent.snapshots import POLL_SECONDS, Snapshots
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.checkpoint.chain import Chain
from lockstep_trainer.checkpoint.snapshots import FOLDER, held, rank_folder, reading, write_state
from lockstep_trainer.checkpoint.upload import listing_of, upload_rank
from lockstep_trainer.protocol.events import Event, StateCopied
from lockstep_trainer.storage.checksum import crc64nvme

from .store import Server

JOB = "lockstep/job/uid"
TERM = Term(1, 1)


class Agent:
    """Does what rank 0 asks for, one thing after the other, and answers with seconds or an instant of the clock that
    all processes of a machine share (``time.perf_counter``)."""

    def __init__(self, server: Server, run: Path, fetched: Path, ranks: int, buddy: str) -> None:
        """``run``: the run folder; ``fetched``: that of a pod that has nothing yet; ``buddy``: host:port."""
        self._root, self._run, self._fetched, self._ranks, self._buddy = run / FOLDER, run, fetched, ranks, buddy
        self._store = server.store()
        self._chain = Chain(self._store, JOB)
        self._parent: RestorePoint | None = None
        self._pool = ThreadPoolExecutor(ranks)
        self._raw = 0

    def serve(self, line: Connection) -> None:
        """Until the other end is closed."""
        self._store.verifies_uploads()
        self._chain.fence(TERM, "bench")
        while True:
            try:
                name, state = line.recv()
            except EOFError:
                return
            line.send(getattr(self, name)(state))

    def upload(self, state: StateId) -> float:
        """When it was committed."""
        while not all(
            any(each.state == state for each in held(rank_folder(self._root, rank)).values())
            for rank in range(self._ranks)
        ):
            time.sleep(POLL_SECONDS)
        write_state(self._root / "kept.json", state)

        def one(rank: int) -> Any:
            return upload_rank(rank_folder(self._root, rank), state, self._parent, self._chain.store)

        done = list(self._pool.map(one, range(self._ranks)))
        header = next(each.header for each in done if each.header is not None)
        files = [file for each in done for file in each.files]
        self._parent = self._chain.commit(listing_of(header, self._parent, files), TERM, "bench")
        return time.perf_counter()

    def raw(self, state: StateId) -> tuple[float, float]:
        """The same bytes, put by the same client from the same memory, with no work besides: from when to when."""
        self._raw += 1
        with ExitStack() as stack:
            files: list[list[tuple[str, memoryview, str]]] = []
            for rank in range(self._ranks):
                found = stack.enter_context(reading(rank_folder(self._root, rank), state))
                views = [
                    (file.name, stack.enter_context(found.data[file.offset : file.offset + file.size]))
                    for file in found.plan.files
                ]
                files.append([(name, view, crc64nvme(view)) for name, view in views])

            def one(own: list[tuple[str, memoryview, str]]) -> None:
                for name, view, checksum in own:
                    self._store.put_buffer(f"raw/{self._raw}/{name}", view, crc64nvme=checksum)

            begun = time.perf_counter()
            list(self._pool.map(one, files))
            return begun, time.perf_counter()

    def copy(self, state: StateId) -> float:
        """Seconds until the buddy has verified its copies of all ranks."""
        return asyncio.run(self._copy(state))

    def fetch(self, state: StateId) -> float:
        """Seconds to bring the buddy's copies into a run folder that has none."""
        shutil.rmtree(self._fetched / FOLDER, ignore_errors=True)
        return asyncio.run(self._fetch(state))

    async def _copy(self, state: StateId) -> float:
        copied = asyncio.Event()

        def tell(event: Event) -> None:
            if event == StateCopied(state):
                copied.set()

        copies = Copies(Snapshots(self._run, self._ranks, tell), self._ranks, _trust(self._run), tell)
        async with ClientSession() as copies.session:
            begun = time.perf_counter()
            copies.copy(state, self._buddy, None, 0)
            await copied.wait()
            return time.perf_counter() - begun

    async def _fetch(self, state: StateId) -> float:
        snapshots = Snapshots(self._fetched, self._ranks, lambda _: None)
        copies = Copies(snapshots, self._ranks, _trust(self._fetched), lambda _: None)
        start: Any = SimpleNamespace(memory=SimpleNamespace(state=state, sources=[self._buddy]))
        async with ClientSession() as copies.session:
            begun = time.perf_counter()
            task = copies.fetch(start, 0)
            assert task is not None
            await task
            return time.perf_counter() - begun


def _trust(run: Path) -> Trust:
    """With the certificate that all pods of one job have."""
    folder = run.with_name(f"{run.name}-token")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in Credentials(MasterKeys(b"a master key for all")).secret("uid").items():
        (folder / name).write_bytes(content)
    return Trust(folder, "uid", use_tls=True)


def buddy(run: Path, ranks: int, listening: socket.socket) -> None:
    """Serve copies as the agent of another pod does; never returns."""

    async def serve() -> None:
        app = web.Application()
        trust = _trust(run)
        app.add_routes(CopyRoutes(Snapshots(run, ranks, lambda _: None), ranks, trust, "127.0.0.1").routes())
        runner = web.AppRunner(app)
        await runner.setup()
        await web.SockSite(runner, listening, ssl_context=trust.server_context).start()
        await asyncio.Event().wait()

    asyncio.run(serve())
