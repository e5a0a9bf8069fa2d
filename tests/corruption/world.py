"""Trials on the ranks of one layout, one after the other: each begins where the clean run begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from corruption.disputed import heard, inquire
from corruption.setting import Setting, batch_of, build
from corruption.struck import Between, Device, Recorded, Strike, strike_memory
from corruption.trial import Trial
from lockstep_api.messages import Doubt
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.agreement import from_all
from lockstep_trainer.batch import Batch
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.expert import update_balance
from lockstep_trainer.parallel.sharded import local_shard
from lockstep_trainer.replay.report import Replay
from lockstep_trainer.replay.ring import Disagreement, Ring
from lockstep_trainer.replay.sampling import Sampling

IN_MEMORY = ("shard", "optimizer", "sum")


class World:
    """One rank of it; all ranks call the same methods in the same order."""

    def __init__(self, setting: Setting, *, steps: int) -> None:
        """``steps`` of the clean run are kept to compare with."""
        self.setting, self.engine = setting, build(setting)
        self.rank, self._step, self._micro_batch = self.engine.meshes.rank, 0, 0
        self._injector = Recorded(self.engine.parts, self.rank)
        self._device = Device()
        self._between = Between(self.engine.parts) if setting.layout.tensor > 1 else None
        self._parameters = list(self.engine.named_parameters())
        self._kept = [each.detach().clone() for each in self._lasting()]
        self._batches = [batch_of(step, setting, self.rank) for step in range(steps + 1)]
        self._clean = self._train_cleanly(steps)
        self._injector.now = self._now
        self._injector.replaying = lambda: self._ring.replaying
        for struck in (self._device, self._between):
            if struck is not None:
                struck.now = self._now
        self._heard: list[Disagreement] = []
        self._trial: Trial | None = None
        self._ring = self._new_ring()
        self._calibrate()

    @property
    def points(self) -> int:
        """Tensors that this rank compares on a replayed step."""
        return len(self._ring._points)

    def run(self, trial: Trial) -> dict[str, Any]:
        """The trial; what happened on all ranks."""
        optimizer = self._begin(trial)
        harmed_at, equal = None, True
        for step in range(1, trial.bound + 1):
            self._step = step
            if step == _struck_at(trial):
                self._arm(trial, optimizer)
            self._replay.forward_backward(step, self._batch(step), self.setting.tokens)
            if trial.kind == "sum" and step == 1 and self._struck_here(trial):
                strike_memory(trial, self._parameters, optimizer)
            if trial.kind != "delay":
                differ = self._gradients() != self._clean[step][0]
                harmed_at = step if differ and harmed_at is None else harmed_at
            with self._replay.update(step, self._parameters, optimizer):
                optimizer.step()
                self._device.made(self._parameters)
            self._finish_step(optimizer)
            if trial.kind != "delay":
                equal = self._state(optimizer) == self._clean[step][1]
            if self._heard and trial.kind != "calibration":
                break
        return self._end(trial, harmed_at, equal)

    def with_spare(self, trial: Trial) -> dict[str, Any]:
        """The trial, with pods that are changed for a spare where nobody can say who is wrong. The bits at the end are
        those of the last generation, whose fault may have gone with its pod."""
        equal, strikes = False, list[list[Any]]()

        def train(doubt: Doubt | None, there: bool) -> tuple[Disagreement | None, int]:
            nonlocal equal
            optimizer = self._begin(trial, doubt)
            if there:
                self._arm(trial, optimizer)
            for step in range(1, trial.bound + 1):
                self._step = step
                self._replay.forward_backward(step, self._batch(step), self.setting.tokens)
                with self._replay.update(step, self._parameters, optimizer):
                    optimizer.step()
                self._finish_step(optimizer)
                equal = self._state(optimizer) == self._clean[step][1]
                if self._heard:
                    break
            strikes.extend([each.step, each.where, each.sampled] for each in self._injector.strikes)
            self._disarm()
            return (self._heard[0] if self._heard else None), self._step

        result = inquire(train, struck=trial.fault.rank, world_size=self.setting.layout.world_size)
        self._trial = None
        self._reset()
        self._renew(None)
        self._calibrate()
        all_ranks = from_all((equal, strikes), None)
        same = all(each for each, _ in all_ranks)
        return {
            "strikes": all_ranks[trial.fault.rank][1][:40],
            "heard": heard(result),
            "harmed_at": None if same else 1,
            "equal": same,
            "generations": result.generations,
            "aside": list(result.aside),
        }

    # --- a trial ------------------------------------------------------------------------------------------------

    def _begin(self, trial: Trial, doubt: Doubt | None = None) -> torch.optim.Optimizer:
        self._trial = trial
        self._heard.clear()
        self._reset()
        if trial.kind == "calibration" or doubt:
            self._renew(doubt)
        self._ring.sampling = Sampling(trial.fault.seed, trial.share)
        self._injector.may = {
            "unsampled": lambda strike: not strike.sampled,
            "other": lambda strike: strike.where == "other",
        }.get(trial.kind, lambda _: True)
        doubted = doubt.points if doubt else ()
        # It remembers nothing of the last trial.
        self._replay = Replay(self.engine, self._ring, report=self._hear, doubted=doubted)
        self._replay._updates.compute = self._device.updated
        return self._optimizer()

    def _arm(self, trial: Trial, optimizer: torch.optim.Optimizer) -> None:
        fault = trial.fault
        if trial.kind in IN_MEMORY:
            if trial.kind != "sum" and self._struck_here(trial):
                strike_memory(trial, self._parameters, optimizer)
        elif trial.kind == "between":
            assert self._between is not None
            self._between.fault = fault if self._struck_here(trial) else None
        elif trial.kind == "update":
            if self._struck_here(trial):
                self._device.break_down(fault)
        elif trial.kind == "everywhere":
            self._injector.arm([type(fault)(**{**asdict(fault), "rank": self.rank})])
        else:
            self._injector.arm([fault])

    def _struck_here(self, trial: Trial) -> bool:
        return trial.fault.rank == self.rank

    def _end(self, trial: Trial, harmed_at: int | None, equal: bool) -> dict[str, Any]:
        strikes, heard = self._injector.strikes + self._device.strikes, [_heard(each) for each in self._heard]
        if self._between is not None:
            strikes += self._between.strikes
        if trial.kind in IN_MEMORY and self._struck_here(trial):
            strikes.append(Strike(_struck_at(trial), "first", True))
        self._disarm()
        self._trial = None
        if trial.kind == "calibration":  # what it left out must not be left out for those that follow
            self._reset()
            self._renew(None)
            self._calibrate()
        all_ranks = from_all((harmed_at, equal, strikes), None)
        harmed = [each for each, _, _ in all_ranks if each is not None]
        return {
            "strikes": [[each.step, each.where, each.sampled] for each in all_ranks[trial.fault.rank][2]][:40],
            "heard": heard[:4],
            "harmed_at": min(harmed, default=None),
            "equal": all(each for _, each, _ in all_ranks),
        }

    def _disarm(self) -> None:
        self._injector.arm(())
        self._injector.strikes.clear()
        self._device.fault = None
        self._device.strikes.clear()
        if self._between is not None:
            self._between.fault = None
            self._between.strikes.clear()

    def _hear(self, found: Disagreement) -> None:
        """Where the unit is named, its rank is put aside, before the step is computed again."""
        self._heard.append(found)
        if self._trial is not None and self._trial.kind != "everywhere":
            unit = self._ring.units.unit(self._trial.fault.rank)
            if found.rejected and any(verdict.unit == unit for verdict in found.verdicts):
                self._injector.arm(())
                if self._between is not None:
                    self._between.fault = None

    # --- training -----------------------------------------------------------------------------------------------

    def _renew(self, doubt: Doubt | None) -> None:
        """As in a new generation."""
        self._ring._taps.close()
        self._ring = self._new_ring(doubt)

    def _new_ring(self, doubt: Doubt | None = None) -> Ring:
        doubted = doubt.points if doubt else ()
        sampling = Sampling(3, 1.0)
        ring = Ring(self.engine, None, sampling=sampling, compiled=False, report=self._hear, doubted=doubted)
        inner = self.engine.around

        @contextmanager
        def around(number: int) -> Iterator[None]:
            self._micro_batch = number
            with inner(number):
                yield

        self.engine.around = around
        return ring

    def _calibrate(self) -> None:
        self._ring.forward_backward(1, self._batches[1], self.setting.tokens)

    def _now(self) -> Strike:
        where = "replay" if self._ring.replaying else "first" if self._micro_batch == 0 else "other"
        return Strike(self._step, where, self._ring.includes(self._step))  # type: ignore[arg-type]

    def _batch(self, step: int) -> Batch:
        return self._batches[(step - 1) % (len(self._batches) - 1) + 1]

    def _train_cleanly(self, steps: int) -> list[tuple[str, str]]:
        """Fingerprints of gradients and of what is left behind, by step, of a run without replay."""
        optimizer = self._optimizer()
        clean = [("", "")]
        for step in range(1, steps + 1):
            self.engine.forward_backward(self._batch(step), self.setting.tokens)
            gradients = self._gradients()
            optimizer.step()
            self._finish_step(optimizer)
            clean.append((gradients, self._state(optimizer)))
        self._reset()
        return clean

    def _optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self._parameters, OptimizerSpec(lr=3e-3, eps=1e-6))

    def _finish_step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        update_balance(self.engine.parts, self.engine.meshes)

    def _lasting(self) -> list[Tensor]:
        buffers = [buffer for part in self.engine.parts for buffer in part.buffers()]
        return [local_shard(parameter) for _, parameter in self._parameters] + buffers

    @torch.no_grad()
    def _reset(self) -> None:
        for tensor, kept in zip(self._lasting(), self._kept, strict=True):
            tensor.copy_(kept)
        for _, parameter in self._parameters:
            parameter.grad = None
        torch.manual_seed(self.rank)

    def _gradients(self) -> str:
        return _fingerprint([parameter.grad for _, parameter in self._parameters if parameter.grad is not None])

    def _state(self, optimizer: torch.optim.Optimizer) -> str:
        state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
        return _fingerprint([*self._lasting(), *state])


def _fingerprint(tensors: Sequence[Tensor]) -> str:
    bits = hashlib.sha256()
    for tensor in tensors:
        bits.update(local_shard(tensor).detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def _heard(found: Disagreement) -> dict[str, Any]:
    verdicts = [
        {"kind": each.kind, "unit": each.unit, "ranks": list(each.ranks), "point": str(each.point)}
        for each in found.verdicts
    ]
    return {"step": found.step, "run": found.run, "rejected": found.rejected, "verdicts": verdicts}


def _struck_at(trial: Trial) -> int:
    """The step from which on the fault is there: what is held in memory is looked at behind the first."""
    return 2 if trial.kind in ("shard", "optimizer") else 1


def play(setting: Setting, trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    """The body of one rank: a world, and the trials in it."""
    world = World(setting, steps=max([trial.bound for trial in trials if trial.kind != "delay"], default=1))
    for trial in trials:
        dist.barrier()
        run = world.with_spare if trial.kind == "spare" else world.run
        yield {"name": trial.name, "trial": asdict(trial), **run(trial)}
