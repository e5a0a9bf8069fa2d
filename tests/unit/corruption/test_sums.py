"""The corruption benchmark's sums can be written down, and count what they say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from corruption.kept import Kept
from corruption.picture import draw
from corruption.sums import summary, tables
from corruption.trial import delays, sampled


def filled(path: Path) -> Kept:
    """A campaign of a few trials: the first two are found, the second with somebody else named; one is not."""
    kept = Kept(path)
    for number, named in enumerate(("itself", "another", None)):
        trial = sampled("dp8", number, seed=1)
        rank = trial.fault.rank if named == "itself" else (trial.fault.rank + 1) % 8
        verdicts = [{"kind": "permanent", "unit": rank, "ranks": [rank], "point": "p"}]
        heard = [{"step": 1, "run": 1, "rejected": True, "verdicts": verdicts}] if named else []
        harmed = None if named else 1
        record = {"strikes": [[1, "first", True]], "heard": heard, "harmed_at": harmed, "equal": harmed is None}
        kept.add("trial", trial.name, {"trial": asdict(trial), **record})
    slow = next(delays(1, seed=1))[0]
    verdicts = [{"kind": "permanent", "unit": 0, "ranks": [slow.fault.rank], "point": "p"}]
    heard = [{"step": 3, "run": 1, "rejected": True, "verdicts": verdicts}]
    record = {"strikes": [[1, "first", False]], "heard": heard, "harmed_at": None, "equal": True}
    kept.add("trial", slow.name, {"trial": asdict(slow), **record})
    kept.add("virtual", "a", {"share": 0.5, "rate": 1.0, "steps": [1, 2, 3]})
    kept.add("clean", "a", {"layout": "dp4", "steps": 10, "points": 100, "found": ["something"]})
    kept.add("cost", "0", {"off": 2.0, "unsampled": 2.0, "replayed": 3.0})
    return kept


def test_the_summary_is_json_and_counts(tmp_path: Path) -> None:
    found = json.loads(json.dumps(summary(filled(tmp_path / "state.jsonl"))))
    assert found["injections"] == 3
    assert found["sampled"]["located"] == {"rank": 1, "wrong": 1}
    assert found["sampled"]["reasons"] == {"missed": 1}
    assert len(found["not_as_expected"]) == 2
    assert [(row["how"], row["mean"]) for row in found["delays"]] == [("computed", 3.0), ("virtual", 2.0)]
    assert found["clean"]["all"] == {"steps": 10, "compared": 100, "false": 1}
    assert found["cost"]["default"]["median"] == 1.0012  # a replay costs half a step, of one step in 400


def test_an_empty_campaign_has_a_summary_too(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "state.jsonl")
    json.dumps(summary(kept))
    assert tables(kept) == []
    assert len(tables(filled(tmp_path / "other.jsonl"))) > 3


def test_the_same_campaign_makes_the_same_picture(tmp_path: Path) -> None:
    kept = filled(tmp_path / "state.jsonl")
    for name in ("a.svg", "b.svg"):
        draw(kept, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
