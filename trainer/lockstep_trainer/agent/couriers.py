"""The agent's couriers: processes that are started when there is something large to carry, and wait for more."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress

from lockstep_trainer.agent.courier import Errand, line_of, raise_for
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.errors import CheckpointError


class CourierError(ConnectionError):
    """A courier can't be started, did not reach the other one, was cut off, or died."""


class Couriers:
    """At most ``at_once`` of them; who comes later waits."""

    def __init__(self, trust: Trust, at_once: int) -> None:
        self._command = (sys.executable, "-m", "lockstep_trainer.agent.courier", *trust.arguments)
        self._turns = asyncio.Semaphore(at_once)
        self._waiting: list[Process] = []

    async def carry(self, errand: Errand, on_port: Callable[[int], None] | None = None) -> None:
        """Until the errand has ended; ``on_port`` hears which port is listened on. Cancelled, the courier dies, and
        with it lock and connection.

        Raises CourierError, and CheckpointError for what is the snapshot's own trouble.
        """
        async with self._turns:
            process = self._waiting.pop() if self._waiting else await self._start()
            try:
                await _converse(process, errand, on_port)
            except CheckpointError:
                self._waiting.append(process)
                raise
            except BaseException as error:  # cancelled in the midst of it, cut off, or dead itself
                await _end(process)
                if isinstance(error, ConnectionError):
                    raise CourierError(str(error)) from None
                raise
            self._waiting.append(process)

    async def close(self) -> None:
        """End those that wait."""
        while self._waiting:
            await _end(self._waiting.pop())

    async def _start(self) -> Process:
        try:
            return await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE)
        except OSError as error:
            raise CourierError(f"no courier can be started: {error}") from error


async def _converse(process: Process, errand: Errand, on_port: Callable[[int], None] | None) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line_of(errand))
    while line := await process.stdout.readline():
        answer = json.loads(line)
        if "port" not in answer:
            raise_for(answer)
            return
        if on_port:
            on_port(answer["port"])
    raise ConnectionError(f"a courier ended with {await process.wait()}")


async def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
