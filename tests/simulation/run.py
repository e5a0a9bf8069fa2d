"""One seed: faults for a while, then the job must come back and make steps."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_api.messages import Stop
from simulation.clockwork import START
from simulation.faults import Faults
from simulation.invariants import Violation
from simulation.world import World

FAULT_SECONDS = 60.0
HEAL_SECONDS = 75.0
"""(d) Progress within this time once faults stop: two leader deadlines, and a start."""
STEADY_SECONDS = 5.0
KEPT_LAG = 8
"""Steps that the state which all keep may be behind in peace: an interval, and what a slow copy takes."""
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """What a seed did."""

    seed: int
    steps: int
    faults: int
    epoch: int
    generations: int


def run(seed: int, *, short: bool = False) -> Outcome:
    """Raises Violation. ``short`` jobs end during the faults, so that their end is tried too."""
    nodes = 2 + seed % 2
    every = None if seed % 3 == 0 else 6
    world = World(seed, nodes=nodes, gpus=1 + seed // 2 % 2, steps=60 if short else 10_000, every=every)
    faults = Faults(world, START + FAULT_SECONDS)
    invariants = world.invariants
    end = START + FAULT_SECONDS + HEAL_SECONDS
    try:
        world.clockwork.run(start_of_peace := START + FAULT_SECONDS + 0.001, lambda: invariants.finished is not None)
        looked_at = start_of_peace

        def healed() -> bool:
            """Looked at twice a second."""
            nonlocal looked_at
            if invariants.finished is not None:
                return True
            if short or world.clockwork.now - looked_at < 0.5:
                return False
            looked_at = world.clockwork.now
            return not _unhealed(world)

        world.clockwork.run(end, healed)
        if invariants.finished is None:
            if short:
                raise Violation(f"(d) no end: {invariants.steps} steps made, {world.store.newest} durable")
            if why := _unhealed(world):
                raise Violation(f"(d) {HEAL_SECONDS} s after the last fault: {why}")
            invariants.strangers()
            if seed % 4 == 0:
                _stop(world)
    except AssertionError as error:
        when = f"seed {seed}{' (short)' if short else ''} at {world.clockwork.now - START:.2f} s"
        raise Violation(f"{when}: {error}") from error
    return Outcome(seed, world.invariants.steps, faults.count, world.status["epoch"], len(invariants.starts))


def _unhealed(world: World) -> str | None:
    """What is not as it should be in peace, None: nothing."""
    invariants = world.invariants
    idle = world.clockwork.now - invariants.last_step_at
    if idle > STEADY_SECONDS:
        return f"no step for {idle:.1f} s"
    newest = world.store.newest
    numbered = world.plan.checkpoint_every is not None  # else the next one may be an hour away
    if newest is None or (numbered and newest.state.epoch != world.status["epoch"]):
        return f"nothing is durable in epoch {world.status['epoch']}: {newest}"
    kept = invariants.newest_kept
    if kept is None or kept.term.epoch != world.status["epoch"] or invariants.newest_step - kept.state.step > KEPT_LAG:
        return f"at step {invariants.newest_step} the newest that all keep is {kept}"
    return None


def _stop(world: World) -> None:
    """The operator ends the job: with a last checkpoint, where there is time for one."""
    invariants = world.invariants
    invariants.stop_at = 0 if invariants.corrupt else invariants.newest_step
    stop = Stop(world.plan.job_uid, world.status["epoch"], "suspended", seconds=STOP_SECONDS)
    world.operator.stopping = stop
    world.clockwork.run(world.clockwork.now + STOP_SECONDS + 15.0, lambda: invariants.finished is not None)
    if invariants.finished is None:
        raise Violation("(d) told to stop, and goes on")
