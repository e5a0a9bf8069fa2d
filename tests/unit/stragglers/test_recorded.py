"""Recorded jobs: what is written comes back, and only whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lockstep_trainer.stragglers.work import Work
from stragglers.recorded import read, write
from stragglers.scenarios.layout import Layout


def works(step: int, ranks: int = 4) -> list[Work]:
    """Of one step."""
    return [
        Work(rank, 0.01 * step + 0.001 * rank, 0.001, 0.0005, {"data": 0.1}, 128, 128 * 128) for rank in range(ranks)
    ]


def test_a_recording_comes_back_by_step_and_rank(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    write(path, {"what": "a test"}, ((step, works(step)) for step in (1, 2, 3)))
    found = read(path)
    np.testing.assert_allclose(found.compute[:, 2], [0.012, 0.022, 0.032])
    by_rank = found.by_rank(np.array([1, 2]), Layout(2, tensor=2))
    assert by_rank[0, 1, 0, 0] == pytest.approx(0.022)
    assert found.window(1, 1).compute.shape == (1, 4)


def test_a_step_without_all_ranks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    write(path, {}, [(1, works(1)), (2, works(2, ranks=3))])
    with pytest.raises(ValueError, match="step 2 has 3 of 4 ranks"):
        read(path)


def test_a_layout_of_other_ranks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    write(path, {}, [(1, works(1))])
    with pytest.raises(ValueError, match="4 ranks, not the 8 of dp8"):
        read(path).by_rank(np.array([0]), Layout(8))
