"""What is remembered of nodes, as it lies in a ConfigMap of the operator's namespace: one key per node, JSON that
people can read. The operator and the command-line tool both write it, each with the version that it read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from lockstep_api import constants
from lockstep_operator.kube import Manifest
from lockstep_operator.plan.nodes.records import Exclusion, NodeFault, NodeRecord, Records
from lockstep_operator.plan.nodes.score import scores
from lockstep_operator.plan.times import rfc3339, unix

log = logging.getLogger(__name__)

BYTES = 700_000
"""An object may have 1 MiB (etcd's limit is 1.5). A record has at most 1.2 kB, and at Meta's failure rates 2,000 nodes
have 370 faults in four weeks (docs/design/nodes.md): the limit is for what nobody expects."""


class _Wire(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


class _Fault(_Wire):
    at: str
    job: str = ""
    pod: str = ""
    cause: str
    weight: float
    hard: bool = False


class _Exclusion(_Wire):
    since: str
    by: str
    reason: str = ""
    until: str | None = None


class _Record(_Wire):
    faults: list[_Fault] = []
    exclusion: _Exclusion | None = None
    forgiven: str | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """The ConfigMap as it was read. ``version`` is empty where there is none yet."""

    namespace: str
    name: str
    version: str = ""
    records: Records = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)  # of a newer version, or of a hand that slipped


def read(manifest: Manifest) -> Stored:
    """The records in a ConfigMap."""
    records: dict[str, NodeRecord] = {}
    unreadable: dict[str, str] = {}
    for node, text in (manifest.get("data") or {}).items():
        try:
            records[node] = _decode(_Record.model_validate_json(text))
        except (ValidationError, ValueError) as error:
            log.warning("record of node %s can't be read: %s", node, error)
            unreadable[node] = text
    metadata = manifest["metadata"]
    return Stored(metadata["namespace"], metadata["name"], metadata["resourceVersion"], records, unreadable)


def write(stored: Stored, records: Records, now: float) -> Manifest:
    """The ConfigMap with these records in place of ``stored``'s: the server refuses it if it has changed since."""
    data = dict(stored.unreadable) | {node: _encode(record) for node, record in records.items()}
    size = sum(len(node) + len(text) for node, text in data.items())
    if size > BYTES:  # the least suspicious go first; an exclusion stays
        values = scores(records, now)
        for node in sorted(records, key=lambda node: values[node]):
            if size <= BYTES:
                break
            if records[node].exclusion is None:
                size -= len(node) + len(data.pop(node))
    metadata: dict[str, Any] = {
        "name": stored.name,
        "namespace": stored.namespace,
        "labels": {constants.LABEL_NODE_MEMORY: "true"},
    }
    if stored.version:
        metadata["resourceVersion"] = stored.version
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _encode(record: NodeRecord) -> str:
    wire = _Record(
        faults=[
            _Fault(at=rfc3339(one.at), job=one.job, pod=one.pod, cause=one.cause, weight=one.weight, hard=one.hard)
            for one in record.faults
        ],
        exclusion=_exclusion(record.exclusion) if record.exclusion else None,
        forgiven=_text(record.forgiven),
    )
    return wire.model_dump_json(by_alias=True, exclude_defaults=True)


def _exclusion(one: Exclusion) -> _Exclusion:
    return _Exclusion(since=rfc3339(one.since), by=one.by, reason=one.reason, until=_text(one.until))


def _text(time: float | None) -> str | None:
    return None if time is None else rfc3339(time)


def _decode(wire: _Record) -> NodeRecord:
    one = wire.exclusion
    return NodeRecord(
        faults=tuple(NodeFault(unix(one.at), one.job, one.pod, one.cause, one.weight, one.hard) for one in wire.faults),
        exclusion=Exclusion(unix(one.since), one.by, one.reason, _time(one.until)) if one else None,
        forgiven=_time(wire.forgiven),
    )


def _time(text: str | None) -> float | None:
    return None if text is None else unix(text)
