"""One job of a campaign: strikes it, waits until it has gone on, and judges what it went on from."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from checker.folders import named, newest_whole, problems_of
from checker.stores import FolderObjects
from crash import damage
from crash.deal import Drawn
from crash.instants import SECTIONS, Place, require, seen
from crash.journal import Job, Round
from crash.strikes import ALL, Striker
from crash.witness import Restored, Witness
from integration.run import small
from localrun import LocalRun
from lockstep_api.v1alpha1 import TrainingJobStatus
from s3server import BUCKET, S3Server

STEPS = 500
"""Of a job, at most: a ring of step records holds 512."""
EVERY = 10
"""Steps between durable checkpoints."""
_START_SECONDS = 300
_RECOVERY_SECONDS = 300
_END_SECONDS = 600
"""Bounds that a busy machine keeps too; what does not come at all costs so long to find out."""
_RESTARTS_PER_KILL = 3
"""More is a loop: one restart for what was killed, the others for what that broke on the way back up."""


@dataclass
class Harm:
    """What is done to the store while all pods are dead."""

    store: Path
    damages: tuple[str, ...]
    dice: random.Random
    told: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # step folders
    newest: str | None = None  # whole one before it
    expected: str | None = None  # the same afterwards: nothing else may be restored

    def do(self) -> None:
        """Damage the newest states, but for the last whole one: without any a job is to fail, which is another test."""
        objects = FolderObjects(self.store)
        whole = [(folder, sha256) for folder, sha256 in named(objects) if not problems_of(objects, folder, sha256)]
        self.newest = whole[0][0]
        for (folder, sha256), kind in zip(whole[:-1], self.damages, strict=False):
            said = damage.KINDS[kind](self.store / folder, self.dice)
            assert problems_of(objects, folder, sha256), f"{folder} verifies although {said}"
            self.told.append(f"{folder}: {said}")
            self.damaged.append(folder)
        self.expected = newest_whole(objects)


def durable_step(status: TrainingJobStatus) -> int:
    """Step of the newest durable checkpoint; 0 without one."""
    return status.checkpoint.durable.step if status.checkpoint.durable else 0


def over(status: TrainingJobStatus) -> bool:
    """Whether the job has ended."""
    return status.phase is not None and status.phase.terminal


def undisturbed(folder: Path, steps: int) -> dict[int, float]:
    """Step → loss of the same two ranks when nothing breaks. They share a pod: one less to start, none to lose sight of
    the other on a busy machine."""
    settings = [*small.overrides(steps, EVERY), "nodes=1", "gpusPerNode=2"]
    with LocalRun(folder, settings) as run, Witness(run.state) as witness:
        result = run.finish(_END_SECONDS)
        assert result.code == 0, result.errors + run.output()
        assert result.status.restarts.total == 0
        return {step: loss for (_, step), loss in witness.look().losses.items()}


def local_run(folder: Path, server: S3Server, steps: int) -> LocalRun:
    """The job of a campaign."""
    settings = small.overrides(steps, EVERY)
    prefix = folder.name
    s3 = [
        f"checkpoint.uri=s3://{BUCKET}/{prefix}",
        f"checkpoint.s3.endpoint={server.endpoint}",
        "checkpoint.s3.pathStyle=true",
    ]
    return LocalRun(folder, [*settings, *s3], store=server.bucket / prefix, environment=server.credentials)


class Leg:
    """A job that runs."""

    def __init__(self, number: int, run: LocalRun, server: S3Server, witness: Witness, dice: random.Random) -> None:
        self._number, self._run, self._witness, self._dice = number, run, witness, dice
        self._begun = time.monotonic()
        run.until(lambda status: durable_step(status) >= 3 * EVERY, _START_SECONDS, "checkpoints to fall back to")
        self.objects = FolderObjects(run.run_store)
        place = Place(run.state / "pods", run.run_store, server.bucket)
        journaled = {name for step in run.journal().steps for name in step.sections}
        self.files = seen(place)
        """Instants that were seen up to here: those that can be aimed at."""
        self.sections = tuple(name for name in SECTIONS if name in journaled)
        """The same of workers' sections."""
        require(self.files, self.sections)
        self._striker = Striker(run, server, place, lambda: over(run.status))
        self._damaged: set[str] = set()
        self._judged = len(witness.look().restored)
        self._said = 0

    def play(self, number: int, drawn: Drawn) -> Round | None:
        """Strike, wait until the job has gone on, judge; None where there was nothing left to strike.

        Raises AssertionError for whatever must not be.
        """
        run, begun = self._run, time.monotonic()
        before = run.status
        harm = Harm(run.run_store, drawn.damages, self._dice)
        kills = [kill for strike in drawn.strikes if (kill := self._striker.strike(strike, harm.do)) is not None]
        if not kills:
            return None
        self._damaged.update(harm.damaged)
        struck = time.monotonic()
        # Of the workers' own records: the status may lag behind the checkpoints of before the strike.
        step = max(self._witness.newest(), run.status.progress.step)
        goal = step + 2 * EVERY
        after = run.until(
            lambda status: over(status) or durable_step(status) >= goal,
            _RECOVERY_SECONDS, f"round {number}, {kills}, {harm.told}: a durable checkpoint at step {goal}",
        )  # fmt: skip
        restored = self._new_restores()
        self._judge(restored, harm)
        restarts = after.restarts.total - before.restarts.total
        most = _RESTARTS_PER_KILL * sum(2 if kill.part == ALL else 1 for kill in kills)
        assert restarts <= most, f"{restarts} restarts after {kills}: it loops\n{run.output()}"
        problems = self._witness.look().problems
        new, self._said = problems[self._said :], len(problems)
        return Round(
            number=number,
            job=self._number,
            kills=tuple(kills),
            damaged=tuple(harm.told),
            step=step,
            restored=tuple(restored),
            fallbacks=sum(_fell_back(each, harm if each is restored[0] else None) for each in restored),
            problems=tuple(dict.fromkeys(new)),
            restarts=restarts,
            aiming=round(struck - begun, 2),
            seconds=round(time.monotonic() - struck, 2),
        )

    def finish(self, reference: dict[int, float]) -> Job:
        """Let the job go to its end, and compare all of it with the run that nobody disturbed."""
        result = self._run.finish(_END_SECONDS)
        assert result.code == 0, f"{result.errors}\n{self._run.output()}"
        self._judge(self._new_restores(), Harm(self._run.run_store, (), self._dice))
        verdict = self._run.check(len(reference))
        assert verdict.exact, verdict
        seen = self._witness.look()
        assert seen.lost == 0, "step records were lost to the witness"
        assert {step for _, step in seen.losses} == set(reference), "a step was never seen"
        # Of every generation, whether its steps stayed or were done again: bitwise.
        wrong = {place: loss for place, loss in seen.losses.items() if loss != reference[place[1]]}
        assert not wrong, f"other losses than those of the undisturbed run: {wrong}"
        terms = len({term for term, _ in seen.losses})
        return Job(
            self._number,
            len(reference),
            str(verdict),
            len(seen.losses),
            terms,
            round(time.monotonic() - self._begun, 1),
        )

    def _new_restores(self) -> list[Restored]:
        restored = self._witness.look().restored
        new, self._judged = restored[self._judged :], len(restored)
        return new

    def _judge(self, restored: list[Restored], harm: Harm) -> None:
        """What was restored from the store must verify by an independent reader; and behind a blackout it must be the
        newest state that does."""
        for each in restored:
            if each.source == "memory":
                assert harm.newest is None or each is not restored[0], f"{each}: nothing was left in memory"
                continue
            assert each.folder, f"{each}: a job with durable checkpoints started anew"
            assert each.folder not in self._damaged, f"{each}: a damaged checkpoint was accepted"
            assert not (wrong := problems_of(self.objects, each.folder)), f"{each}: {wrong}"
        if harm.newest is not None and restored:
            assert restored[0].folder == harm.expected, f"{restored[0]} instead of {harm.expected}; {harm.told}"
        assert harm.newest is None or restored or over(self._run.status), "nothing was restored after a blackout"


def _fell_back(restored: Restored, harm: Harm | None) -> bool:
    """Whether a restore met a damaged checkpoint: its leader by the manifest, or it by a file."""
    passed_over = harm is not None and harm.newest not in (None, restored.folder)
    return restored.source == "store" and (passed_over or restored.folder != restored.ordered)
