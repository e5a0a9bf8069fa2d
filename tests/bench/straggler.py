"""How well slow ranks are found, on scenarios written without sight of the detector, beside NVRx's published rule.

    python tests/bench/straggler.py [--each 10] [--first 0] [--kinds clock,link] [--minutes 10] [--write]

Plays ``--each`` scenarios of every kind (`stragglers.scenarios` says what counts as what) in virtual time, the same to
both detectors, and prints what they found, what was false, and how many steps it took. What was played goes to
build/straggler-COMMIT.jsonl: a run that was stopped goes on from there. With --write the sums go into
docs/results/straggler.json, behind those of runs before, and the picture to docs/results/straggler.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "trainer")]

from rich.console import Console  # noqa: E402 - the path comes first
from rich.table import Table  # noqa: E402

from bench import results  # noqa: E402
from lockstep_trainer.stragglers.detector import Detector  # noqa: E402
from lockstep_trainer.stragglers.settings import Settings  # noqa: E402
from lockstep_trainer.stragglers.work import Place  # noqa: E402
from stragglers.outcome import Outcome  # noqa: E402
from stragglers.peer import Nvrx  # noqa: E402
from stragglers.picture import by_kind, draw  # noqa: E402
from stragglers.scenarios.catalogue import KINDS, scenario  # noqa: E402
from stragglers.scenarios.scenario import Step  # noqa: E402
from stragglers.score import Make, Score, Searcher, play  # noqa: E402


def lockstep(places: Sequence[Place], threshold: float) -> Searcher:
    """Lockstep's detector as it is shipped."""
    return Detector(places, Settings(threshold=threshold))


def nvrx(places: Sequence[Place], _threshold: float) -> Searcher:
    """NVRx's rule, which knows no threshold but its own."""
    return Nvrx(places)


DETECTORS: Mapping[str, Make] = {"lockstep": lockstep, "nvrx": nvrx}


def play_all(seeds: range, kinds: tuple[str, ...], path: Path, seconds: float) -> list[tuple[str, Outcome, float]]:
    """(detector, outcome, µs of CPU time per rank and step) of all that has been played; no scenario is begun after
    ``seconds``."""
    done: dict[tuple[str, str], tuple[Outcome, float]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            kept = json.loads(line)
            outcome = kept["outcome"] | {name: tuple(kept["outcome"][name]) for name in ("delays", "notes")}
            done[kept["detector"], kept["outcome"]["name"]] = Outcome(**outcome), kept["cpu"]
    path.parent.mkdir(parents=True, exist_ok=True)
    began, played = time.monotonic(), []
    for kind, seed in ((kind, seed) for seed in seeds for kind in kinds):
        name = f"{kind}-{seed}"
        missing = [detector for detector in DETECTORS if (detector, name) not in done]
        if missing:
            if time.monotonic() - began > seconds:
                break
            drawn = scenario(kind, seed)
            items = list(drawn.run())
            ranks = sum(len(item.work) for item in items if isinstance(item, Step))
            for detector in missing:
                used = time.process_time()
                outcome = play(DETECTORS[detector], drawn, items)
                done[detector, name] = outcome, (time.process_time() - used) / ranks * 1e6
                with path.open("a") as file:
                    cpu = done[detector, name][1]
                    file.write(json.dumps({"detector": detector, "cpu": cpu, "outcome": asdict(outcome)}) + "\n")
                print(f"{detector:9} {name:24} {'; '.join(outcome.notes)}", flush=True)
        played += [(detector, *done[detector, name]) for detector in DETECTORS]
    return played


def summary(score: Score) -> dict[str, Any]:
    """As it is kept."""
    counted = ("scenarios", "expected", "found", "right", "false", "blamed", "ended", "endings", "steps", "probes")
    shares = ("precision", "recall", "f1", "causes")
    return {
        **{name: getattr(score, name) for name in counted},
        **{name: None if getattr(score, name) is None else round(getattr(score, name), 4) for name in shares},
        "delay": {"p50": score.median, "p90": score.delay(0.9), "worst": score.delay(1.0)},
    }


def table(title: str, rows: Mapping[str, Score]) -> Table:
    """For the terminal."""
    found = Table(title=title)
    columns = (
        "",
        "scenarios",
        "to find",
        "found",
        "cause right",
        "false",
        "precision",
        "recall",
        "F1",
        "p50/p90/worst",
    )
    for name in columns:
        found.add_column(name, justify="left" if not name else "right")
    for name, score in rows.items():
        shares = ["–" if each is None else f"{each:.3f}" for each in (score.precision, score.recall, score.f1)]
        numbers = (score.scenarios, score.expected, score.found, score.right, score.false)
        delays = f"{score.median:.0f}/{score.delay(0.9)}/{score.delay(1.0)}" if score.delays else "–"
        found.add_row(name, *map(str, numbers), *shares, delays)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=10, help="scenarios of every kind; default 10")
    parser.add_argument("--first", type=int, default=0, help="seed to begin with; others than those looked at before")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no scenario after that")
    parser.add_argument("--write", action="store_true", help="add to docs/results/straggler.json")
    arguments = parser.parse_args()
    kinds = tuple(arguments.kinds.split(","))
    for kind in kinds:
        if kind not in KINDS:
            parser.error(f"argument --kinds: there is no {kind!r}; there are {', '.join(KINDS)}")
    head = results.origin("slow ranks found in held-out scenarios, and NVRx's rule on the same", "virtual time")
    path = REPOSITORY / f"build/straggler-{head['commit']}.jsonl"
    seeds = range(arguments.first, arguments.first + arguments.each)
    played = play_all(seeds, kinds, path, 60 * arguments.minutes)
    console = Console(width=140)
    result: dict[str, Any] = {**head, "each": arguments.each, "first": arguments.first}
    by_detector = {name: [outcome for detector, outcome, _ in played if detector == name] for name in DETECTORS}
    for name, outcomes in by_detector.items():
        cpu = [cpu for detector, _, cpu in played if detector == name]
        scored = Score.of(each for each in outcomes if each.scored)
        near = Score.of(each for each in outcomes if not each.scored)
        of = by_kind(outcomes)
        console.print(table(name, {**of, "all but near": scored}))
        console.print(
            f"{name}: {scored.blamed} findings would put sound hardware aside; {scored.ended} of {scored.endings} said "
            f"to be over; {scored.probes} probes in {scored.steps} steps; {sum(cpu) / max(1, len(cpu)):.1f} µs of CPU "
            "time per rank and step"
        )
        result[name] = {
            **summary(scored),
            "microseconds_per_rank_step": round(sum(cpu) / max(1, len(cpu)), 2),
            "near": summary(near),
            "kinds": {kind: summary(score) for kind, score in of.items()},
        }
        if name == "lockstep":
            result[name]["notes"] = {outcome.name: outcome.notes for outcome in outcomes if outcome.notes}
    if arguments.write:
        results.add(result, results.RESULTS / "straggler.json")
        draw(by_detector, results.RESULTS / "straggler.svg")


if __name__ == "__main__":
    main()
