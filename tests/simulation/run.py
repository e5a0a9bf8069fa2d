"""One seed: faults for a while, then the job must come back and make steps."""

from __future__ import annotations

from dataclasses import dataclass

from simulation.clockwork import START
from simulation.faults import Faults
from simulation.invariants import Violation
from simulation.world import World

FAULT_SECONDS = 90.0
HEAL_SECONDS = 75.0
"""(d) Progress within this time once faults stop: two leader deadlines, and a start."""
STEADY_SECONDS = 5.0


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
    world = World(seed, nodes=nodes, gpus=1 + seed // 2 % 2, steps=60 if short else 10_000)
    faults = Faults(world, START + FAULT_SECONDS)
    end = START + FAULT_SECONDS + HEAL_SECONDS
    try:
        world.clockwork.run(end, lambda: world.invariants.finished is not None)
        if world.invariants.finished is None:
            if short:
                raise Violation(f"(d) no end: {world.invariants.steps} steps made, {world.store.newest} durable")
            idle = world.clockwork.now - world.invariants.last_step_at
            if idle > STEADY_SECONDS:
                raise Violation(f"(d) no step for {idle:.1f} s, {HEAL_SECONDS} s after the last fault")
            newest = world.store.newest
            if newest is None or newest.state.epoch != world.status["epoch"]:
                raise Violation(f"(d) nothing is durable in epoch {world.status['epoch']}: {newest}")
            world.invariants.strangers()
    except AssertionError as error:
        when = f"seed {seed}{' (short)' if short else ''} at {world.clockwork.now - START:.2f} s"
        raise Violation(f"{when}: {error}") from error
    return Outcome(seed, world.invariants.steps, faults.count, world.status["epoch"], len(world.invariants.starts))
