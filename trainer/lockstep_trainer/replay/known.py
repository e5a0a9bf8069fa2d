"""Computations of known numbers, where comparing units can't say who is wrong.

Two units that differ and each repeat themselves leave a rank of either in doubt, and one unit alone repeats whatever
its hardware always does wrong. So every rank computes the same few things from the same numbers: sound devices of one
kind come to the same bits, and who does not is named, whatever else its unit holds. A rank that had other bits when the
generation began is named too, where there are too few to outvote it.

A fault that these numbers and shapes do not meet is not found by them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.agreement import from_all
from lockstep_trainer.optim.adamw import adamw_update
from lockstep_trainer.replay.compare import Verdict
from lockstep_trainer.replay.digest import digest
from lockstep_trainer.replay.points import Point
from lockstep_trainer.replay.units import Units

SIDE = {"cuda": 4096, "cpu": 192}
"""Rows and columns of the matrices: enough of them that each of a GPU's processors has its part."""
REPEATS = 3
"""How often each is computed: a device that is wrong now and then does not repeat itself."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What one rank came to."""

    device: str
    """Its kind: others may round otherwise."""
    now: Mapping[str, tuple[int, ...]]
    """Computation → digests of all repeats."""
    then: Mapping[str, tuple[int, ...]]
    """When the generation began; empty: nothing was computed then."""

    def repeats(self, name: str) -> bool:
        """All repeats gave the same, then and now."""
        return len({*self.now[name], *self.then.get(name, ())}) == 1


class Known:
    """One rank's; all ranks call the same methods in the same order."""

    def __init__(
        self, units: Units, control: dist.ProcessGroup | None, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """``control`` is a gloo group of the world; ``dtype`` is that of the model's products."""
        self._units, self._control, self._device, self._dtype = units, control, device, dtype
        self._then: Mapping[str, tuple[int, ...]] = {}
        self.compute: Callable[[Callable[[], Tensor]], Tensor] = lambda work: work()
        """An attribute, so that a test's rank can compute wrong numbers."""

    def remember(self) -> None:
        """The generation begins: what this rank comes to now. Only this rank's matter."""
        self._then = self._answers()

    def found(self) -> tuple[Verdict, ...]:
        """Verdicts on ranks that come to other bits than others, or than they did."""
        own = Answers(_kind(self._device), self._answers(), self._then)
        return judge_known(self._units, from_all(own, self._control))

    @torch.no_grad()
    def _answers(self) -> dict[str, tuple[int, ...]]:
        made = {
            name: torch.stack([digest(self.compute(work)) for _ in range(REPEATS)])
            for name, work in _works(self._device, self._dtype).items()
        }
        return {name: tuple(digests.tolist()) for name, digests in made.items()}


def judge_known(units: Units, answers: Sequence[Answers]) -> tuple[Verdict, ...]:
    """Verdicts from all ranks' answers, by rank. Pure.

    A rank is wrong that does not repeat itself, or is outvoted by more than half of the ranks with a device of its
    kind. Where nobody has that many, nobody is.
    """
    usual: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for each in answers:
        for name, digests in each.now.items():
            usual[each.device, name][digests[0]] += 1
    verdicts = []
    for rank, each in enumerate(answers):
        for name, digests in each.now.items():
            votes = usual[each.device, name]
            ((most, count),) = votes.most_common(1)
            outvoted = digests[0] != most and 2 * count > votes.total()
            if outvoted or not each.repeats(name):
                verdicts.append(_verdict(units, rank, name, each, count if outvoted else 0))
                break
    return tuple(verdicts)


def _verdict(units: Units, rank: int, name: str, answers: Answers, others: int) -> Verdict:
    always = len(set(answers.now[name])) == 1
    if others:
        how = f"to other bits than {others} ranks with a device of its kind"
    else:
        how = "to other bits than when the generation began" if always else "and does not repeat itself"
    evidence = f"rank {rank} computes a {name} of known numbers {how}"
    point = Point(units.first_stage(rank), "check", name, local=True)
    return Verdict("permanent" if always else "intermittent", units.unit(rank), (rank,), point, 1.0, evidence)


def _works(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """What a model's blocks consist of, on numbers that are the same everywhere."""
    side = SIDE.get(device.type, SIDE["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    return {
        "product": lambda: a @ b,
        "product of transposed matrices": lambda: a.T @ b.T,
        "softmax": lambda: a.float().softmax(-1),
        "sum": lambda: a.float().sum(0),
        "update": lambda: _update(a, b),
    }


def _update(a: Tensor, b: Tensor) -> Tensor:
    """AdamW's, by its own kernel."""
    parameter, gradient, first, second = 2 * a.float(), b.float(), 0.1 * a.float(), b.float().square()
    group = {"betas": (0.9, 0.95), "lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8}
    steps = torch.full((), 10.0, device=a.device)
    adamw_update([parameter], [gradient], [first], [second], steps=[steps], group=group)
    return torch.stack([parameter, first, second])


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith("model name")), device.type)
