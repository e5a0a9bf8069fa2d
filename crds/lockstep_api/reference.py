"""The API reference as Markdown, made from the CRD."""

from __future__ import annotations

import json
from typing import Any

Schema = dict[str, Any]


def api_reference(crd: dict[str, Any]) -> str:
    """One page: a table per object of spec and status, then the rules that join fields."""
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec, status = root["properties"]["spec"], root["properties"]["status"]
    lines = [
        "<!-- Generated from crds/lockstep_api/v1alpha1/ by `python -m lockstep_api.generate`; do not edit. -->",
        "# TrainingJob",
        "",
        f"`{crd['spec']['group']}/{crd['spec']['versions'][0]['name']}`, short name `tj`. {root['description']}",
        "",
        *_object("spec", spec),
        "## Rules",
        "",
        "What the API server refuses, beyond the types and bounds above, and what it says:",
        "",
        *(f"- {_message(rule)}" for rule in (*root["x-kubernetes-validations"], *_rules(spec))),
        "",
        *_object("status", status),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _object(path: str, schema: Schema) -> list[str]:
    lines = [
        f"## {path}",
        "",
        *([schema["description"], ""] if schema.get("description") else []),
        "| Field | Type | Default | Meaning |",
        "|---|---|---|---|",
    ]
    nested: list[tuple[str, Schema]] = []
    for name, field in schema["properties"].items():
        required = name in schema.get("required", ())
        default = "required" if required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        lines.append(f"| `{name}` | {_type(field)} | {default} | {_cell(field.get('description', ''))} |")
        inner = field.get("items", field.get("additionalProperties", field))
        if "properties" in inner:
            nested.append((f"{path}.{name}" + ("[]" if "items" in field else ""), inner))
    lines.append("")
    for inner_path, inner in nested:
        lines += _object(inner_path, inner)
    return lines


def _type(field: Schema) -> str:
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if "items" in field:
        return f"list of {_type(field['items'])}"
    if isinstance(field.get("additionalProperties"), dict):
        return f"map of {_type(field['additionalProperties'])}"
    otherwise = "integer or string" if "x-kubernetes-int-or-string" in field else "any scalar"
    kind: str = field.get("type", otherwise)
    low, high = field.get("minimum"), field.get("maximum")
    if low is None and high is None:
        return kind
    opening = ">" if field.get("exclusiveMinimum") else "≥"
    closing = "<" if field.get("exclusiveMaximum") else "≤"
    bounds = [f"{opening} {low}"] * (low is not None) + [f"{closing} {high}"] * (high is not None)
    return f"{kind}, {', '.join(bounds)}"


def _rules(schema: Schema) -> list[dict[str, str]]:
    rules = list(schema.get("x-kubernetes-validations", ()))
    for field in schema.get("properties", {}).values():
        rules += _rules(field)
    return rules


def _message(rule: dict[str, str]) -> str:
    if "message" in rule:
        return rule["message"]
    return rule["messageExpression"].split("'")[1].replace("%d", "*n*")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
