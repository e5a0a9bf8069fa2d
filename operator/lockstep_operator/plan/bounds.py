"""What agents say, cut to what a status can hold. Agents run beside users' programs, and whatever one of them says, the
status must stay below what etcd takes (1.5 MiB): beyond it nothing could be written any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

NAME_CHARACTERS = 253
"""Kubernetes' own bound for a node's name."""
SENTENCE_CHARACTERS = 1024
URI_CHARACTERS = 4096
RANKS = 1024
LISTED = 32
"""Nodes, devices or checks of one verdict or checkpoint."""
PARTS = 16
"""Of a recovery."""
CLASSES = 32
"""Of GPU time: leaders know about half as many."""


def name(text: str) -> str:
    """A cause, a witness, or what has a name."""
    return text[:NAME_CHARACTERS]


def names(texts: Sequence[str]) -> list[str]:
    """Several of them."""
    return [name(text) for text in texts[:LISTED]]


def sentence(text: str) -> str:
    """For people."""
    return text[:SENTENCE_CHARACTERS]


def seconds(parts: Mapping[str, float]) -> dict[str, float]:
    """Part of a recovery → seconds."""
    return {name(part): value for part, value in islice(parts.items(), PARTS)}
