"""What each rank does: rounds of steps and saves, then rounds of restores. All ranks take the same turns."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.supervisor import descendants

from .lockstep import Lockstep, Transfer
from .store import Server, cpu_seconds
from .torchsave import AsyncSave, Bucket, PlainSave, is_there
from .training import Size, Training


class System(Protocol):
    """Something that saves."""

    name: str
    first_saves: int  # that make memory, plans or processes for the later ones
    durable_at: float | None

    def begin(self, number: int) -> None: ...

    def wait(self) -> None: ...

    def done(self) -> bool: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one run."""

    size: Size
    rounds: int
    baseline_steps: int
    threads: int  # that s3torchconnector's writer has on each rank
    seed: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything is."""

    server: Server
    run: Path  # run folder of the pod, in memory
    fetched: Path  # of a pod that has no snapshots yet, in memory
    agent: int  # its process id
    result: Path  # rank 0 writes what it found there


@dataclass(frozen=True, slots=True)
class Save:
    """One save and the steps around it. Seconds; CPU seconds of all ranks, their children and the agent."""

    system: str
    round: int  # 0: those that make memory, plans and processes for the later ones
    blocked: float  # the most of any rank
    blocked_cpu: float  # CPU seconds of the loop's thread in that time: on a busy machine the steadier number
    waited: float  # of that before the optimizer, the most of any rank
    durable: float
    wall: float  # from the boundary to the end of the step in which all ranks saw it durable
    steps: int  # in that time
    cpu: float  # in that time
    server_cpu: float  # in that time
    step: float  # one without a save, the mean of those just before
    step_cpu: float


class Rounds:
    """One rank."""

    def __init__(self, settings: Settings, place: Place, line: Connection | None) -> None:
        """``line`` to the agent: rank 0's."""
        self._settings, self._place, self._line = settings, place, line
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._control = dist.new_group()
        self._training = Training(settings.size, self._rank, self._ranks)
        self._lockstep = Lockstep(self._training, place.run, place.server, line)
        self._peers: list[AsyncSave | PlainSave] = []
        if is_there():
            bucket = Bucket(place.server, settings.threads)
            self._peers = [
                AsyncSave(self._training, bucket, "thread"),
                AsyncSave(self._training, bucket, "process"),
                PlainSave(self._training, bucket),
            ]
        self._systems: list[System] = [self._lockstep, Transfer(self._lockstep, line), *self._peers]
        self._number = 0

    def run(self) -> None:
        """All of it; rank 0 writes the result."""
        saves, costs = self._saves()
        restores = self._restores()
        for system in self._systems:
            system.close()
        if self._rank == 0:
            result = {
                "bytes_per_rank": self._lockstep.planned.plan.size,
                "planning": self._lockstep.planning,
                "saves": [asdict(save) for save in saves],
                "lockstep_costs": costs,
                "restores": restores,
            }
            self._place.result.write_text(json.dumps(result))

    # --- saves ------------------------------------------------------------------------------------------------------

    def _saves(self) -> tuple[list[Save], list[tuple[float, float]]]:
        """The saves, and what Lockstep's snapshots cost by its own count: seconds blocked, and until whole."""
        turns = [(system, 0) for system in self._systems for _ in range(system.first_saves)]
        dice = random.Random(self._settings.seed)  # the same on all ranks
        for number in range(1, self._settings.rounds + 1):
            turns += [(system, number) for system in dice.sample(self._systems, len(self._systems))]
        for _ in range(2):
            self._training.step(lambda: None, lambda: True)
        found, costs = [], []
        for system, number in turns:
            found.append(self._save(system, number))
            if system is self._lockstep and number and self._lockstep.cost is not None:
                costs.append((self._lockstep.cost.blocked, self._lockstep.cost.whole))
            if self._rank == 0:
                print(found[-1], flush=True)
                self._place.server.drop_data()
            dist.barrier(group=self._control)
        return found, costs

    def _save(self, system: System, in_round: int) -> Save:
        steps = self._settings.baseline_steps
        cpu, begun = self._cpu(), self._now()
        for _ in range(steps):
            self._training.step(lambda: None, lambda: True)
        between, now = self._cpu(), self._now()
        step, step_cpu = (now - begun) / steps, (between[0] - cpu[0]) / steps
        self._number += 1
        cpu, begun = self._cpu(), self._now()
        thread = time.thread_time()
        system.begin(self._number)
        blocked, blocked_cpu = time.perf_counter() - begun, time.thread_time() - thread
        waited, over = self._training.step(system.wait, system.done)
        blocked += waited
        count = 1
        while not over:
            _, over = self._training.step(_nothing, system.done)
            count += 1
        wall = self._now() - begun
        used = self._cpu()
        durable = system.durable_at - begun if system.durable_at is not None else 0.0
        return Save(
            system.name,
            in_round,
            self._most(blocked),
            self._most(blocked_cpu),
            self._most(waited),
            self._most(durable),
            wall,
            count,
            used[0] - cpu[0],
            used[1] - cpu[1],
            step,
            step_cpu,
        )

    # --- restores ---------------------------------------------------------------------------------------------------

    def _restores(self) -> dict[str, list[float]]:
        """Seconds of each way back, of the same state, and of transfers that nothing runs beside."""
        for system in (self._lockstep, *self._peers):
            self._number += 1
            system.begin(self._number)
            system.wait()
            system.finish()
        state = self._lockstep.newest
        assert state is not None
        found: dict[str, list[float]] = {}

        def ask(what: str) -> Any:
            assert self._line is not None
            self._line.send((what, state))
            return self._line.recv()

        def note(name: str, seconds: float) -> None:
            found.setdefault(name, []).append(seconds)

        def raw_put() -> None:
            if self._rank == 0:
                begun, ended = ask("raw")
                note("raw put", ended - begun)

        def buddy_copy() -> None:
            if self._rank == 0:
                note("copy to the buddy", ask("copy"))

        ways: dict[str, Callable[[], None]] = {
            "Lockstep, own memory": self._lockstep.from_memory,
            "Lockstep, buddy": lambda: self._lockstep.from_buddy(lambda: ask("fetch"), self._place.fetched),
            "Lockstep, S3": self._lockstep.restore,
            **{f"{peer.name}, dcp.load": peer.restore for peer in self._peers},
        }
        targets = self._training.tensors()
        before = [tensor.clone() for tensor in targets]
        buffers = [bytearray(file.size) for file in self._lockstep.planned.plan.files]
        ways["raw get"] = lambda: self._raw_get(buffers)
        dist.barrier(group=self._control)
        buddy_copy()
        dice = random.Random(self._settings.seed)
        for number in range(self._settings.rounds + 1):  # the first one makes clients and connections
            for name in dice.sample(sorted(ways), len(ways)):
                for tensor in targets:
                    if name != "raw get":
                        tensor.zero_()
                begun = self._now()
                ways[name]()
                seconds = self._now() - begun
                if number:
                    note(name, seconds)
                self._check(name, targets, before)
            raw_put()
            dist.barrier(group=self._control)
        return found

    def _raw_get(self, buffers: list[bytearray]) -> None:
        """The bytes that this rank has written, by the same client, with no work besides."""
        folder = f"lockstep/job/uid/{_folder(self._lockstep)}"
        store = self._place.server.store()
        for file, buffer in zip(self._lockstep.planned.plan.files, buffers, strict=True):
            if store.get_into(f"{folder}/{file.name}", 0, memoryview(buffer)) != file.size:
                raise RuntimeError(f"{file.name} is not whole")

    def _check(self, name: str, found: list[Tensor], right: list[Tensor]) -> None:
        if not all(torch.equal(one, other) for one, other in zip(found, right, strict=True)):
            raise RuntimeError(f"{name} restored another state")

    # ----------------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        """An instant at which all ranks are here."""
        dist.barrier(group=self._control)
        return time.perf_counter()

    def _cpu(self) -> tuple[float, float]:
        """CPU seconds of all ranks, their children and the agent; and of the server."""
        own = cpu_seconds(os.getpid(), *descendants(os.getpid()))
        total = torch.tensor([own], dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return float(total) + cpu_seconds(self._place.agent), cpu_seconds(self._place.server.pid)

    def _most(self, seconds: float) -> float:
        most = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._control)
        return float(most)


def _nothing() -> None:
    pass


def _folder(lockstep: Lockstep) -> str:
    state = lockstep.newest
    assert state is not None
    return f"step-{state.step}-e{state.epoch}-g{state.generation}"
