"""What a soak showed: judged, as JSON and as a table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from soak.campaign import Plan, Soaked
from soak.deck import KINDS
from soak.readings import ROLES, Reading
from soak.slopes import Growth, Slope, slope

LIMITS = {"memory": 1.0, "descriptors": 1.0, "threads": 1.0}
"""What may be added in ten minutes: MB, and whole ones."""
SHORT_LIMITS = {"memory": 1.0, "descriptors": 20.0, "threads": 20.0}
"""Where there are minutes only, in which pools of threads and of connections fill: four connections more behind the
last of three faults are 12 by this measure. One for each fault would be 40."""
SHORT = 10.0  # minutes


@dataclass(frozen=True, slots=True)
class Judged:
    """How one thing of one part grows."""

    role: str
    value: str
    limit: float
    slope: Slope | None
    growth: Growth


def judge(readings: Iterable[Reading], plan: Plan) -> list[Judged]:
    """Each part and value beside its limit. A process that gets another duty counts as another one from there on."""
    lines: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for reading in readings:
        for value in LIMITS:
            lines[reading.role, value][f"{reading.process} {reading.duty}"].append(
                (reading.at, float(getattr(reading, value)))
            )
    judged = []
    for role in ROLES:
        for value, limit in limits(plan).items():
            found = slope(lines[role, value], warm_up=warm_up(plan), block=block(plan))
            judged.append(Judged(role, value, limit, found, found.beside(limit) if found else Growth.UNKNOWN))
    return judged


def limits(plan: Plan) -> dict[str, float]:
    """What may be added in ten minutes."""
    return SHORT_LIMITS if plan.minutes < SHORT else LIMITS


def warm_up(plan: Plan) -> float:
    """Seconds of each process, and of each of its duties, that do not count: a quarter of the soak, at most half an
    hour. Heaps and pools fill in the first twenty minutes of faults, and stay."""
    return min(1800.0, plan.minutes * 60 / 4)


def block(plan: Plan) -> float:
    """Seconds that readings are averaged over: a minute, in a short soak less."""
    return min(60.0, plan.minutes * 60 / 12)


def problems(soaked: Soaked, judged: Iterable[Judged]) -> list[str]:
    """What must not be, in sentences."""
    found = [] if soaked.checked.exact else [str(soaked.checked)]
    for each in judged:
        if each.growth == Growth.GROWS and each.slope:
            found.append(f"{each.value} of the {each.role} grow: {_slope(each.slope)} in ten minutes")
    for name in ("cgroups", "mounts"):
        before, after = getattr(soaked.before, name), getattr(soaked.after, name)
        if after > before:
            found.append(f"{after - before} {name} are left on the nodes without the job's pods")
    return found


def result(soaked: Soaked, judged: Iterable[Judged]) -> dict[str, Any]:
    """All of it, rounded."""
    status = soaked.ended.status
    struck = [blow for blow in soaked.blows if not blow.missed]
    judged = list(judged)
    recovered = [sum(line["seconds"].values()) for line in soaked.recoveries]
    return {
        "seed": soaked.plan.seed,
        "minutes": round(soaked.seconds / 60, 1),
        "steps": soaked.plan.steps,
        "step_seconds": soaked.plan.step_seconds,
        "faults": len(struck),
        "seconds_between_faults": round(soaked.seconds / max(1, len(struck)), 1),
        "by_kind": {kind: count for kind in KINDS if (count := Counter(blow.kind for blow in struck)[kind])},
        "missed": len(soaked.blows) - len(struck),
        "ended": status.phase,
        "restarts": {name: count for name, count in status.restarts.model_dump().items() if count},
        "recoveries": len(recovered),
        "recovery_seconds_median": round(median(recovered), 2) if recovered else None,
        "steps_done_again": soaked.checked.recomputed,
        "goodput": round(status.goodput, 4) if status.goodput is not None else None,
        "ledger": {name: round(seconds, 1) for name, seconds in status.ledger.items() if seconds},
        "checked": str(soaked.checked),
        "warm_up_seconds": warm_up(soaked.plan),
        "spared": asdict(soaked.spared),
        "growth_in_ten_minutes": [_growth(each) for each in judged],
        "nodes": {
            name: {"before": getattr(soaked.before, name), "after": getattr(soaked.after, name)}
            for name in ("cgroups", "mounts")
        },
        "problems": problems(soaked, judged),
    }


def _growth(each: Judged) -> dict[str, Any]:
    one: dict[str, Any] = {"part": each.role, "value": each.value, "limit": each.limit, "verdict": each.growth}
    if each.slope:
        one |= {
            "slope": round(each.slope.per_ten_minutes, 3),
            "uncertainty": round(each.slope.uncertainty, 3),
            "processes": each.slope.processes,
            "longest_minutes": round(each.slope.longest / 60, 1),
        }
    return one


def _slope(found: Slope) -> str:
    return f"{found.per_ten_minutes:+.2f} ± {found.uncertainty:.2f}"


def table(shown: dict[str, Any]) -> Table:
    """The sums, for a screen."""
    rows = Table("", "", title=f"{shown['minutes']} minutes, {shown['faults']} faults, seed {shown['seed']}")
    for name in ("by_kind", "missed", "ended", "restarts", "recoveries", "recovery_seconds_median", "steps_done_again",
                 "goodput", "ledger", "checked", "nodes", "problems"):  # fmt: skip
        value = shown[name]
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {one}" for key, one in value.items())
        rows.add_row(name.replace("_", " "), str(value))
    for each in shown["growth_in_ten_minutes"]:
        slope = f"{each['slope']:+} ± {each['uncertainty']}, {each['processes']} processes, " if "slope" in each else ""
        longest = f"the longest {each['longest_minutes']} min" if "slope" in each else "nothing lived long enough"
        rows.add_row(f"{each['value']} of the {each['part']}", f"{each['verdict']}: {slope}{longest}")
    return rows
