"""What a rank finds in its own memory: tensors whose bits are not those that it had there, or computed, before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.agreement import anywhere, from_all
from lockstep_trainer.replay.compare import Verdict
from lockstep_trainer.replay.points import Phase, Point
from lockstep_trainer.replay.units import Units


def changed_tensors(
    names: Sequence[str], differ: Tensor, control: dist.ProcessGroup | None
) -> Sequence[tuple[str, ...]]:
    """All ranks': the names of those that changed, by rank; empty where none did on any. ``differ``: which of this
    rank's ``names`` did, (names,) bool; ``control`` is a gloo group of the world."""
    if not anywhere(differ.any()):
        return ()
    return from_all(tuple(compress(names, differ.tolist())), control)


def on_purpose(changed: Sequence[Sequence[str]]) -> bool:
    """Whether software did it: memory does not fail on more than half of the ranks at once, while a callback, or an
    optimizer that trades weights for an evaluation, does the same on all."""
    return 2 * sum(map(bool, changed)) > len(changed)


def judge_changed(
    units: Units,
    changed: Sequence[Sequence[str]],
    *,
    phase: Phase,
    confidence: float,
    evidence: Callable[[int, str], str],
) -> tuple[Verdict, ...]:
    """A verdict on each rank of which something has changed. Pure. ``evidence`` makes its sentence of the rank and of
    what changed there."""
    verdicts = []
    for rank, names in enumerate(changed):
        if names:
            what = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
            point = Point(units.first_stage(rank), phase, names[0], local=True)
            verdicts.append(Verdict("intermittent", units.unit(rank), (rank,), point, confidence, evidence(rank, what)))
    return tuple(verdicts)
