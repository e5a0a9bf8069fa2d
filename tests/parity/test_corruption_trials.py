"""Trials of the corruption benchmark on real ranks: each begins where the clean run does, whatever the one before it
left behind, and its record says what happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corruption.outcome import outcome
from corruption.ranks import yielded
from corruption.setting import DENSE, Setting
from corruption.trial import SLOW, Kind, Trial
from corruption.world import World, play
from lockstep_trainer.injection.bitflips import Fault
from lockstep_trainer.parallel.layout import Layout

pytestmark = pytest.mark.timeout(900)  # as for the other tests of replay on four ranks

CULPRIT = 2


def trial(name: str, kind: Kind, *, bound: int = 2, **fault: Any) -> Trial:
    return Trial(name, "delay", kind, Fault(CULPRIT, "activation", layer=1, bit=22, element=5, **fault), bound=bound)


def test_a_trial_does_not_depend_on_what_the_one_before_it_did(tmp_path: Path) -> None:
    trials = [
        trial("found", "sampled"),
        trial("beyond", "other"),
        trial("in a sum", "sum"),
        trial("in memory", "shard"),
        trial("in the optimizer", "optimizer"),
        trial("in the update", "update"),
        trial("in some updates", "update", rate=0.1),
        trial("from the start", "calibration"),
        trial("without a strike", "sampled", rate=0.0),
        trial("found again", "sampled"),
    ]
    records = {found["name"]: found for found in yielded(4, lambda _rank: play(SLOW, trials), tmp_path)}
    outcomes = {name: outcome(record) for name, record in records.items()}
    for name in ("found", "from the start", "found again"):
        assert (outcomes[name].located, outcomes[name].in_time) == ("rank", True), records[name]
    assert outcomes["found"].equal
    assert {**records["found"], "name": "", "trial": ""} == {**records["found again"], "name": "", "trial": ""}
    assert (outcomes["beyond"].reason, outcomes["beyond"].equal) == ("other", False)
    assert (outcomes["in a sum"].reason, outcomes["in a sum"].equal) == ("memory", False)
    for name in ("in memory", "in the optimizer", "in the update", "in some updates"):
        assert (outcomes[name].located, outcomes[name].in_time) == ("rank", False), records[name]
    assert (outcomes["without a strike"].reason, outcomes["without a strike"].equal) == ("no strike", True)


def test_a_copy_of_a_shard_that_flipped_in_memory_blames_nobody_elses_computation(tmp_path: Path) -> None:
    """Units of this copy compute with other weights than those of the other: each is outvoted once. Then the rank's
    own look at its memory names it."""
    setting = Setting(Layout(replicate=2, shard=2), replace(DENSE, layers=2), samples=8)
    trials = [trial("in memory", "shard"), trial("in the optimizer", "optimizer", bound=3)]
    for record in yielded(4, lambda _rank: play(setting, trials), tmp_path):
        verdicts = [(each["kind"], each["ranks"]) for heard in record["heard"] for each in heard["verdicts"]]
        copies, own = [("undecided", [0, CULPRIT])] * 2, [("intermittent", [CULPRIT])]
        assert verdicts == (copies + own if record["trial"]["kind"] == "shard" else own), record
        assert outcome(record).located == "rank"


def test_what_a_rank_raises_is_raised_here(tmp_path: Path) -> None:
    def body(rank: int) -> Iterator[dict[str, Any]]:
        yield {"points": World(SLOW, steps=1).points}
        if rank == 1:
            raise ValueError("of rank 1")

    heard = []
    with pytest.raises(RuntimeError, match="of rank 1"):
        heard += list(yielded(4, body, tmp_path))


def test_ranks_end_when_nobody_listens_any_more(tmp_path: Path) -> None:
    def body(_rank: int) -> Iterator[dict[str, Any]]:
        while True:
            yield {}

    listening = yielded(2, body, tmp_path)
    assert next(listening) == {}
    listening.close()  # type: ignore[attr-defined]  # waits for them
