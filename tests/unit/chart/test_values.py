"""values.yaml, its schema and its reference say the same; a wrong value is refused with the place that is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import reference

REPOSITORY = Path(__file__).resolve().parents[3]
CHART = REPOSITORY / "charts/lockstep"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def sections(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every closed object of the schema with its path."""
    if "properties" in schema:
        yield path, schema
        for key, inner in schema["properties"].items():
            yield from sections(inner, (*path, key))


def test_the_defaults_fit_the_schema() -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(VALUES)


def test_the_schema_knows_the_values_and_no_others() -> None:
    for path, schema in sections(SCHEMA):
        assert schema["additionalProperties"] is False, f"{'.'.join(path)} accepts unknown values"
        values = VALUES
        for key in path:
            values = values[key]
        if path == ("resources",):  # core/v1 ResourceRequirements, of which the defaults set a part
            continue
        assert set(schema["properties"]) - {"global"} == set(values), ".".join(path)


def test_every_value_is_described() -> None:
    described = reference.read_values((CHART / "values.yaml").read_text())
    assert [value.path for value in described if not value.comment] == []
    assert len(described) > 40  # the reader of values.yaml has not lost most of them


def test_no_section_hides_its_values_in_a_row_of_its_own() -> None:
    described = {value.path for value in reference.read_values((CHART / "values.yaml").read_text())}
    closed = {".".join(path) for path, _ in sections(SCHEMA)} - {"resources"}
    assert not closed & described


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 3}, "at '/replicas': maximum: got 3, want 2"),
        ({"replica": 1}, "additional properties 'replica' not allowed"),
        ({"image": {"tagg": "dev"}}, "at '/image': additional properties 'tagg' not allowed"),
        ({"image": {"pullPolicy": "always"}}, "at '/image/pullPolicy': value must be one of 'Always'"),
        ({"image": {"digest": "abc"}}, "at '/image/digest': 'abc' does not match pattern"),
        ({"watchNamespaces": "team-a"}, "at '/watchNamespaces': got string, want array"),
        ({"watchNamespaces": ["Team A"]}, "at '/watchNamespaces/0': 'Team A' does not match pattern"),
        ({"masterKey": {"value": "short"}}, "at '/masterKey/value'"),
        ({"metrics": {"podMonitor": {"interval": "15"}}}, "at '/metrics/podMonitor/interval'"),
        ({"logLevel": "loud"}, "at '/logLevel': value must be one of 'debug', 'info', 'warning', 'error'"),
        ({"nodes": {"excludeShare": 10}}, "at '/nodes/excludeShare': maximum: got 10, want 1"),
        (
            {"preflight": {"findings": {"gpus": {}}}},
            "at '/preflight/findings': additional properties 'gpus' not allowed",
        ),
        (
            {"preflight": {"findings": {"xids": {"63": {"severity": "bad"}}}}},
            "at '/preflight/findings/xids/63/severity'",
        ),
        ({"podLabels": {"a": 1}}, "at '/podLabels/a': got number, want string"),
    ],
    ids=lambda value: yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_with_its_place(template: Any, values: dict[str, Any], message: str) -> None:
    result = template(values=values)
    assert result.returncode != 0
    assert message in result.stderr
