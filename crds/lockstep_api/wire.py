"""Messages as JSON text, and back. What does not fit is refused with the place that is wrong."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from lockstep_api.messages import Message

KEYS_ONLY = ConfigDict(cache_strings="keys")
"""Who reads JSON all day keeps only its keys. Otherwise pydantic also keeps short values, up to 16,384 of them:
checksums and names that never come again, until after hours the process has grown by megabytes."""

_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")], config=KEYS_ONLY)


class WireError(ValueError):
    """A text is no message of this protocol version."""


def encode(message: Message) -> str:
    """The message as one line of JSON."""
    return _MESSAGE.dump_json(message).decode()


def decode(text: str | bytes) -> Message:
    """The message in ``text``; raises WireError."""
    try:
        return _MESSAGE.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise WireError(f"message refused at {place or 'its start'}: {first['msg']}") from None
