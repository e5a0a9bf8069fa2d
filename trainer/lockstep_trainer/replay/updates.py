"""Whether the optimizer's update is what other ranks make of the same numbers.

A rank alone updates its shards, so no comparison of gradients shows a wrong update: all units gather what came of it.
Before the update of a compared step the next unit's counterpart computes it too, from this rank's parameters, gradients
and moments, and digests of both results are compared; where they differ, arbiters compute it again, as they do micro-
batches (``compare``). Behind the update, what it really left is compared with what the rank had computed before it.

Only what AdamW updates, element by element: Muon's matrices and users' optimizers are passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.agreement import anywhere, from_all
from lockstep_trainer.optim.adamw import Pairs, adamw_groups, adamw_update, local_gradient
from lockstep_trainer.parallel.sharded import local_shard
from lockstep_trainer.replay.changed import changed_tensors, judge_changed, on_purpose
from lockstep_trainer.replay.compare import Difference, Pair, Verdict, all_pairs, arbiters, judge, undecided
from lockstep_trainer.replay.digest import digest
from lockstep_trainer.replay.known import Known
from lockstep_trainer.replay.neighbours import Neighbours
from lockstep_trainer.replay.points import Point, order

PIECE = 2**22
"""Elements that travel at once: 64 MiB of parameter, gradient and two moments in float32, and as much back."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Subject:
    """What an update takes, of one parameter."""

    name: str
    group: dict[str, Any]
    parameter: Tensor  # this rank's part, as the next three, flat and sharing its memory
    gradient: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor  # that the moments have seen

    def taken(self, start: int) -> Tensor:
        """A copy of PIECE elements of all four from ``start`` on, (4, elements)."""
        tensors = (self.parameter, self.gradient, self.first, self.second)
        return torch.stack([tensor[start : start + PIECE] for tensor in tensors])

    def left(self, start: int) -> Tensor:
        """A copy of what an update changes of these, (3, elements)."""
        return torch.stack([tensor[start : start + PIECE] for tensor in (self.parameter, self.first, self.second)])


class Updates:
    """One rank's look at its updates; all ranks call the same methods in the same order."""

    def __init__(self, neighbours: Neighbours, rank: int, control: dist.ProcessGroup | None, known: Known) -> None:
        """``control`` is a gloo group of the world; ``known`` is asked where comparing can't say who is wrong."""
        self._known = known
        self._neighbours, self._units, self._rank, self._control = neighbours, neighbours.units, rank, control
        self.compute: Callable[[Tensor, dict[str, Any], Tensor], Tensor] = updated
        """An attribute, so that a test's rank can compute wrong numbers."""
        self.looks = True
        """False: something speaks against comparing updates in this generation."""
        self._subjects: list[_Subject] = []
        self._expected = torch.empty(0)  # digests of what this rank's update must leave, (subjects,)

    def before(self, step: int, parameters: Pairs, optimizer: torch.optim.Optimizer) -> tuple[Verdict, ...]:
        """The optimizer's step ``step`` comes next, gradients are ready: compute it here and elsewhere. Verdicts on who
        did so wrongly; nothing that training uses is changed."""
        self._subjects = list(_subjects(parameters, optimizer)) if self.looks else []
        if not self._subjects:
            return ()
        own = self._expected = self._computed(0)
        vectors = [own, self._neighbours.shift(self._computed(1), -1)]
        if not anywhere((vectors[0] != vectors[1]).any()):
            return ()
        for distance in arbiters(self._units.number):
            vectors.append(self._neighbours.shift(self._computed(distance), -distance))
        verdicts = judge(self._units, from_all(self._differences(vectors), self._control), of="updates")
        if undecided(verdicts):
            if known := self._known.found():
                return known
            # Who is right can't be said, nor will it be at the next step: it may be a kernel that adds up otherwise.
            log.warning("step %d: this generation does not compare updates any more", step)
            self.looks = False
        return verdicts

    def after(self, step: int) -> tuple[Verdict, ...]:
        """The optimizer's step was made: verdicts on whose memory holds something else than it had computed before."""
        subjects, self._subjects = self._subjects, []
        if not subjects:
            return ()
        made = torch.stack([_digest([each.left(start) for start in _starts(each)], each) for each in subjects])
        changed = changed_tensors([each.name for each in subjects], made != self._expected, self._control)
        if on_purpose(changed):
            log.warning(
                "step %d: the optimizer's update is not what AdamW makes of the same numbers (%s): this generation "
                "does not compare updates any more", step, next(filter(None, changed))[0],
            )  # fmt: skip
            self.looks = False
            return ()
        return judge_changed(
            self._units, changed, phase="update", confidence=0.5,
            evidence=lambda rank, what: (
                f"rank {rank} computed the update of step {step} twice, and {what} had other bits"
            ),
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------------

    def _computed(self, distance: int) -> Tensor:
        """Compute the update of the unit ``distance`` before this one: digests by parameter, (parameters,) int64."""
        device = self._subjects[0].parameter.device
        own = torch.tensor([each.parameter.numel() for each in self._subjects], device=device)
        sizes = self._neighbours.shift(own, distance).tolist()
        return torch.stack([self._one(each, size, distance) for each, size in zip(self._subjects, sizes, strict=True)])

    def _one(self, subject: _Subject, size: int, distance: int) -> Tensor:
        made, own = [], subject.parameter.numel()
        for start in range(0, max(own, size), PIECE):
            mine = subject.taken(start) if start < own else None
            shape = (4, min(PIECE, size - start)) if start < size else None
            theirs = self._neighbours.exchange(mine, shape, distance, like=subject.parameter)
            if shape is not None:
                assert theirs is not None
                made.append(self.compute(theirs, subject.group, subject.steps))
        return _digest(made, subject)

    def _differences(self, vectors: Sequence[Tensor]) -> dict[Pair, Difference]:
        """By pair of computations, the first parameter that they disagree on."""
        stage, found = self._units.first_stage(self._rank), {}
        for pair in all_pairs(self._units.number):
            differ = (vectors[pair[0]] != vectors[pair[1]]).nonzero().flatten().tolist()
            if differ:
                point = Point(stage, "update", self._subjects[differ[0]].name, local=True)
                found[pair] = Difference(point, order(point, differ[0]))
        return found


@torch.no_grad()
def updated(taken: Tensor, group: dict[str, Any], steps: Tensor) -> Tensor:
    """What AdamW makes of parameter, gradient and moments, (4, elements), in place: parameter and moments, (3,
    elements)."""
    parameter, gradient, first, second = taken.unbind()
    adamw_update([parameter], [gradient], [first], [second], steps=[steps.clone()], group=group)
    return taken[[0, 2, 3]]


def _subjects(parameters: Pairs, optimizer: torch.optim.Optimizer) -> Iterator[_Subject]:
    groups = {parameter: group for group in adamw_groups(optimizer) for parameter in group["params"]}
    for name, parameter in parameters:
        group = groups.get(parameter)
        if group is None or parameter.grad is None:
            continue
        state = optimizer.state[parameter]
        tensors = [parameter, local_gradient(parameter), state["exp_avg"], state["exp_avg_sq"]]
        flat = [local_shard(tensor).detach().reshape(-1) for tensor in tensors]
        if len({tensor.dtype for tensor in flat}) == 1:
            yield _Subject(name, group, flat[0], flat[1], flat[2], flat[3], state["step"])


def _starts(subject: _Subject) -> range:
    return range(0, subject.parameter.numel(), PIECE)


def _digest(pieces: Sequence[Tensor], subject: _Subject) -> Tensor:
    """Of all pieces; 0 where there are none."""
    if not pieces:
        return torch.zeros((), dtype=torch.int64, device=subject.parameter.device)
    return digest(torch.stack([digest(piece) for piece in pieces]))
