"""What is remembered of nodes, in a ConfigMap: whole, readable, and never too large."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from lockstep_operator.noderecords import BYTES, Stored, read, write
from lockstep_operator.plan.nodes.records import Exclusion, NodeFault, NodeRecord, Records
from unit.operator.builders import START

FAULT = NodeFault(START, "6f0c-uid-of-a-job-with-36-characters", "llama-17-2", "NodeLost", 1.0, hard=True)
RECORDS: Records = {
    "gpu-1.example.com": NodeRecord((FAULT, replace(FAULT, at=START + 60, hard=False))),
    "gpu-2": NodeRecord((), Exclusion(START, "administrator", "cable", START + 3600), forgiven=START - 1),
    "gpu-3": NodeRecord((FAULT,), Exclusion(START, "score", "score 3.0 of 2, from 2 jobs: NodeLost 3x")),
}
EMPTY = Stored("lockstep", "nodes", "7")


def as_read(manifest: dict[str, Any]) -> Stored:
    return read({**manifest, "metadata": {**manifest["metadata"], "resourceVersion": "8"}})


def test_what_is_written_is_read_again() -> None:
    manifest = write(EMPTY, RECORDS, START)
    assert manifest["metadata"]["resourceVersion"] == "7"  # the server refuses it if somebody else was faster
    assert as_read(manifest).records == RECORDS


def test_people_can_read_it() -> None:
    one = json.loads(write(EMPTY, RECORDS, START)["data"]["gpu-2"])
    assert one["exclusion"]["by"] == "administrator"
    assert one["exclusion"]["until"] == "2023-11-14T23:13:20Z"


def test_a_record_that_can_not_be_read_is_left_as_it_is() -> None:
    """It is of a newer version, or of a hand that slipped."""
    manifest = write(EMPTY, RECORDS, START)
    manifest["data"]["gpu-9"] = '{"faults": 3}'
    stored = as_read(manifest)
    assert stored.records == RECORDS
    assert write(stored, {}, START)["data"] == {"gpu-9": '{"faults": 3}'}


def test_it_stays_below_the_limit_of_an_object_and_keeps_the_worst() -> None:
    full = tuple(replace(FAULT, at=START + n) for n in range(8))
    records: dict[str, NodeRecord] = {f"node-{number}": NodeRecord(full) for number in range(1000)}
    records |= {f"mild-{number}": NodeRecord((FAULT,)) for number in range(50)}
    records["out"] = NodeRecord((), Exclusion(START, "administrator", "cable"))
    for number, name in enumerate(list(records)):  # not all in one outage
        shifted = tuple(replace(fault, at=fault.at + 300 * number) for fault in records[name].faults)
        records[name] = replace(records[name], faults=shifted)
    data = write(EMPTY, records, START + 400_000)["data"]
    assert sum(len(name) + len(text) for name, text in data.items()) <= BYTES
    assert "out" in data
    assert not any(name.startswith("mild") for name in data)
    assert len(data) > 500
