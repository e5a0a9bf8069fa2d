"""The agent's line to the zygote."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lockstep_trainer.errors import TrainerError
from lockstep_trainer.zygote import socket_address

log = logging.getLogger(__name__)

_RECONNECT_SECONDS = 0.02  # the supervisor starts a dead zygote at once; there is nothing else to wait on


class ZygoteError(TrainerError):
    """The zygote refused a request; the sentence is its own."""


class ZygoteGoneError(ZygoteError):
    """The zygote died before it answered: nobody knows whether it did what was asked."""


class ZygoteClient:
    """Requests and answers over one connection that is made again whenever it breaks."""

    def __init__(self, run_dir: Path, agent_starts: int, on_warm: Callable[[bool], None]) -> None:
        """``on_warm`` hears when the zygote is ready, and when it has died."""
        self._folder = run_dir / "zygote"
        self._agent_starts = agent_starts
        self._on_warm = on_warm
        self._writer: asyncio.StreamWriter | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._ready = asyncio.Event()
        self.pid: int | None = None

    async def run(self) -> None:
        """Keep the connection; never returns."""
        while True:
            with suppress(OSError):
                await self._converse(*await self._connect())
            if self._ready.is_set():
                self._ready.clear()
                self._on_warm(False)
            self._writer = None
            for waiting in self._answers.values():
                if not waiting.done():
                    waiting.set_exception(ZygoteGoneError("the zygote died"))
            self._answers.clear()
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def ready(self) -> None:
        """Wait until the zygote has imported everything and knows this agent."""
        await self._ready.wait()

    async def request(self, **request: Any) -> dict[str, Any]:
        """The answer; raises ZygoteGoneError, ZygoteError."""
        await self._ready.wait()
        answer = await self._ask(request)
        if "error" in answer:
            raise ZygoteError(answer["error"])
        return answer

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._writer is None:
            raise ZygoteGoneError("the zygote died")
        number = next(self._numbers)
        waiting: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = waiting
        self._writer.write(json.dumps({"id": number, **request}).encode() + b"\n")
        return await waiting

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        directory = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return await asyncio.open_unix_connection(socket_address(directory))
        finally:
            os.close(directory)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        greeting = asyncio.create_task(self._greet())
        try:
            while line := await reader.readline():
                message = json.loads(line)
                # It tells of children's ends too; those are read from the files that they leave.
                if waiting := self._answers.pop(message.get("id"), None):
                    waiting.set_result(message)
        finally:
            greeting.cancel()
            writer.close()

    async def _greet(self) -> None:
        with suppress(ZygoteGoneError):
            answer = await self._ask({"op": "hello", "agent": self._agent_starts})
            self.pid = answer["pid"]
            self._ready.set()
            self._on_warm(True)
