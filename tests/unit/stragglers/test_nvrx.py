"""The peer's rule is the published one."""

from __future__ import annotations

from lockstep_trainer.stragglers.work import Work
from stragglers.nvrx import EVERY, Report
from stragglers.plain import places


def work(slow: float) -> list[Work]:
    return [Work(rank, slow if rank == 1 else 1.0, 0, 0, {}, 1, 1) for rank in range(4)]


def test_a_rank_below_three_quarters_of_the_best_is_flagged_in_the_report_and_not_before() -> None:
    report = Report(places(4))
    assert not any(report.step(work(1.4)) for _ in range(EVERY - 1))
    assert report.step(work(1.4)) == {1}
    assert not any(report.step(work(1.3)) for _ in range(EVERY))  # 1 ÷ 1.3 is above it
