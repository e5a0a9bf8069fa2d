"""One seed: faults for a while, then the job must come back and make steps."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_api.messages import Stop
from simulation.clockwork import START
from simulation.faults import Faults
from simulation.invariants import Violation
from simulation.workers import STEP_SECONDS
from simulation.world import World, outages, widths

FAULTS = 10
"""In the mean, before everything heals."""
PAUSES = (1.0, 1.5, 1.0, 2.0, 1.0, 1.5, 3.0)
"""Seconds between two of them in the mean, by seed: some hit what the last one has left, some what has recovered."""
OUTAGE_PAUSE, WIDTHS_PAUSE = 10.0, 4.0
HEAL_SECONDS = 75.0
"""(d) Progress within this time once faults stop: two leader deadlines, and a start."""
STEADY_SECONDS = 5.0
KEPT_LAG = 8
"""Steps that the state which all keep may be behind in peace: an interval, and what a slow copy takes."""
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """What a seed did."""

    seed: int
    steps: int
    faults: int
    epoch: int
    generations: int
    rollbacks: int = 0
    """Of wrong numbers that were found, and who computed them put aside."""


def run(seed: int, *, short: bool = False) -> Outcome:
    """Raises Violation. ``short`` jobs end during the faults, so that their end is tried too."""
    nodes = 2 + seed % 2
    every = None if seed % 3 == 0 or (widths(seed) and seed % 3 == 1) else 6  # memory is far ahead of the store
    pause = OUTAGE_PAUSE if outages(seed) else WIDTHS_PAUSE if widths(seed) else PAUSES[seed % len(PAUSES)]
    storm = FAULTS * pause
    steps = int(storm / STEP_SECONDS / 2) if short else 10_000
    world = World(seed, nodes=nodes, gpus=1 + seed // 2 % 2, steps=steps, every=every)
    faults = Faults(world, pause, START + storm)
    invariants, clockwork = world.invariants, world.clockwork
    try:
        clockwork.run(START + storm + 0.001)
        end = clockwork.now + HEAL_SECONDS
        while not clockwork.over and clockwork.now < end:
            if not short and _unhealed(world) is None:
                break
            clockwork.run(min(end, clockwork.now + LOOK_SECONDS))
        if not clockwork.over:
            if short:
                raise Violation(f"(d) no end: {invariants.steps} steps made, {world.store.newest} durable")
            if why := _unhealed(world):
                raise Violation(f"(d) {HEAL_SECONDS} s after the last fault: {why}")
            invariants.strangers()
            if seed % 4 == 0:
                _stop(world)
            elif seed % 4 == 1:
                _goes_on(world)
    except AssertionError as error:
        when = f"seed {seed}{' (short)' if short else ''} at {clockwork.now - START:.2f} s"
        raise Violation(f"{when}: {error}") from error
    epoch, generations, rollbacks = world.status["epoch"], len(invariants.starts), len(invariants.cuts)
    return Outcome(seed, invariants.steps, faults.count, epoch, generations, rollbacks)


def _unhealed(world: World) -> str | None:
    """What is not as it should be in peace, None: nothing."""
    invariants = world.invariants
    for info in world.status["slots"].values():
        pod = world.pods[info.pod]
        if not (pod.exists and pod.powered and pod.boot_id == info.boot_id):
            return f"slot {info.slot} is still given to {pod.name}, which is gone"
    if world.workers.broken(invariants.newest_step_term):
        return f"the workers of {invariants.newest_step_term} are broken, and nobody has noticed"
    if len(world.status["slots"]) < world.plan.nodes:
        return f"only {len(world.status['slots'])} of {world.plan.nodes} nodes train"
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
    # A new operator begins an epoch of its own before it says anything: that takes back steps which nobody keeps.
    anew = world.operator.sent is None
    if world.seed % 8 == 0 or anew:  # what all keep reaches the store even if nobody makes another step
        invariants.stop_at = min(invariants.stop_at, invariants.newest_kept.state.step if invariants.newest_kept else 0)
    if world.seed % 8 == 0:
        victims = [worker for pod in world.current_pods() for worker in pod.workers if worker.alive]
        world.clockwork.after(world.clockwork.between(0.0, 2.0), lambda: world.workers.end(victims[0], -9))
    stop = Stop(world.plan.job_uid, world.status["epoch"], "suspended", seconds=STOP_SECONDS)
    world.operator.stopping = stop
    world.clockwork.run(world.clockwork.now + STOP_SECONDS + 15.0)
    if invariants.finished is None:
        raise Violation("(d) told to stop, and goes on")


def _goes_on(world: World) -> None:
    """Once is not enough: in peace states are kept and made durable again and again."""
    invariants, store, clockwork = world.invariants, world.store, world.clockwork
    kept, durable, end = invariants.newest_kept, store.newest, clockwork.now + HEAL_SECONDS
    assert kept is not None
    stale: str | None = "nothing was looked at"
    while stale and clockwork.now < end:
        clockwork.run(clockwork.now + LOOK_SECONDS)
        newer = invariants.newest_kept
        if newer is None or newer.state.step <= kept.state.step:
            stale = f"{kept.state} is still the newest that all keep"
        elif world.plan.checkpoint_every is not None and store.newest == durable:
            stale = f"{durable} is still the newest durable state"
        else:
            stale = _unhealed(world)
    if stale:
        raise Violation(f"(d) {HEAL_SECONDS} s of peace after all was well, and {stale}")
