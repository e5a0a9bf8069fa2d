"""How a worker leaves a generation and joins the next one in the same process.

What its agent says is in ``control``. To leave, a thread breaks the process groups off, so that the main thread comes
out of whatever collective it waits in; the worker drops model and groups, and says that it is idle.

A worker that lost a peer leaves by itself, and says so in ``idle.json`` before anybody has asked. What a worker keeps
from generation to generation: its process with everything imported, the device's context and allocator, the prepared
tokens and whatever caches torch has filled. One that does not come out in time is killed by its agent.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch

from lockstep_trainer.control import CONTROL, IDLE
from lockstep_trainer.errors import PeerLost
from lockstep_trainer.outbox import Outbox
from lockstep_trainer.position import is_communication
from lockstep_trainer.protocol.policy import PEER_LOST_EXIT
from lockstep_trainer.severing import Connections, Severing, ways
from lockstep_trainer.supervisor import read_json, stat_of, write_json

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 0.05
"""Between two tries to free the main thread: it may have been on its way into a collective."""
_STUCK_SECONDS = 1.0
"""A main thread that stays in one place for so long, in a collective that was broken off, never leaves it: where a
connection dies in the midst of a write, gloo (torch 2.13, 2.15) loses the operation."""
_ORPHAN_SECONDS = 1.0
"""Between two looks whether the pod still exists."""


class Left(PeerLost):
    """This worker was told to leave its generation."""


class Tenure:
    """The worker's part in one generation after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.connections = Connections()
        self._parents = {os.getppid(), _parent_of(os.getppid())}
        self._ways: tuple[Severing, ...] = (self.connections,)
        self._leaving = threading.Event()
        self._out = threading.Event()
        """The main thread is behind everything that can block."""
        self._told = threading.Condition()
        self._next: Path | None = None

    def meets(self, device: torch.device) -> None:
        """This generation's groups are on ``device``."""
        self._ways = ways(self.connections, device)

    @property
    def leaving(self) -> bool:
        """The generation is over."""
        return self._leaving.is_set()

    def check(self) -> None:
        """Raises Left once the generation is over. Called behind every collective whose result is used, and in loops
        that wait."""
        if self.leaving:
            raise Left(f"told to leave {self.folder.name}")

    def stand_still(self) -> NoReturn:
        """Do nothing until the generation is over; raises Left then."""
        self._leaving.wait()
        raise Left(f"told to leave {self.folder.name}")

    def control(self) -> None:
        """The agent has sent its signal; called in a thread of its own. Returns when the main thread is out."""
        said = read_json(self.folder / CONTROL) or {}
        if "join" in said:
            with self._told:
                folder = Path(said["join"])
                self._next = folder if folder != self.folder else None
                self._told.notify()
        elif said.get("leave"):
            self._leaving.set()  # before anything is broken off: whoever comes out of a collective must see it
            self._free_main_thread()

    def _free_main_thread(self) -> None:
        place: tuple[int, int] | None = None
        since = time.monotonic()
        while not self._out.is_set():
            for way in self._ways:
                way.sever()
            before, place = place, _collective_of(threading.main_thread())
            if place is None or place != before:
                since = time.monotonic()
            elif time.monotonic() - since > _STUCK_SECONDS:
                log.error(
                    "stuck in a collective of %s: this process ends, another one takes its place", self.folder.name
                )
                Outbox(self.folder).error("another worker went away, and a collective did not notice", user_error=False)
                os._exit(PEER_LOST_EXIT)
            self._out.wait(_AGAIN_SECONDS)

    def left(self) -> None:
        """The main thread is out of the generation, and holds nothing of it that can block."""
        self._out.set()

    def rest(self, error: str | None) -> Path | None:
        """Say that nothing of the generation goes on here (``error``: what made it leave unasked), and wait for the
        next one's folder. None where the pod has ended: nobody will come."""
        write_json(self.folder / IDLE, {"error": error, "at": time.time()})
        with self._told:
            while self._next is None:
                self._told.wait(_ORPHAN_SECONDS)
                if self._next is None and os.getppid() not in self._parents:
                    return None
            self.folder, self._next = self._next, None
        self.connections = Connections()
        self._ways = (self.connections,)
        self._leaving.clear()
        self._out.clear()
        return self.folder


def _collective_of(thread: threading.Thread) -> tuple[int, int] | None:
    """Where in torch's communication the thread is: frame and instruction. None: somewhere else."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None or not is_communication(frame):
        return None
    return id(frame), frame.f_lasti


def _parent_of(pid: int) -> int:
    with suppress(OSError, IndexError, ValueError):
        return int(stat_of(pid)[1])
    return 0
