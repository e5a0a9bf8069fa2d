"""Ring replay in the training loop: what is replayed, compared, rejected and run again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.agreement import anywhere, from_all
from lockstep_trainer.batch import Batch
from lockstep_trainer.errors import UserError
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.sharded import local_shard
from lockstep_trainer.replay.compare import (
    Difference,
    Differences,
    Pair,
    Verdict,
    all_pairs,
    arbiters,
    judge,
    undecided,
)
from lockstep_trainer.replay.copies import judge_copies
from lockstep_trainer.replay.digest import digest
from lockstep_trainer.replay.effects import Effects, set_random_state
from lockstep_trainer.replay.known import Known
from lockstep_trainer.replay.neighbours import Neighbours
from lockstep_trainer.replay.points import Point, order
from lockstep_trainer.replay.sampling import Sampling
from lockstep_trainer.replay.taps import Digests, Taps
from lockstep_trainer.replay.units import Units

RUNS = 3
"""How often a step is computed at most. Where nobody is wrong now and then only, the second run is the last: it finds
what the first found."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """What a replayed step found."""

    step: int
    run: int
    """Which computation of the step it was, the first is 1."""
    verdicts: tuple[Verdict, ...]
    """Those of the run before where it is the last."""
    calibration: bool
    """At a generation's first step, and none of what was doubted before."""
    rejected: bool
    """The step is computed again. False: it was the last run, whose result counts although units disagree."""


class Ring:
    """Replays steps of an engine; every rank of the job calls the same methods in the same order.

    The first step of a generation is always replayed, to calibrate: from the first point on that units compute to other
    bits, with nobody to blame, points are not compared in this generation. Those that are doubted are all the same.
    """

    def __init__(
        self,
        engine: Engine,
        control: dist.ProcessGroup | None,
        *,
        sampling: Sampling,
        compiled: bool,
        report: Callable[[Disagreement], None],
        doubted: tuple[str, ...] = (),
    ) -> None:
        """``control`` is a gloo group of the world; ``report`` is called on every rank; ``doubted``: points that are
        compared whatever the first step shows. Gathers each parameter once."""
        self._engine, self._control, self._report, self._doubted = engine, control, report, frozenset(doubted)
        self.units = Units(engine.layout)
        self.neighbours = Neighbours(self.units, engine.meshes.rank, engine.device)
        self.known = Known(self.units, control, device=engine.device, dtype=engine.dtype)
        self.sampling = sampling
        stages = engine.layout.stages_of(engine.meshes.at.pipeline)
        self._taps = Taps(engine.parts, stages, engine.layout, compiled=compiled)
        engine.around = self._taps.micro_batch
        self.replaying = False
        self.agreed: int | None = None
        """The last step on which all units agreed at once."""
        self._points: tuple[Point, ...] = ()  # as they come on this rank; empty until the generation's first step
        self._excluded: dict[Pair, set[Point]] = {}

    def includes(self, step: int) -> bool:
        """Whether ``step`` is to be computed by ``forward_backward`` here and not by the engine alone."""
        return not self._points or self.sampling.includes(step)

    def forward_backward(self, step: int, batch: Batch, denominator: Tensor | int) -> Tensor:
        """``Engine.forward_backward`` with a replay, and again where units disagree. What is left behind is bitwise
        what the engine alone leaves."""
        engine = self._engine
        calibration = not self._points
        verdicts: tuple[Verdict, ...] = ()
        for run in range(1, RUNS + 1):
            before = Effects.before(engine.parts, engine.device)
            piece = engine.first_micro_batch(batch)
            with engine.section("replay"):
                replayed = self._compute_again(piece, denominator, before, distance=1)
            with self._taps.recording() as found:
                sums = engine.forward_backward(batch, denominator)
            with engine.section("replay"):
                self._know(found)
                own = self._vector(found)
                theirs = self.neighbours.shift(self._vector(replayed), -1)
                if not anywhere(self._differ(own, theirs, (0, 1)).any()):
                    self.agreed = step if run == 1 else self.agreed
                    return sums
            if run == RUNS or _lasts(verdicts):
                self._report(Disagreement(step, run, verdicts, calibration, rejected=False))
                return sums
            with engine.section("arbiter"):
                for _, parameter in engine.named_parameters():
                    parameter.grad = None
                before.restore()
                vectors = [own, theirs]
                for distance in arbiters(self.units.number):
                    again = self._vector(self._compute_again(piece, denominator, before, distance=distance))
                    vectors.append(self.neighbours.shift(again, -distance))
                verdicts, calibration = self._judge(step, vectors, calibration=calibration)
            self._report(Disagreement(step, run, verdicts, calibration, rejected=True))
        raise AssertionError("the last run returns")

    # --- the ring -----------------------------------------------------------------------------------------------

    def _compute_again(self, piece: Batch, denominator: Tensor | int, before: Effects, *, distance: int) -> Digests:
        """Compute the first micro-batch of the unit ``distance`` before this one; nothing of it stays."""
        theirs = self._shift_batch(piece, distance)
        set_random_state(self.neighbours.shift(before.random, distance), self._engine.device)
        self.replaying = True
        try:
            with self._taps.dropping(), self._taps.recording() as found:
                self._engine.compute_again(theirs, denominator)
        finally:
            self.replaying = False
            before.restore()
        return found

    def _shift_batch(self, piece: Batch, distance: int) -> Batch:
        fields = [piece.inputs, piece.targets]
        if piece.positions is not None and piece.documents is not None:
            fields += [piece.positions, piece.documents]
        return Batch(*self.neighbours.shift(torch.stack(fields), distance).unbind())

    # --- points -------------------------------------------------------------------------------------------------

    def _know(self, found: Digests) -> None:
        """In a generation's first step: which points there are. Raises UserError where units have not the same."""
        if self._points:
            return
        names = "\n".join(repr(point) for point in _sorted(found))
        mine = int.from_bytes(hashlib.blake2b(names.encode(), digest_size=8).digest(), "little", signed=True)
        theirs = self.neighbours.shift(torch.tensor([mine], device=self._engine.device), -1)
        if anywhere(theirs[0] != mine):
            raise UserError(
                "resilience.corruption: what the model computes depends on its data, so that ranks can't be compared; "
                "set action to Off"
            )
        self._points = tuple(found)
        if not self.units.outvote:
            self.known.remember()

    def _vector(self, found: Digests) -> Tensor:
        """Digests in an order that all units share, (points,) int64; 0 where one is missing."""
        missing = torch.zeros((), dtype=torch.int64, device=self._engine.device)
        return torch.stack([found.get(point, missing) for point in _sorted(self._points or found)])

    def _differ(self, mine: Tensor, theirs: Tensor, pair: Pair) -> Tensor:
        """(points,) bool, where they are compared."""
        excluded = self._excluded.get(pair, ())
        compared = torch.tensor([point not in excluded for point in _sorted(self._points)], device=mine.device)
        return (mine != theirs) & compared

    # --- verdicts -----------------------------------------------------------------------------------------------

    def _judge(self, step: int, vectors: Sequence[Tensor], *, calibration: bool) -> tuple[tuple[Verdict, ...], bool]:
        """Find out who is wrong, from all computations of this unit's micro-batch; and whether it is the calibration's
        after all: where a doubted point differs it is not."""
        points = {
            pair: self._which(self._differ(vectors[pair[0]], vectors[pair[1]], pair))
            for pair in all_pairs(self.units.number)
        }
        own = {pair: _earliest(self._points, differ) for pair, differ in points.items() if differ}
        copies = judge_copies(self.units, from_all(self._own_parameters(), self._control))
        found = from_all(own, self._control)
        verdicts = copies or judge(self.units, found)
        if not copies and undecided(verdicts):
            verdicts = self.known.found() or verdicts
        calibration = calibration and not self._again(points)
        if calibration and not copies and undecided(verdicts):
            self._leave_out(found)
        else:
            self.sampling = replace(self.sampling, suspected_at=step)
        for verdict in verdicts:
            log.warning("step %d: %s", step, verdict.evidence)
        return verdicts, calibration

    def _leave_out(self, found: Sequence[Differences]) -> None:
        """Compare no more what was computed from other bits: that it came to the same this time says nothing of the
        next."""
        mine = self.units.ranks(self.units.unit(self._engine.meshes.rank))
        for pair in all_pairs(self.units.number):
            first = min((found[rank][pair].order for rank in mine if pair in found[rank]), default=None)
            if first is None:
                continue
            later = {point for at, point in enumerate(self._points) if order(point, at) >= first}
            self._excluded.setdefault(pair, set()).update(point for point in later if str(point) not in self._doubted)

    def _again(self, points: Mapping[Pair, set[Point]]) -> bool:
        """Whether a doubted point differs on a rank of the world."""
        if not self._doubted:
            return False
        differ = any(str(point) in self._doubted for found in points.values() for point in found)
        return anywhere(torch.tensor(differ, device=self._engine.device))

    def _own_parameters(self) -> int:
        """A digest of this rank's shards; 0 where nobody has a copy of them."""
        if self._engine.layout.replicate == 1:
            return 0
        digests = [digest(local_shard(parameter)) for _, parameter in self._engine.named_parameters()]
        return hash(tuple(torch.stack(digests).tolist()))  # of integers: the same in all processes

    def _which(self, differ: Tensor) -> set[Point]:
        return {point for point, wrong in zip(_sorted(self._points), differ.tolist(), strict=True) if wrong}


def _lasts(verdicts: Sequence[Verdict]) -> bool:
    """Another run would find the same."""
    return bool(verdicts) and all(verdict.kind != "intermittent" for verdict in verdicts)


def _sorted(points: Sequence[Point] | Digests) -> list[Point]:
    return sorted(points, key=lambda point: (point.stage, point.phase, point.name, point.local))


def _earliest(points: Sequence[Point], differ: set[Point]) -> Difference:
    placed = (Difference(point, order(point, at)) for at, point in enumerate(points) if point in differ)
    return min(placed, key=lambda difference: difference.order)
