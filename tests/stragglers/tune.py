"""Scores the search on the tuning set: ``tune.py [COUNT [PART PARTS [SEED]]]``, with ``tests`` on PYTHONPATH.

A part of it is every ``PARTS``-th scenario.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np

from lockstep_trainer.stragglers.detector import Detector
from lockstep_trainer.stragglers.settings import Settings
from lockstep_trainer.stragglers.work import Cause, Finding, Probe
from stragglers.nvrx import Report
from stragglers.tuning import Scenario, Trace, scenarios


@dataclass(frozen=True, slots=True)
class Score:
    """What was said of one scenario."""

    scenario: Scenario
    right: bool
    """The cause and all its ranks, and no other."""
    false: tuple[Finding, ...]
    """Findings about what did not happen, or about ranks that it did not happen to."""
    wrong_cause: tuple[Finding, ...]
    steps: int | None
    """From onset to verdict."""
    probes: int
    flagged: frozenset[int]
    """By the peer's rule."""


def score(scenario: Scenario) -> Score:
    """Plays it."""
    trace = Trace(scenario)
    detector, peer = Detector(trace.places, Settings(scenario.threshold)), Report(trace.places)
    found: list[tuple[int, Finding]] = []
    probes, flagged = 0, set[int]()
    asked: list[Probe] = []
    for number, work, seconds in trace.steps():
        said = [*(one for probe in asked for one in detector.probed(trace.answer(probe)))]
        said += detector.step(number, work, seconds)
        asked = [one for one in said if isinstance(one, Probe)]
        probes += len(asked)
        found += [(number, one) for one in said if isinstance(one, Finding)]
        flagged |= peer.step(work)
    expected = () if scenario.expected in {Cause.PAUSES} or scenario.kind == "shared data" else scenario.ranks
    if scenario.expected is None:
        return Score(scenario, not found, tuple(one for _, one in found), (), None, probes, frozenset(flagged))
    named = [(number, one) for number, one in found if set(one.ranks) <= set(expected)]
    right = [(number, one) for number, one in named if one.cause in scenario.causes]
    covered = {rank for _, one in right for rank in one.ranks}
    wrong = tuple(one for _, one in named if one.cause not in scenario.causes)
    false = tuple(one for _, one in found if not set(one.ranks) <= set(expected))
    steps = right[0][0] - scenario.onset if right else None
    return Score(scenario, bool(right) and covered == set(expected), false, wrong, steps, probes, frozenset(flagged))


def main(count: int = 230, part: int = 0, parts: int = 1, seed: int = 1) -> None:
    """Prints what was missed or wrong, then the figures."""
    scores = []
    for scenario in [*scenarios(count, seed)][part::parts]:
        one = score(scenario)
        scores.append(one)
        if not one.right or one.false or one.wrong_cause:
            print(f"{scenario}\n  right {one.right}, false {one.false}, wrong cause {one.wrong_cause}", flush=True)
    faults = [one for one in scores if one.scenario.expected is not None]
    hits = sum(one.right for one in faults)
    false = sum(len(one.false) + len(one.wrong_cause) for one in scores)
    precision, recall = hits / max(hits + false, 1), hits / max(len(faults), 1)
    print(f"{len(scores)} scenarios: precision {precision:.3f}, recall {recall:.3f}, "
          f"F1 {2 * precision * recall / max(precision + recall, 1e-9):.3f}, "
          f"wrong causes {sum(len(one.wrong_cause) for one in scores)}")  # fmt: skip
    for kind in dict.fromkeys(one.scenario.kind for one in scores):
        alike = [one for one in scores if one.scenario.kind == kind]
        steps = [one.steps for one in alike if one.steps is not None]
        told = f"steps to verdict: median {np.median(steps):.0f}, most {max(steps)}" if steps else ""
        right, probes = sum(one.right for one in alike), sum(one.probes for one in alike)
        print(f"{kind:18} {right} of {len(alike)}, probes {probes}, {told}")
    peer = Counter()
    for one in scores:
        truth = set(one.scenario.ranks) if one.scenario.expected is not None else set()
        peer.update(hit=len(one.flagged & truth), false=len(one.flagged - truth), missed=len(truth - one.flagged))
    print(f"NVRx's rule, by rank: {dict(peer)}")


if __name__ == "__main__":
    main(*(int(given) for given in sys.argv[1:]))
