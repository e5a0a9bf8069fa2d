"""Parts of two versions side by side, as in every upgrade: the definition of the resource is the first to be new, and
the server fills in the defaults of fields that the parts which still run have never heard of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lockstep_api.v1alpha1 import TrainingJob
from lockstep_trainer.config import load_job
from manifests import trainer_job


def newer() -> dict[str, Any]:
    """A job as a server with a newer definition has it."""
    document = trainer_job()
    document["spec"]["resilience"] = {"hang": {"factor": 4, "later": {"action": "Report"}}, "alsoLater": {"share": 0.1}}
    document["status"] = {"phase": "Running", "verdictsOfLater": [{"kind": "Slow"}]}
    return document


def test_a_job_of_a_newer_definition_is_read_without_what_is_unknown() -> None:
    """An operator that refused it would fail every job of the cluster in the middle of an upgrade."""
    job = TrainingJob.of_server(newer())
    assert job.spec.resilience.hang.factor == 4
    assert job.status.phase == "Running"


def test_what_people_write_is_read_strictly() -> None:
    """A misspelt field must not be dropped in silence."""
    with pytest.raises(ValidationError, match=r"spec\.resilience\.alsoLater"):
        TrainingJob.model_validate(newer())


def test_a_worker_reads_the_job_of_a_newer_operator(tmp_path: Path) -> None:
    """Its pod was made before the upgrade, and its process after it."""
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"name": "job", "namespace": "team", "uid": "1", "spec": newer()["spec"]}))
    assert load_job(path).spec.resilience.hang.factor == 4
