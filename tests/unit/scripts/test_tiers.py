"""The runner of the tests: every test file is run by exactly one tier, and failures are neither lost nor miscounted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tiers


def test_every_test_file_belongs_to_exactly_one_tier() -> None:
    files = sorted((tiers.REPOSITORY / "tests").rglob("test_*.py"))
    assert files
    folders = [tiers.REPOSITORY / folder for tier in tiers.TIERS for folder in tier.tests]
    for file in files:
        homes = [folder for folder in folders if file.is_relative_to(folder)]
        assert len(homes) == 1, f"{file.relative_to(tiers.REPOSITORY)} is run by {len(homes)} tiers; move it"


@pytest.fixture
def _reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "REPORTS", tmp_path)


@pytest.mark.usefixtures("_reports")
def test_a_tier_goes_on_after_a_failure_and_reports_it() -> None:
    fails, works = (sys.executable, "-c", "raise SystemExit(3)"), (sys.executable, "-c", "")
    outcome = tiers.run_tier(tiers.Tier("sample", "a sample", commands=(fails, works, fails)), began=0.0, extra=())
    assert [failure.rpartition(" ")[2] for failure in outcome.failures] == ["3", "3"]


@pytest.mark.usefixtures("_reports")
def test_a_tier_without_its_folder_fails() -> None:
    outcome = tiers.run_tier(tiers.Tier("sample", "a sample", tests=("tests/nowhere",)), began=0.0, extra=())
    assert outcome.failures == ["no such folder: tests/nowhere"]


@pytest.mark.usefixtures("_reports")
def test_counts_come_from_pytests_own_report(tmp_path: Path) -> None:
    """Runs the real pytest on a file with one test of each outcome."""
    file = tmp_path / "test_sample.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "def test_odd(missing): pass\n"
        "@pytest.mark.skip(reason='sample')\n"
        "def test_left_out(): pass\n"
        "@pytest.mark.slow\n"
        "def test_long(): assert 0\n"
    )
    outcome = tiers.run_tier(tiers.Tier("sample", "a sample", tests=(str(file.parent),)), began=0.0, extra=())
    assert outcome.counts == "1 passed, 2 failed, 1 skipped"
    assert len(outcome.failures) == 1


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (65, "1:05"), (3600, "60:00")])
def test_times_are_minutes_and_seconds(seconds: float, text: str) -> None:
    assert tiers.clock(seconds) == text
