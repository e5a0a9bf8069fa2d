"""The base of every part of the resource."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """Base of every part of the resource: frozen, camelCase outside, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    @classmethod
    def of_server(cls, document: Mapping[str, Any]) -> Self:
        """Read what an API server has admitted; raises ValidationError.

        Its definition of the resource may be newer than this code, since an upgrade replaces one part after the other,
        and the server fills in the defaults of fields that are unknown here. They are left out. What people write is
        read strictly, by ``model_validate``.
        """
        return cls.model_validate(document, extra="ignore")

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


# What has a pattern that is no list of words has examples too: a mistake is answered with them.
Uri = Annotated[
    str,
    StringConstraints(pattern=r"^(s3|file)://.+", max_length=1024),
    Field(examples=["s3://bucket/prefix", "file:///folder"]),
]

ModuleName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=253),
    Field(examples=["package.module:name"]),
]
"""``package.module:name``, importable in the trainer's container."""
