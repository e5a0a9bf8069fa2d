"""The models refuse what the API server refuses, with the same words; the generated CRD is one that it can take.

The rules themselves run on a real API server in tests/integration/api, over the same table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from lockstep_api import generate
from lockstep_api.crd import custom_resource_definition
from lockstep_api.v1alpha1 import TrainingJob
from manifests import WRONG, Wrong, command_job, trainer_job

CRD = custom_resource_definition()
ROOT: dict[str, Any] = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def schemas(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below, with its path."""
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from schemas(field, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from schemas(schema[key], f"{path}[]")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.what)
def test_models_refuse_what_the_server_refuses_with_the_same_words(wrong: Wrong) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingJob.model_validate(wrong.manifest())
    for words in wrong.models_say or wrong.says:
        assert words in str(caught.value)


@pytest.mark.parametrize("manifest", [trainer_job(), command_job()], ids=["trainer", "command"])
def test_models_accept_what_is_right(manifest: dict[str, Any]) -> None:
    job = TrainingJob.model_validate(manifest)
    again = TrainingJob.model_validate({**manifest, "spec": job.spec.to_wire()})
    assert again.spec == job.spec  # defaults written out mean the same


def test_every_rule_that_joins_fields_is_in_the_table() -> None:
    """A rule that is added without a wrong manifest that it refuses fails here. Rules on changes have tests of their
    own."""
    told = " ".join(words for wrong in WRONG if wrong.by_rule for words in wrong.says)
    for path, schema in schemas(ROOT):
        for rule in schema.get("x-kubernetes-validations", ()):
            if "oldSelf" in rule["rule"]:
                continue
            message = rule.get("message") or rule["messageExpression"].split("'")[1]
            start = message.split("%d", maxsplit=1)[0].split(":")[0][:40]
            assert start in told, f"no wrong manifest for {path}: {message}"


def test_the_schema_is_structural() -> None:
    """What an API server refuses in a CRD, or does not understand."""
    for path, schema in schemas(ROOT):
        assert not {"$ref", "anyOf", "oneOf", "allOf", "const", "title", "$defs"} & set(schema), path
        assert not ("properties" in schema and "additionalProperties" in schema), path
        several = "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string"
        assert "type" in schema or any(schema.get(key) for key in several), path
        for bound in ("exclusiveMinimum", "exclusiveMaximum"):
            assert schema.get(bound, True) is True, path


def test_the_status_has_no_defaults_and_requires_nothing_at_its_top() -> None:
    """A default in the status would read as if somebody had observed it."""
    status = ROOT["properties"]["status"]
    assert "required" not in status
    assert [path for path, schema in schemas(status) if "default" in schema] == []


def test_a_default_of_a_part_says_only_what_differs() -> None:
    spec = ROOT["properties"]["spec"]["properties"]
    assert spec["resilience"]["default"] == {}
    assert spec["trainer"]["properties"]["tokenizer"]["default"] == {"train": {}}
    assert spec["nodes"].get("default") is None


def test_generated_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_the_reference_names_every_field_of_the_spec() -> None:
    text = generate.generated()["docs/reference/api.md"]
    for path, _ in schemas(ROOT["properties"]["spec"]):
        name = path.rsplit(".", 1)[-1].removesuffix("[]")
        assert f"`{name}`" in text or not name, path


def test_a_status_of_a_newer_operator_can_be_read() -> None:
    status = {"phase": "Running", "invented": {"later": 1}, "conditions": []}
    assert TrainingJob.model_validate({**command_job(), "status": status}).status.phase == "Running"
