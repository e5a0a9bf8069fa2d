"""The score of a detector: what an oracle, a silent one and a noisy one get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest

from lockstep_trainer.stragglers.work import Cause, Ended, Finding, Place, Probe, Probed, Work
from stragglers.nvrx import EVERY
from stragglers.outcome import Heard, judge
from stragglers.peer import Nvrx
from stragglers.scenarios.catalogue import scenario
from stragglers.scenarios.scenario import Expected, Scenario
from stragglers.score import PROBES, Said, Score, play

SCENARIOS = [scenario(kind, 0) for kind in ("host", "lengths", "restart-moved", "recovers", "burst", "hiccup")]
DELAY = 7


def finding(cause: Cause, *ranks: int) -> Finding:
    """Any."""
    return Finding(cause, ranks, since=1, slowdown=0.2, cost=0.1, evidence="")


class Oracle:
    """Says what is to be said, some steps after the onset, and when it is over."""

    def __init__(self, scenario: Scenario) -> None:
        self.expected, self.executed = scenario.expected, -1

    def words(self, expected: Expected) -> Finding:
        """The truth."""
        return finding(min(expected.causes), *sorted(expected.ranks))

    def step(self, number: int, work: Sequence[Work], seconds: float) -> Said:
        """A step."""
        self.executed += 1
        said: list[Probe | Finding | Ended] = []
        for each in self.expected:
            if self.executed == each.onset + DELAY:
                said.append(self.words(each))
            if each.ends is not None and self.executed == each.ends + DELAY:
                said.append(Ended(self.words(each), number))
        return said

    def probed(self, answer: Probed) -> Said:
        """A probe's end."""
        return ()

    def restart(self, places: Sequence[Place]) -> Sequence[Ended]:
        """A restart."""
        return ()


class Silent(Oracle):
    """Says nothing."""

    def step(self, number: int, work: Sequence[Work], seconds: float) -> Said:
        """A step."""
        return ()


class Noisy(Oracle):
    """The truth, and in each scenario a rank that isn't slow."""

    def step(self, number: int, work: Sequence[Work], seconds: float) -> Said:
        """A step."""
        right = super().step(number, work, seconds)
        named = {rank for each in self.expected for rank in each.ranks}
        other = next(each.rank for each in reversed(work) if each.rank not in named)
        return [*right, finding(Cause.COMPUTE, other)] if self.executed == 3 else right


class Mistaken(Oracle):
    """The right ranks for another reason."""

    def words(self, expected: Expected) -> Finding:
        """Not quite the truth."""
        return finding(Cause.NETWORK, *sorted(expected.ranks))


class Inquisitive(Silent):
    """Asks and asks."""

    def step(self, number: int, work: Sequence[Work], seconds: float) -> Said:
        """A step."""
        return [Probe("compute", ranks=(0,))]

    def probed(self, answer: Probed) -> Said:
        """A probe's end."""
        return [Probe("compute", ranks=(0,))]


def made(searcher: Callable[[Scenario], Oracle], scenario: Scenario, _places: Sequence[Place], _: float) -> Oracle:
    """One that knows the scenario, in place of one that knows places and threshold."""
    return searcher(scenario)


def score(searcher: Callable[[Scenario], Oracle]) -> Score:
    """Over all of ``SCENARIOS``."""
    return Score.of(play(partial(made, searcher, each), each) for each in SCENARIOS)


def test_who_says_the_truth_is_right_every_time_and_as_late_as_said() -> None:
    found = score(Oracle)
    assert (found.precision, found.recall, found.f1, found.causes) == (1.0, 1.0, 1.0, 1.0)
    assert set(found.delays) == {DELAY}
    assert found.delay(0.9) == found.median == DELAY
    assert found.expected == 5
    assert found.ended == found.endings == 2


def test_who_says_nothing_finds_nothing() -> None:
    found = score(Silent)
    assert (found.precision, found.recall, found.f1, found.causes) == (None, 0.0, 0.0, None)
    assert found.median is None


def test_who_names_others_as_well_loses_precision_and_would_put_them_aside() -> None:
    found = score(Noisy)
    assert found.recall == 1.0
    assert found.precision == pytest.approx(5 / 11)
    assert found.false == found.blamed == len(SCENARIOS)


def test_the_right_ranks_for_another_reason_count_apart() -> None:
    found = score(Mistaken)
    assert (found.precision, found.recall, found.causes) == (1.0, 1.0, 0.0)
    assert found.blamed == 1, "only the longer documents are no hardware's fault"


def test_who_never_stops_asking_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=f"more than {PROBES} probes"):
        play(partial(made, Inquisitive, SCENARIOS[0]), SCENARIOS[0])


# -------------------------------------------------------------------------------------------------- single words

SLOW = Expected(frozenset({3}), frozenset({Cause.CLOCK}), begins=50, onset=60, ends=150)
NODE = Expected(frozenset(range(8)), frozenset({Cause.CLOCK}), begins=50, onset=50)
STORE = Expected(frozenset(), frozenset({Cause.DATA}), begins=50, onset=50)


def judged(expected: Sequence[Expected], *said: tuple[int, Finding]) -> tuple[int, int, int]:
    """Right, miscaused, false."""
    each = replace(SCENARIOS[0], expected=tuple(expected))
    found = judge(each, [Heard(words, executed) for executed, words in said], (), 300, 0)
    return found.right, found.miscaused, found.false


@pytest.mark.parametrize(("executed", "counts"), [(49, (0, 0, 1)), (55, (1, 0, 0)), (165, (1, 0, 0)), (171, (0, 0, 1))])
def test_a_finding_counts_from_the_first_sign_to_shortly_after_the_end(
    executed: int, counts: tuple[int, int, int]
) -> None:
    assert judged([SLOW], (executed, finding(Cause.CLOCK, 3))) == counts


def test_a_node_is_found_when_all_of_its_ranks_are_named_in_whatever_pieces() -> None:
    pieces = [(60 + rank, finding(Cause.CLOCK, rank)) for rank in range(8)]
    assert judged([NODE], *pieces) == (1, 0, 0)
    assert judged([NODE], *pieces[:7]) == (0, 0, 0)
    assert judged([NODE], (60, finding(Cause.CLOCK, *range(9)))) == (0, 0, 1)


def test_what_all_share_is_nobodys_or_everybodys() -> None:
    everybody = range(len(SCENARIOS[0].places))
    assert judged([STORE], (70, finding(Cause.DATA))) == (1, 0, 0)
    assert judged([STORE], (70, finding(Cause.DATA, *everybody))) == (1, 0, 0)
    assert judged([STORE], (70, finding(Cause.DATA, 0))) == (0, 0, 1)


def test_two_slow_ranks_may_be_named_together() -> None:
    other = replace(SLOW, ranks=frozenset({5}))
    assert judged([SLOW, other], (70, finding(Cause.CLOCK, 3, 5))) == (2, 0, 0)


def test_a_healthy_rank_of_a_heavy_stage_that_is_called_slow_is_a_false_finding() -> None:
    stage = Expected(frozenset(range(4)), frozenset({Cause.PIPELINE}), begins=0, onset=0)
    assert judged([stage], (70, finding(Cause.COMPUTE, 2))) == (0, 0, 1)
    assert judged([stage], (70, finding(Cause.PIPELINE, 0, 1, 2, 3))) == (1, 0, 0)


def test_the_same_found_again_is_not_false() -> None:
    assert judged([SLOW], (70, finding(Cause.CLOCK, 3)), (120, finding(Cause.CLOCK, 3))) == (1, 0, 0)


def test_nvrx_names_a_rank_when_a_report_first_flags_it_and_not_in_each_report() -> None:
    slow = scenario("host", 0)
    strong = replace(slow, faults=(replace(slow.faults[0], size=3 * slow.faults[0].size),))
    found = play(lambda places, _: Nvrx(places), strong)
    assert (found.miscaused, found.false) == (1, 0)
    assert found.delays[0] < EVERY
