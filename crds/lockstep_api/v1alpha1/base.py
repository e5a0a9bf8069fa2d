"""The base of every part of the resource."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """Base of every part of the resource: frozen, camelCase outside, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    def to_wire(self) -> dict[str, Any]:
        """The JSON form, camelCase, without fields that are null."""
        wire: dict[str, Any] = json.loads(self.model_dump_json(by_alias=True, exclude_none=True))
        return wire


def cel(*rules: tuple[str, str]) -> ConfigDict:
    """CEL rules of a model as (rule, message); a message that starts with ``'`` is a CEL expression itself."""
    return ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {"rule": rule, ("messageExpression" if message.startswith("'") else "message"): message}
                for rule, message in rules
            ]
        }
    )


Uri = Annotated[str, StringConstraints(pattern=r"^(s3|file)://.+", max_length=1024)]

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=253)]
"""``package.module:name``, importable in the trainer's container."""
