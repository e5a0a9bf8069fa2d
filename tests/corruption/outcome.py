"""What a trial came to. Pure: records as a world yields them, and counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from corruption.trial import HELD, LAYOUTS, SLOW, Kind
from lockstep_trainer.injection.bitflips import Site
from lockstep_trainer.replay.units import Units

Located = Literal["rank", "stage", "undecided", "wrong"]
"""rank: the one that was struck, alone. stage: several of its unit, it among them. undecided: ranks of more than one
unit, it among them. wrong: somebody else."""
Reason = Literal["no strike", "no change", "unsampled", "other", "memory", "everywhere", "missed"]
"""Why it was not found. no strike: it never came to it. no change: gradients have the bits of the clean run, in replays
too nothing differs. unsampled, other: it struck only on steps that were not replayed, only in micro-batches that were
not. memory: a sum in memory; everywhere: all units computed with the same wrong numbers. missed: none of these."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trial, judged."""

    name: str
    layout: str
    kind: Kind
    site: Site
    bit: int
    rate: float
    share: float
    units: int
    found: bool
    steps: int
    """Until it was found, counted from the trial's first; 0 where it was not."""
    delay: int
    """Steps between its first strike and the find."""
    located: Located | None
    verdict: str
    """The kind of the first."""
    in_time: bool
    """Found before a step that it had changed was accepted. What memory holds is found, but the step goes on."""
    harmed: bool
    """A step that it had changed was accepted."""
    equal: bool
    """At the end, parameters, optimizer and buffers have the bits of the clean run on all ranks."""
    reason: Reason | None
    """Where it was not found."""


def outcome(record: Mapping[str, Any]) -> Outcome:
    """Of a world's record."""
    trial, heard, strikes = record["trial"], record["heard"], record["strikes"]
    fault, kind = trial["fault"], trial["kind"]
    layout = (SLOW if trial["layout"] == "delay" else LAYOUTS[trial["layout"]]).layout
    harmed_at = record["harmed_at"]
    heard = sorted(heard, key=lambda each: not _one_named(each)) if kind in HELD else heard
    steps = heard[0]["step"] if heard else 0
    first = strikes[0][0] if strikes else steps
    return Outcome(
        record["name"],
        trial["layout"],
        kind,
        fault["site"],
        fault["bit"],
        fault["rate"],
        trial["share"],
        Units(layout).number,
        bool(heard),
        steps,
        max(0, steps - first),
        _located(heard[0]["verdicts"], fault["rank"], Units(layout)) if heard else None,
        heard[0]["verdicts"][0]["kind"] if heard and heard[0]["verdicts"] else "",
        bool(heard) and kind not in HELD and (harmed_at is None or harmed_at > steps),
        harmed_at is not None,
        record["equal"],
        None if heard else _reason(kind, strikes, harmed=harmed_at is not None or not record["equal"]),
    )


def _one_named(found: Mapping[str, Any]) -> bool:
    """With copies of the shards, computations are in doubt before a rank's own memory is looked at."""
    return all(len(verdict["ranks"]) == 1 for verdict in found["verdicts"])


def _located(verdicts: list[Mapping[str, Any]], rank: int, units: Units) -> Located:
    named = [set(verdict["ranks"]) for verdict in verdicts]
    if any(rank not in ranks for ranks in named) or not named:
        return "wrong"
    if all(ranks == {rank} for ranks in named):
        return "rank"
    inside = set(units.ranks(units.unit(rank)))
    return "stage" if all(ranks <= inside for ranks in named) else "undecided"


def _reason(kind: Kind, strikes: list[list[Any]], *, harmed: bool) -> Reason:
    if not strikes:
        return "no strike"
    if kind == "sum":
        return "memory" if harmed else "no change"
    if kind == "everywhere":
        return "everywhere"
    if not harmed:
        return "no change"
    if not any(sampled for _, _, sampled in strikes):
        return "unsampled"
    if all(where == "other" for _, where, sampled in strikes if sampled):
        return "other"
    return "missed"


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of some outcomes."""

    trials: int
    found: int
    located: Mapping[str, int]
    in_time: int
    """Found before a step that was changed was accepted."""
    equal: int
    """Of these, with the clean run's bits at the end."""
    reasons: Mapping[str, int]

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Tally:
        """Count them."""
        each = list(outcomes)
        in_time = [one for one in each if one.in_time]
        return cls(
            len(each),
            sum(one.found for one in each),
            dict(Counter(one.located for one in each if one.located is not None)),
            len(in_time),
            sum(one.equal for one in in_time),
            dict(Counter(one.reason for one in each if one.reason is not None)),
        )

    @property
    def within_reach(self) -> int:
        """Those that struck what is compared and changed something."""
        return self.found + self.reasons.get("missed", 0)


def expected_delay(rate: float, share: float) -> float:
    """Steps until a fault that spoils ``rate`` of a rank's micro-batches is found, of which ``share`` is replayed.

    On a replayed step the rank takes part in two comparisons, of its own first micro-batch and of the one that it
    replays; either shows it. The step is found after 1 / (share × (1 − (1 − rate)²)) steps on average: between
    1 / (2 × rate × share), for a rare fault, and 1 / (rate × share), for one that is always there.
    """
    return 1 / (share * (1 - (1 - rate) ** 2))


def mean_and_error(values: list[int]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))
