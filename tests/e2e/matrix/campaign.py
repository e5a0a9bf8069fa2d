"""Plays the cases of one topology: one after another to one job, and to the next one where that has come to its end."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from awaited import eventually
from demonstration.target import DemoError, Target
from e2e.matrix import judge
from e2e.matrix.deal import Case
from e2e.matrix.faults import FAULTS, Fault
from e2e.matrix.grounds import NothingThereError
from e2e.matrix.leg import Leg, operators_are_ready
from e2e.matrix.moments import PHASES, Phase, moment
from e2e.matrix.strikes import PATIENCE, Scene
from e2e.matrix.topologies import Topology
from lockstep_api.v1alpha1 import TrainingJob

ROOM = 120
"""Steps that a job must have left for one more fault: some are done while a recovery is being watched."""
QUIET_STEPS = 25
"""Steps without a restart behind a fault that must cost none."""
CALM_STEPS = 5
"""Between two faults."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is done, when, and what decides the rest."""

    fault: Fault
    phase: Phase
    dice: random.Random


class Campaign:
    """The cases of one topology."""

    def __init__(self, target: Target, topology: Topology, seed: int, folder: Path) -> None:
        self._target, self._topology, self._seed, self._folder = target, topology, seed, folder
        self._reference: dict[int, float] | None = None
        self._legs = 0
        self._leg: Leg | None = None
        self._told: list[str] = []
        self.finished = 0
        """Jobs that came to their end and were compared."""

    def play(self, case: Case) -> str:
        """Break one thing, see that the job goes on as it may, put the cluster right. Raises AssertionError with the
        whole story where it does not; the next case then has a job of its own."""
        plan = _Plan(FAULTS[case.fault], PHASES[case.phase], random.Random(f"{self._seed} {case}"))
        self._told = [f"{case}, seed {self._seed}"]
        leg = self._with_room()
        begun = time.monotonic()
        try:
            self._play(leg, plan)
        except (AssertionError, DemoError, NothingThereError) as error:
            story = "\n".join([*self._told, "", str(error), "", leg.job.story()])
            self._drop()
            raise AssertionError(story) from error
        except BaseException:
            self._drop()
            raise
        self._say(f"done after {time.monotonic() - begun:.1f} s")
        return "\n".join(self._told)

    def _play(self, leg: Leg, plan: _Plan) -> None:
        calm = leg.job.job.status.progress.step + CALM_STEPS
        before = leg.job.until(
            lambda j: (
                j.status.phase == "Running"
                and j.status.progress.step >= calm
                and j.status.checkpoint.durable is not None  # without one a lost store is waited for
            ),
            PATIENCE,
            "calm",
        )
        with ExitStack() as mending:
            self._strike(leg, plan, before, mending)
            after = self._recovered(leg, plan, before)
            self._say(f"step {after.status.progress.step}: it trains again; the cluster is put right")
        leg.put_right()
        eventually(lambda: operators_are_ready(self._target), "all operators", 120)
        goal = min(leg.job.job.status.progress.step + CALM_STEPS, leg.topology.steps)
        quiet = leg.job.until_step(goal, PATIENCE)
        self._say(f"step {quiet.status.progress.step}, restarts {quiet.status.restarts.total}")
        found = judge.problems(before, quiet, plan.fault, plan.phase)
        assert not found, "\n".join(found)

    def _strike(self, leg: Leg, plan: _Plan, before: TrainingJob, mending: ExitStack) -> None:
        """At the instant; where what is to be broken is not there in it, at the next one that has it."""
        for last in (False, False, True):
            with moment(plan.phase, leg.grounds, plan.dice, self._say) as now:
                missed = "" if now.hit else ", which is not what was aimed at"
                self._say(f"{plan.phase.name}: {now.what}{missed}")
                scene = Scene(leg.job, leg.cluster, leg.grounds, plan.dice, before, now, mending, self._say)
                try:
                    plan.fault.strike(scene)
                    break
                except NothingThereError as error:
                    if last:
                        raise
                    self._say(f"{error}: once more")
            leg.job.until(lambda j: j.status.phase == "Running", PATIENCE, "Running")

    def _recovered(self, leg: Leg, plan: _Plan, before: TrainingJob) -> TrainingJob:
        fault, phase = plan.fault, plan.phase
        steps = leg.topology.steps
        if fault.silent and not phase.recovers:
            return leg.job.until_step(min(before.status.progress.step + QUIET_STEPS, steps), PATIENCE)
        if fault.silent:
            leg.job.until(lambda j: j.status.restarts.total > before.status.restarts.total, PATIENCE, "a restart")
            after = leg.job.until(lambda j: j.status.phase == "Running", PATIENCE, "Running")
        else:
            after = leg.job.until(
                lambda j: judge.recovered(before, j, fault), PATIENCE, f"one of {fault.causes}, and what it has cost"
            )
        return leg.job.until_step(min(after.status.progress.step + 2, steps), PATIENCE)

    def _with_room(self) -> Leg:
        """The job, or the next one."""
        if self._reference is None:
            name, folder = f"matrix-{self._topology.name}", self._folder / "reference"
            with Leg(self._target, self._topology.together(), name, folder) as leg:
                self._reference = leg.run_undisturbed()
        if self._leg is not None and self._leg.left < ROOM:
            self.finish()
        if self._leg is None:
            self._legs += 1
            name = f"matrix-{self._topology.name}-{self._legs}"
            leg = Leg(self._target, self._topology, name, self._folder / str(self._legs))
            self._leg = leg.__enter__()
        return self._leg

    def finish(self) -> None:
        """The job that runs comes to its end, and is compared with the undisturbed one."""
        if self._leg is None:
            return
        assert self._reference is not None
        try:
            self._leg.finish(self._reference)
            self.finished += 1
        except AssertionError as error:
            raise AssertionError(f"{error}\n\n{self._leg.job.story()}") from error
        finally:
            self._drop()

    def close(self) -> None:
        """Take away what is left."""
        self._drop()

    def _drop(self) -> None:
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.__exit__()

    def _say(self, line: str) -> None:
        stamp = time.strftime("%H:%M:%S", time.gmtime())
        self._told.append(f"{stamp} {line}")
        print(f"{stamp} {line}", flush=True)
