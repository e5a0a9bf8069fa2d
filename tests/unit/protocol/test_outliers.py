"""Episodes of unusual figures in the leader's memory: what began is told until it ended, also by a new generation."""

from __future__ import annotations

from lockstep_trainer.protocol.outliers import KEPT, Outliers

LINE = {"kind": "outlier", "signal": "loss", "step": 40, "evidence": "the loss is 9", "ended": False}


def test_an_episode_begins_ends_and_is_counted_once() -> None:
    found = Outliers().heard(LINE, 5.0).heard({**LINE, "ended": True}, 9.0)
    (one,) = found.episodes
    assert (one.signal, one.since, one.evidence, one.at, one.ended) == ("loss", 40, "the loss is 9", 5.0, 9.0)
    assert found.counts == (("loss", 1),)
    assert found.heard({**LINE, "step": 90}, 12.0).counts == (("loss", 2),)


def test_the_end_of_one_figure_leaves_the_others_and_what_ended_before() -> None:
    other = {**LINE, "signal": "gradientNorm"}
    found = Outliers().heard(LINE, 1.0).heard({**LINE, "ended": True}, 2.0).heard(LINE, 3.0).heard(other, 4.0)
    found = found.heard({**LINE, "ended": True}, 5.0)
    assert [(one.signal, one.ended) for one in found.episodes] == [("loss", 2.0), ("loss", 5.0), ("gradientNorm", None)]
    assert [one.ended for one in found.started(7.0).episodes] == [2.0, 5.0, 7.0]


def test_only_the_newest_are_kept_and_what_can_not_be_read_changes_nothing() -> None:
    found = Outliers()
    for step in range(KEPT + 3):
        found = found.heard({**LINE, "step": step}, float(step))
    assert [one.since for one in found.episodes] == list(range(3, KEPT + 3))
    assert found.heard({"kind": "outlier", "signal": "loss"}, 1.0) is found
