"""Shared runs: starting one costs more than training in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.run import small
from localrun import LocalRun


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of every step of a run in which nothing breaks."""
    with LocalRun(tmp_path_factory.mktemp("reference"), small.overrides()) as run:
        result = run.finish()
        assert result.code == 0, result.errors + run.output()
        assert result.status.restarts.total == 0
        verdict = run.check(small.STEPS)
        assert verdict.exact, verdict
        return run.losses()


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRun]:
    """One run that the faults of a module are done to, one after another."""
    with LocalRun(tmp_path_factory.mktemp("journey"), small.overrides()) as run:
        run.until_step(5)
        yield run
