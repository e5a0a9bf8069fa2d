"""The choice of a number of nodes: pure, from what there is and how long it has been so."""

from __future__ import annotations

from typing import Any

import pytest

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobSpec
from lockstep_operator.plan.width import Supply, choose
from manifests import trainer_job


def spec(nodes: int = 8, minimum: int | None = 2, batch: int = 24) -> TrainingJobSpec:
    """Nodes of one GPU, steps of ``batch`` samples; waits 60 s."""
    manifest = trainer_job()
    manifest["spec"] |= {"nodes": nodes, "gpusPerNode": 1}
    manifest["spec"]["trainer"]["recipe"]["globalBatchTokens"] = batch * 128
    if minimum is not None:
        manifest["spec"]["resilience"] = {"elastic": {"minNodes": minimum, "shrinkAfterSeconds": 60}}
    return TrainingJob.model_validate(manifest).spec


def have(held: int, free: int = 0, coming: int = 0) -> Supply:
    return Supply(held, free, coming)


@pytest.mark.parametrize(
    ("what", "width", "supply", "times", "expected"),
    [
        ("all slots are held", 8, have(8), {}, 8),
        ("a spare is there", 8, have(7, free=1), {"short": 1.0}, 8),
        ("nobody waits long enough yet", 8, have(7), {"short": 59.0}, None),
        ("seven can't share 24 samples", 8, have(7), {"short": 60.0}, 6),
        ("a pod is coming", 8, have(7, coming=1), {"short": 600.0}, None),
        ("one is coming and two are missing", 8, have(6, coming=1), {"short": 60.0}, 6),
        ("survivors and a spare that are still too few", 8, have(4, free=1), {"short": 60.0}, 4),
        ("below the minimum", 8, have(1), {"short": 6000.0}, None),
        ("a shrunk job loses one more", 6, have(5), {"short": 60.0}, 4),
        ("a shrunk job repairs before it grows", 6, have(5, free=3), {}, 6),
        ("all are back", 6, have(6, free=2), {}, 8),
        ("what is back makes no larger width", 6, have(6, free=1), {"room": 600.0}, 6),
        ("some are back", 4, have(4, free=2), {"room": 59.0}, 4),
        ("some are back, the others stay away", 4, have(4, free=3), {"room": 60.0}, 6),
        ("the first start has all pods", 8, have(0, free=9), {}, 8),
        ("the first start waits", 8, have(0, free=7), {"short": 59.0}, None),
        ("the first start begins with fewer", 8, have(0, free=7), {"short": 60.0}, 6),
    ],
)
def test_how_many_nodes_train(
    what: str, width: int, supply: Supply, times: dict[str, Any], expected: int | None
) -> None:
    assert choose(spec(), width, supply, **times) == expected, what


def test_a_job_that_is_not_elastic_waits_for_all() -> None:
    assert choose(spec(minimum=None), 8, have(7), short=1e6) is None
