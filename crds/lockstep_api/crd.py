"""The CustomResourceDefinition, made from the pydantic models.

A CRD wants a *structural* schema: no ``$ref``, no ``anyOf`` with null, no ``const``, no ``additionalProperties``
beside ``properties``, every value with a type. pydantic's JSON schema has all of these; ``structural`` takes them out
and keeps what a reader of ``kubectl explain`` needs: descriptions, defaults, bounds and CEL rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob, TrainingJobSpec, TrainingJobStatus

Schema = dict[str, Any]

_KEPT = (
    "type", "format", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems",
    "maxProperties", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
    "x-kubernetes-validations", "x-kubernetes-int-or-string",
)  # fmt: skip

PRINTER_COLUMNS: list[dict[str, Any]] = [
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase", "description": "Where the job stands"},
    {"name": "Ready", "type": "string", "jsonPath": ".status.ready", "description": "Members ready, of nodes"},
    {"name": "Step", "type": "string", "jsonPath": ".status.step", "description": "Steps done, of all"},
    # A string: a number column would show 2.1130000001 where the training loss is meant.
    {"name": "Loss", "type": "string", "jsonPath": ".status.loss", "description": "Loss of the last step, in nats"},
    {"name": "Restarts", "type": "integer", "jsonPath": ".status.restarts.total", "description": "Restarts, all rungs"},
    {"name": "Goodput", "type": "string", "jsonPath": ".status.goodputPercent", "description": "Productive GPU time"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp", "description": "Age of the object"},
]


def custom_resource_definition() -> dict[str, Any]:
    """The whole CRD, ready to be written as YAML."""
    root: Schema = {
        "type": "object",
        "description": one_line(TrainingJob.__doc__),
        "required": ["spec"],
        "x-kubernetes-validations": TrainingJob.model_json_schema()["x-kubernetes-validations"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{constants.API_VERSION}."},
            "kind": {"type": "string", "description": f"{constants.KIND}."},
            "metadata": {"type": "object"},
            "spec": structural(TrainingJobSpec),
            "status": without_defaults(structural(TrainingJobStatus)),
        },
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{constants.PLURAL}.{constants.GROUP}"},
        "spec": {
            "group": constants.GROUP,
            "names": {
                "kind": constants.KIND,
                "listKind": f"{constants.KIND}List",
                "plural": constants.PLURAL,
                "singular": constants.KIND.lower(),
                "shortNames": ["tj"],
                "categories": ["all", "lockstep"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": constants.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": PRINTER_COLUMNS,
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of a model."""
    schema = model.model_json_schema(by_alias=True)
    return _Converter(schema.get("$defs", {}), _factory_defaults(model)).convert(schema)


def without_defaults(schema: Schema) -> Schema:
    """The status takes no defaults: what nobody wrote is absent, not 0."""
    kept = {key: value for key, value in schema.items() if key != "default"}
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = without_defaults(kept[key])
    if "properties" in kept:
        kept["properties"] = {name: without_defaults(field) for name, field in kept["properties"].items()}
    return kept


def one_line(text: str | None) -> str:
    """A docstring as a single line."""
    return " ".join((text or "").split())


def _factory_defaults(model: type[BaseModel]) -> dict[tuple[str, str], Any]:
    """Defaults that pydantic's schema leaves out, by (model, field): sub-models made by a factory. Only what differs
    from the sub-model's own defaults is said; the API server fills in the rest."""
    found: dict[tuple[str, str], Any] = {}
    for name, field in model.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= _factory_defaults(part)
        value = field.get_default(call_default_factory=True) if field.default_factory else None
        if isinstance(value, BaseModel):
            found[model.__name__, field.alias or name] = value.model_dump(
                by_alias=True, exclude_defaults=True, mode="json"
            )
    return found


@dataclass(frozen=True, slots=True)
class _Converter:
    definitions: dict[str, Schema]
    factory_defaults: dict[tuple[str, str], Any]

    def convert(self, source: Schema, default: Any = None) -> Schema:
        source = self._resolve(source)
        # Several scalar types: a structural schema can say "integer or string", or else only "any value".
        if "anyOf" in source and "x-kubernetes-int-or-string" not in source:
            source = {**source, "x-kubernetes-preserve-unknown-fields": True}

        target: Schema = {}
        if description := one_line(source.get("description")):
            target["description"] = description
        target |= {key: source[key] for key in _KEPT if key in source}
        default = source.get("default") if default is None else default
        if default is not None:
            target["default"] = default
        if source.get("type") == "integer":
            target["format"] = "int64"
        for bound in ("Minimum", "Maximum"):  # OpenAPI 3.0 has a flag where JSON schema has a number
            if (value := source.get(f"exclusive{bound}")) is not None:
                target[bound.lower()] = value
                target[f"exclusive{bound}"] = True
        if words := alternatives(target.get("pattern", "")):
            del target["pattern"]
            target["enum"] = words

        if "properties" in source:
            model = source.get("title", "")
            target["properties"] = {
                name: self.convert(field, self.factory_defaults.get((model, name)))
                for name, field in source["properties"].items()
            }
            if required := [name for name in source.get("required", ()) if "default" not in target["properties"][name]]:
                target["required"] = required
        elif isinstance(source.get("additionalProperties"), dict):
            target["additionalProperties"] = self.convert(source["additionalProperties"])
        elif source.get("type") == "object":  # a dict of anything
            target["x-kubernetes-preserve-unknown-fields"] = True
        if "items" in source:
            target["items"] = self.convert(source["items"])
        return target

    def _resolve(self, source: Schema) -> Schema:
        """``source`` with ``$ref`` followed and ``anyOf`` with null unwrapped. The field's description comes first,
        then its type's: the first says what the field is for, the second what it holds."""
        beside = {key: value for key, value in source.items() if key not in ("$ref", "anyOf", "$defs")}
        if "anyOf" in source:
            options = [option for option in source["anyOf"] if option != {"type": "null"}]
            if len(options) > 1:
                return {**beside, "anyOf": options}
            return self._resolve({**options[0], **{k: v for k, v in beside.items() if k != "title"}})
        if "$ref" not in source:
            return beside
        referred = self.definitions[source["$ref"].rsplit("/", 1)[1]]
        texts = [one_line(source.get("description")), one_line(referred.get("description"))]
        if texts[1].rstrip(".") in texts[0]:
            texts.pop()
        return self._resolve({**referred, **beside, "title": referred["title"], "description": " ".join(texts).strip()})


def alternatives(pattern: str) -> list[str] | None:
    """The words of a pattern like ``^(a|b)$``. The API server's message for an enum lists them; for a pattern it
    shows the expression."""
    match = re.fullmatch(r"\^\(?([\w|]+)\)?\$", pattern)
    return match[1].split("|") if match else None
