"""The TrainingJob resource as the API server sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lockstep_api.v1alpha1 import TrainingJob
from manifests import WRONG, Wrong, command_job, trainer_job

pytestmark = pytest.mark.api


def test_defaults_are_those_of_the_models(api: Any) -> None:
    """One truth: what the server fills in is what `lockstep run` fills in."""
    stored = api.create(trainer_job())
    assert TrainingJob.model_validate(stored).spec == TrainingJob.model_validate(trainer_job()).spec
    assert stored["spec"]["resilience"]["budgets"] == {"inProcess": 20, "process": 10, "pod": 5, "requeue": 3}
    assert stored["spec"]["trainer"]["tokenizer"] == {"train": {"kind": "bpe", "vocabSize": 32768}}
    assert stored["spec"]["parallelism"]["schedule"] == "1F1B"


def test_the_smallest_manifest_is_accepted(api: Any) -> None:
    stored = api.create(command_job())
    assert stored["spec"]["spares"] == 0
    assert stored["spec"]["managedBy"] == "lockstep.dev/operator"


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.what)
def test_a_wrong_manifest_is_refused_with_what_to_change(api: Any, wrong: Wrong) -> None:
    done = api.attempt(wrong.manifest())
    assert done.returncode != 0, f"accepted: {done.stdout}"
    for words in wrong.says:
        assert words in done.stderr


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"nodes": 3}, "nodes"),
        ({"gpusPerNode": 1}, "gpusPerNode"),
        ({"trainer": {"recipe": {"steps": 7}}}, "trainer"),
        ({"checkpoint": {"every": 7}}, "checkpoint"),
        ({"parallelism": {"replicate": 2}}, "parallelism"),
        ({"resilience": {"budgets": {"pod": 1}}}, "resilience"),
        ({"managedBy": "example.com/other"}, "managedBy"),
        ({"template": {"spec": {"nodeSelector": {"pool": "b"}}}}, "template"),
        ({"template": {"metadata": {"labels": {"team": "b"}}}}, "template"),
    ],
)
def test_what_cannot_change_says_why(api: Any, patch: dict[str, Any], field: str) -> None:
    """The template too, whose fields the schema does not know."""
    api.create(trainer_job())
    done = api.patch("quickstart", {"spec": patch})
    assert done.returncode != 0
    assert f"{field} is immutable: running pods" in done.stderr
    assert "create another job, with checkpoint.resumeFrom" in done.stderr


@pytest.mark.parametrize(
    "patch",
    [{"suspend": True}, {"spares": 4}, {"ttlSecondsAfterFinished": 60}, {"activeDeadlineSeconds": 60}],
)
def test_what_is_acted_on_may_change(api: Any, patch: dict[str, Any]) -> None:
    api.create(trainer_job())
    assert api.patch("quickstart", {"spec": patch}).returncode == 0


def test_get_shows_the_columns_that_people_look_for(api: Any) -> None:
    api.create(command_job("columns"))
    status = {
        "phase": "Running",
        "ready": "16/16",
        "step": "41230/100000",
        "loss": "2.113",
        "restarts": {"total": 4},
        "goodputPercent": "97.8%",
    }
    api.kubectl(
        "patch", "tj", "columns", "--subresource", "status", "--type", "merge", "-p", json.dumps({"status": status})
    )
    header, row = api.kubectl("get", "tj").splitlines()
    assert header.split() == ["NAME", "PHASE", "READY", "STEP", "LOSS", "RESTARTS", "GOODPUT", "AGE"]
    assert row.split()[:-1] == ["columns", "Running", "16/16", "41230/100000", "2.113", "4", "97.8%"]
    assert "columns" in api.kubectl("get", "lockstep")  # the category
    assert api.get("tj", "columns")["metadata"]["generation"] == 1  # a status is no change of the spec


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("spec", ["nodes", "-required-", "Slots: pods that train.", "Exactly one of trainer and command"]),
        ("spec.resilience.budgets.pod", ["Replacements of pods"]),
        ("spec.trainer.recipe.precision", ["ENUM: bf16 fp32 float8"]),
        ("spec.template", ["core/v1 PodTemplateSpec"]),
        ("status.faults", ["exitCode", "witness"]),
    ],
)
def test_explain_reads_well(api: Any, path: str, says: list[str]) -> None:
    text = " ".join(api.kubectl("explain", f"trainingjobs.{path}").split())
    for words in says:
        assert words in text


def test_every_object_has_a_description(crd: dict[str, Any]) -> None:
    """`kubectl explain` must never be empty-handed."""

    def walk(path: str, schema: dict[str, Any]) -> list[str]:
        missing = [] if schema.get("description") or not path else [path]
        for name, field in schema.get("properties", {}).items():
            missing += walk(f"{path}.{name}", field)
        if "items" in schema:
            missing += walk(f"{path}[]", {"description": "-", **schema["items"]})
        return missing

    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    assert walk("spec", root["spec"]) == []
