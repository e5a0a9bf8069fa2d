"""The covering set of the parity matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parity.cases import Case, covering, full
from parity.run import Runner


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Runs the cells that were selected, several at once, in the order of the tests."""
    ids = {item.name for item in request.session.items}
    chosen = [case for case in covering() if any(f"[{case.name}]" in name for name in ids)]
    runner = Runner(chosen, tmp_path_factory.mktemp("parity"))
    yield runner
    runner.close()


@pytest.mark.parametrize("case", covering(), ids=lambda case: case.name)
def test_gradients_and_training_equal_a_single_process(runner: Runner, case: Case) -> None:
    result = runner.result(case)
    assert not result.failure, result.failure


def test_the_full_matrix_holds_the_covering_set_and_has_unique_names() -> None:
    names = [case.name for case in full()]
    assert len(set(names)) == len(names)
    assert {case.name for case in covering()} <= set(names)
