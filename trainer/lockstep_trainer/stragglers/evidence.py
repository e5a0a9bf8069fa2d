"""Findings with their sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep_trainer.stragglers.hardware import Clock, Reading
from lockstep_trainer.stragglers.work import Cause, Finding


@dataclass(frozen=True, slots=True)
class Seen:
    """What all findings have."""

    ranks: tuple[int, ...]
    since: int
    excess: float
    """Logarithm of a ratio where a part of the work takes longer; a share of a step's work for host and data."""
    cost: float
    node: str = ""


def device(seen: Seen, cause: Cause, reading: Reading, clock: Clock | None) -> Finding:
    """A device that computes slowly."""
    told = "" if clock is None else f", clock {_percent(1 - math.exp(-max(clock.now, clock.lately, 0.0)))} lower"
    return _finding(
        cause,
        seen,
        math.expm1(seen.excess),
        f"{_named(seen.ranks)} on {seen.node} computed {math.exp(seen.excess):.2f} times as long as peers for as much "
        f"work; probed: {_probed(reading)}{told}.",
    )


def host(seen: Seen, reading: Reading) -> Finding:
    """A host that is late."""
    return _finding(
        Cause.HOST,
        seen,
        seen.excess,
        f"The host of {_named(seen.ranks)} on {seen.node} was late for {_percent(seen.excess)} of a step's work, more "
        f"than peers' hosts; the device is not slow: {_probed(reading)}.",
    )


def network(seen: Seen, pairs: float) -> Finding:
    """A slow link; ``pairs`` is the logarithm of the probe's ratio."""
    return _finding(
        Cause.NETWORK,
        seen,
        math.expm1(seen.excess),
        f"Transfers of the groups of {_named(seen.ranks)} on {seen.node} took {math.exp(seen.excess):.2f} times as "
        f"long as usual; probed: {math.exp(pairs):.2f} times as long as other pairs, with each partner.",
    )


def data(seen: Seen, *, everyone: bool = False) -> Finding:
    """Batches come late: to the ranks that were seen, and where there are none, to ``everyone`` at once or by turns."""
    nobody = "All ranks at once" if everyone else "Now one rank, now another"
    who = _named(seen.ranks) if seen.ranks else nobody
    return _finding(
        Cause.DATA,
        seen,
        seen.excess,
        f"{who} waited for batches for {_percent(seen.excess)} of a step's work; look at the storage of the data, or "
        "give the loader more workers and a longer queue.",
    )


def lengths(seen: Seen) -> Finding:
    """Longer documents."""
    return _finding(
        Cause.LENGTHS,
        seen,
        math.expm1(seen.excess),
        f"{_named(seen.ranks)} got documents that take {math.exp(seen.excess):.2f} times as long as peers' for their "
        "lengths alone; mix long and short documents within each batch, or balance batches by the sum of squared "
        "lengths.",
    )


def stage(seen: Seen, number: int) -> Finding:
    """A stage with more to do."""
    return _finding(
        Cause.PIPELINE,
        seen,
        math.expm1(seen.excess),
        f"Pipeline stage {number} computes {math.exp(seen.excess):.2f} times as long as the other stages, whichever "
        "rank computes it, and no device of it is slow; give it fewer layers.",
    )


def pauses(seen: Seen) -> Finding:
    """Garbage collection and the like."""
    return _finding(
        Cause.PAUSES,
        seen,
        seen.excess,
        f"Hosts stood still now and then, no rank more often than others; all waited, {_percent(seen.excess)} of a "
        "step's work on average.",
    )


def _finding(cause: Cause, seen: Seen, slowdown: float, sentence: str) -> Finding:
    return Finding(cause, seen.ranks, seen.since, slowdown, seen.cost, sentence)


def _probed(reading: Reading) -> str:
    return f"matrix product {math.exp(reading.product):.2f} times, memory copy {math.exp(reading.copy):.2f} times"


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"Rank {ranks[0]}"
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"Ranks {shown}" if len(ranks) <= 8 else f"Ranks {shown} and {len(ranks) - 8} more"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
