"""What a campaign comes to: sums for the results' file, and tables for the terminal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.table import Table

from corruption.kept import Kept
from corruption.outcome import Outcome, Tally, expected_delay, mean_and_error, outcome
from corruption.trial import HELD

DEFAULT_SHARE = 0.0025


def outcomes(kept: Kept) -> list[Outcome]:
    """Of all trials."""
    return [outcome(record) for record in kept.all("trial")]


def by(each: Iterable[Outcome], key: Callable[[Outcome], str]) -> dict[str, Tally]:
    """Key → counts, in the order in which they come."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for one in each:
        groups[key(one)].append(one)
    return {name: Tally.of(group) for name, group in groups.items()}


def within_reach(kept: Kept) -> list[Outcome]:
    """On steps that were all replayed."""
    return [one for one in outcomes(kept) if one.kind == "sampled"]


def beyond(kept: Kept) -> dict[str, Tally]:
    """Kind and layout of what is out of reach, or barely → counts."""
    rest = [one for one in outcomes(kept) if one.kind not in ("sampled", "spare", "delay", *HELD)]
    return by(sorted(rest, key=lambda one: one.kind), lambda one: f"{one.kind} {one.layout}")


def held(kept: Kept) -> dict[str, Tally]:
    """Kind and layout of what ranks hold in memory, and of updates → counts."""
    rest = [one for one in outcomes(kept) if one.kind in HELD]
    return by(sorted(rest, key=lambda one: one.kind), lambda one: f"{one.kind} {one.layout}")


def with_spare(kept: Kept) -> dict[str, Tally]:
    """Layout → counts of what a spare was to decide; and how many restarts it took."""
    return by([one for one in outcomes(kept) if one.kind == "spare"], lambda one: one.layout)


def restarts(kept: Kept) -> dict[str, int]:
    """Restarts until somebody was named → trials with a spare."""
    found = Counter(record["generations"] - 1 for record in kept.all("trial") if record["trial"]["kind"] == "spare")
    return {str(number): found[number] for number in sorted(found)}


def curves(kept: Kept) -> list[dict[str, Any]]:
    """Steps until a fault is found, by share and rate, computed and virtual, beside the formula."""
    steps: dict[tuple[str, float, float], list[int]] = defaultdict(list)
    for record in kept.all("virtual"):
        steps["virtual", record["share"], record["rate"]] += record["steps"]
    for one in outcomes(kept):
        if one.kind == "delay" and one.found:
            steps["computed", one.share, one.rate].append(one.steps)
    found = []
    for (how, share, rate), values in sorted(steps.items()):
        mean, error = mean_and_error(values)
        expected = round(expected_delay(rate, share), 1)
        numbers = {"trials": len(values), "mean": round(mean, 1), "error": round(error, 1), "formula": expected}
        found.append({"how": how, "share": share, "rate": rate, **numbers, "median": median(values)})
    return found


def without_faults(kept: Kept) -> dict[str, dict[str, int]]:
    """Layout → steps, compared tensors, steps in which something was found."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: {"steps": 0, "compared": 0, "false": 0})
    for record in kept.all("clean"):
        for layout in (record["layout"], "all"):
            sums[layout]["steps"] += record["steps"]
            sums[layout]["compared"] += record["points"]
            sums[layout]["false"] += len(record["found"])
    return dict(sums)


def cost(kept: Kept) -> dict[str, Any] | None:
    """CPU time of forward and backward over that without replay, of each round; None where none was measured."""
    records = kept.all("cost")
    if not records:
        return None
    idle = [record["unsampled"] / record["off"] for record in records]
    replayed = [record["replayed"] / record["off"] for record in records]
    # What a job pays: hooks on each step, and a replay on some.
    default = [a + DEFAULT_SHARE * (b - a) for a, b in zip(idle, replayed, strict=True)]

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": round(median(values), 4), "lowest": round(min(values), 4), "highest": round(max(values), 4)}

    seconds = round(median(record["off"] for record in records), 3)
    ratios = {"unsampled": spread(idle), "replayed": spread(replayed), "default": spread(default)}
    return {"rounds": len(records), "seconds_off": seconds, **ratios}


def summary(kept: Kept) -> dict[str, Any]:
    """As it is kept."""
    each = within_reach(kept)

    def grouped(key: Callable[[Outcome], str]) -> dict[str, Any]:
        return {name: asdict(tally) for name, tally in by(each, key).items()}

    return {
        "injections": sum(one.kind != "delay" for one in outcomes(kept)),
        "sampled": asdict(Tally.of(each)),
        "layouts": grouped(lambda one: one.layout),
        "sites": grouped(lambda one: one.site),
        "rates": grouped(lambda one: f"{one.rate:g}"),
        "verdicts": grouped(lambda one: f"{one.layout} {_rate(one.rate)}"),
        "held": {name: asdict(tally) for name, tally in held(kept).items()},
        "spare": {name: asdict(tally) for name, tally in with_spare(kept).items()},
        "spare_restarts": restarts(kept),
        "beyond": {name: asdict(tally) for name, tally in beyond(kept).items()},
        "not_as_expected": [asdict(one) for one in outcomes(kept) if strange(one)],
        "delays": curves(kept),
        "clean": without_faults(kept),
        "cost": cost(kept),
    }


def strange(one: Outcome) -> bool:
    """Worth a look: missed, somebody else named, or found in time and yet other bits at the end."""
    return one.reason == "missed" or one.located == "wrong" or (one.in_time and not one.equal)


def tables(kept: Kept) -> list[Table]:
    """For the terminal: of what was done."""
    each = within_reach(kept)
    found = [
        _table(
            "On steps that are all replayed, by layout",
            by(each, lambda one: one.layout),
            Tally.of(each) if each else None,
        ),
        _table("By site", by(each, lambda one: one.site)),
        _table("By rate", by(each, lambda one: f"{one.rate:g}")),
        _table("In memory, and in updates", held(kept)),
        _table("Two units and a spare", with_spare(kept)),
        _table("Out of reach, or barely", beyond(kept)),
    ]
    delays = Table(title="Steps until found")
    for name in ("", "share", "rate", "trials", "mean", "± error", "formula", "median"):
        delays.add_column(name, justify="right")
    for row in curves(kept):
        names = ("how", "share", "rate", "trials", "mean", "error", "formula", "median")
        delays.add_row(*(str(row[name]) for name in names))
    rest = Table(title="Without faults, and cost")
    rest.add_column("")
    rest.add_column("")
    for layout, numbers in without_faults(kept).items():
        rest.add_row(layout, str(numbers))
    if measured := cost(kept):
        rest.add_row("cost", str(measured))
    return [table for table in (*found, delays, rest) if table.row_count]


def _rate(rate: float) -> str:
    return "permanent" if rate == 1 else "intermittent"


def _table(title: str, rows: Mapping[str, Tally], total: Tally | None = None) -> Table:
    table = Table(title=title)
    for name in ("", "trials", "found", "located", "in time", "of these same bits", "not found"):
        table.add_column(name, justify="left" if name in ("", "located", "not found") else "right")
    for name, tally in [*rows.items(), *([("all", total)] if total else [])]:
        located = ", ".join(f"{where} {number}" for where, number in tally.located.items())
        reasons = ", ".join(f"{why} {number}" for why, number in tally.reasons.items())
        table.add_row(name, str(tally.trials), str(tally.found), located, str(tally.in_time), str(tally.equal), reasons)
    return table
