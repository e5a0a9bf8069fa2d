"""Medians, shares and goals of what the ranks measured. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lockstep_trainer.checkpoint.pace import charged, interval

OWN, RAW = "Lockstep", "raw put beside steps"


def spread(numbers: Iterable[float], digits: int = 4) -> dict[str, float]:
    """Median, lowest and highest."""
    found = sorted(numbers)
    return {
        "median": round(median(found), digits),
        "lowest": round(found[0], digits),
        "highest": round(found[-1], digits),
    }


@dataclass(frozen=True, slots=True)
class Effect:
    """What a save did to the steps beside it, compared with those of its round that had none: seconds."""

    slowdown: float  # share of their time, without what was blocked
    extra: float
    extra_cpu: float  # of ranks, children and agent


def effects(saves: Sequence[Mapping[str, Any]]) -> list[Effect]:
    """Of each save. A round's steps without a save stand for all its saves: others' load on the machine comes and goes
    faster than a round does."""
    rounds: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for save in saves:
        rounds[save["round"]].append(save)
    found = []
    for save in saves:
        step, cpu = (median(each[key] for each in rounds[save["round"]]) for key in ("step", "step_cpu"))
        extra = save["wall"] - save["blocked"] - save["steps"] * step
        found.append(Effect(extra / (save["steps"] * step), extra, save["cpu"] - save["steps"] * cpu))
    return found


def judge(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result as it is published: seconds."""
    first = [save for save in result["saves"] if save["round"] == 0]
    saves = [save for save in result["saves"] if save["round"]]
    beside = effects(saves)
    step = median(save["step"] for save in saves)
    systems: dict[str, Any] = {}
    for name in dict.fromkeys(save["system"] for save in first):
        own = [save for save in saves if save["system"] == name]
        its = [effect for save, effect in zip(saves, beside, strict=True) if save["system"] == name]
        systems[name] = {
            "blocked": spread(save["blocked"] for save in own),
            "blocked_cpu": spread(save["blocked_cpu"] for save in own),
            "waited": spread(save["waited"] for save in own),
            "blocked_first": round(max(save["blocked"] for save in first if save["system"] == name), 4),
            "slowdown": spread(effect.slowdown for effect in its),
            "extra": spread(effect.extra for effect in its),
            "extra_cpu": spread(effect.extra_cpu for effect in its),
            "server_cpu": spread(save["server_cpu"] for save in own),
            "durable": spread(save["durable"] for save in own),
            "steps": spread(save["steps"] for save in own),
        }
    found = {
        "mb_per_rank": round(result["bytes_per_rank"] / 1e6, 1),
        "step": spread(save["step"] for save in saves),
        "step_cpu": spread(save["step_cpu"] for save in saves),
        "planning_once": round(result["planning"], 4),
        "systems": systems,
        "restores": {name: spread(seconds) for name, seconds in result["restores"].items()},
    }
    blocked, whole = (median(each) for each in zip(*result["lockstep_costs"], strict=True))
    every = interval(charged(blocked, whole), step)
    found["interval"] = {
        "steps": every,
        "snapshot_whole": spread(each for _, each in result["lockstep_costs"]),
        "blocked_share": {
            name: round(each["blocked"]["median"] / (every * step), 5) for name, each in systems.items() if name != RAW
        },
    }
    found["goals"] = goals(found)
    return found


def goals(found: Mapping[str, Any]) -> dict[str, Any]:
    """What was to be shown, as ratios: each is reached where the number is at most the limit."""
    systems, restores = found["systems"], found["restores"]
    peers = {name: each["blocked"]["median"] for name, each in systems.items() if name not in (OWN, RAW)}
    durable = systems[OWN]["durable"]["median"]
    numbers = {
        "blocked share of time at the chosen interval": (found["interval"]["blocked_share"][OWN], 0.01),
        "durable ÷ raw put alone": (durable / restores["raw put"]["median"], 1.2),
        "durable ÷ raw put beside steps": (durable / systems[RAW]["durable"]["median"], 1.2),
        "restore from S3 ÷ raw get": (restores["Lockstep, S3"]["median"] / restores["raw get"]["median"], 1.2),
    }
    if peers:
        best = min(peers, key=lambda name: peers[name])
        numbers[f"blocked ÷ best peer's ({best})"] = (systems[OWN]["blocked"]["median"] / peers[best], 1.0)
    return {
        name: {"is": round(number, 4), "limit": limit, "reached": number <= limit}
        for name, (number, limit) in numbers.items()
    }


def table(found: Mapping[str, Any]) -> str:
    """For the terminal."""
    lines = [
        f"{found['mb_per_rank']} MB a rank, step {_range(found['step'])} s, CPU {_range(found['step_cpu'])} s; "
        f"interval {found['interval']['steps']} steps",
        "",
        f"{'save':28} {'blocked s':>22} {'its CPU s':>9} {'steps beside':>24} "
        f"{'CPU s':>22} {'durable s':>22} {'share':>7}",
    ]
    for name, each in found["systems"].items():
        share = found["interval"]["blocked_share"].get(name)
        percent = {key: 100 * value for key, value in each["slowdown"].items()}
        lines.append(
            f"{name:28} {_range(each['blocked'], 3):>22} {each['blocked_cpu']['median']:>9.3f} "
            f"{_range(percent, 0) + ' %':>24} "
            f"{_range(each['extra_cpu']):>22} {_range(each['durable']):>22} "
            f"{'' if share is None else f'{share:.2%}':>7}"
        )
    lines += ["", f"{'restore':44} {'s':>22}"]
    lines += [f"{name:44} {_range(each):>22}" for name, each in found["restores"].items()]
    lines += [""]
    for name, goal in found["goals"].items():
        lines.append(f"{'reached' if goal['reached'] else 'MISSED':8} {name}: {goal['is']} (limit {goal['limit']})")
    return "\n".join(lines)


def _range(numbers: Mapping[str, float], digits: int = 2) -> str:
    return f"{numbers['median']:.{digits}f} ({numbers['lowest']:.{digits}f}–{numbers['highest']:.{digits}f})"
