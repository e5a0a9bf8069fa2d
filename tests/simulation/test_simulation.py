"""The simulation itself: it repeats itself, it notices when a rule is changed, and a long run can be broken off.

``test_schedules_1`` and ``_2`` try ten thousand schedules; ``python -m simulation --runs 1000000 --jobs 0`` a million.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from simulation import batch, schedules
from simulation.batch import Count, Failure, State, resumed, tried
from simulation.invariants import Violation
from simulation.mutations import GUARDS, MUTATIONS, Mutation
from simulation.run import Outcome, run

TESTS = Path(__file__).parents[1]


def test_ci_tries_ten_thousand_schedules_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "SEEDS", 5000)
    seeds = [
        s
        for file in range(schedules.FILES)
        for part in range(schedules.BATCHES)
        for s in schedules.seeds_of(file, part)
    ]
    assert sorted(seeds) == list(range(5000))


@pytest.mark.parametrize("seed", [3, 10])
def test_a_seed_repeats_itself(seed: int) -> None:
    """A violation can be looked at again: the same seed gives the same world, with real codecs (10) and without."""
    assert run(seed) == run(seed)


def test_codecs_change_nothing() -> None:
    """What is handed over as it is would arrive the same through JSON."""
    plain = run(4)
    with patch("simulation.world.CODED", 5):
        assert run(4) == plain


def test_some_schedules_put_a_pod_aside_that_computes_wrong_numbers() -> None:
    """Or the invariants of a rollback would hold for nothing."""
    assert sum(run(seed).rollbacks for seed in range(2, 62, 5)) >= 3


@pytest.mark.parametrize("mutation", [pytest.param(m, id=m.name) for m in (*MUTATIONS, *GUARDS)])
def test_changed_rule_is_noticed(mutation: Mutation) -> None:
    """Each one-line change of the rules makes some seed fail, or the rule's own test."""
    done = subprocess.run(
        [sys.executable, "-m", "simulation.mutations", mutation.name],
        cwd=TESTS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def held(seed: int, *, short: bool) -> Outcome:
    return Outcome(seed, 7, 10, 2, 3)


def breaks_at_5(seed: int, *, short: bool) -> Outcome:
    if seed == 5 and short:
        raise Violation("seed 5 (short) at 3.00 s: a rule")
    return held(seed, short=short)


def test_a_failure_says_how_it_is_run_again() -> None:
    with patch.object(batch, "run", breaks_at_5):
        seed, count = batch.both(4)
        assert isinstance(count, Count)
        assert (seed, count.schedules, count.faults, count.epochs, count.generations, count.steps) == (
            4,
            2,
            20,
            4,
            6,
            14,
        )
        with pytest.raises(AssertionError, match=r"seed 5 \(short\).*\n.*-m simulation --replay 5 --short"):
            tried(range(4, 7))


def test_a_core_that_breaks_down_is_a_failure() -> None:
    def breaks_down(seed: int, *, short: bool) -> Outcome:
        raise KeyError(seed)

    with patch.object(batch, "run", breaks_down):
        assert batch.both(4) == (4, Failure(4, False, "4"))


def test_a_long_run_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert State.load(path) is None
    told: list[State] = []
    with patch.object(batch, "run", breaks_at_5):
        with pytest.raises(AssertionError, match="seed 5"):
            resumed(State(0, 0), range(8), 1, told.append)
        assert [state.next for state in told] == [1, 2, 3, 4, 5], "what has held stays"
        told[-1].save(path)
    state = State.load(path)
    assert state == told[-1]
    with patch.object(batch, "run", held):
        done = resumed(state, range(state.next, 8), 1, told.append)
    assert (done.first, done.next, done.count.schedules, done.count.faults) == (0, 8, 16, 160)


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text('{"first": 0}')
    with pytest.raises(ValueError, match=r"no state of a run.*name another file"):
        State.load(path)


def test_the_command_line_keeps_a_state_and_goes_on_from_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simulation", "--state", str(tmp_path / "state.json"), "--runs"]
    for runs in ("4", "8"):
        done = subprocess.run([*command, runs], cwd=TESTS, capture_output=True, text=True, check=True)
        assert f"{runs} schedules: " in done.stdout
    refused = subprocess.run([*command, "8", "--first", "9"], cwd=TESTS, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "begins with seed 0" in refused.stderr
