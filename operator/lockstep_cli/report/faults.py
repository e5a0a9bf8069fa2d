"""Adds to a journal what only the operator saw: a leader that goes down with its node writes no line about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lockstep_api.v1alpha1 import Fault as StatusFault
from lockstep_cli import times
from lockstep_cli.journal import Fault, Journal

_LOST = ("pod", "spare", "shrink", "requeue")
"""Rungs of faults that took a pod."""
_SLACK_SECONDS = 2.0
"""The status has whole seconds, and clocks differ a little."""


def with_status(journal: Journal, faults: Sequence[StatusFault]) -> Journal:
    """The journal, its faults without a witness told in the operator's words where the status has them."""
    unmatched = list(faults)
    told = [_told_by(fault, unmatched, journal.end) for fault in journal.faults]
    return replace(journal, faults=tuple(told))


def _told_by(fault: Fault, unmatched: list[StatusFault], end: float) -> Fault:
    if fault.witness:
        return fault
    until = (fault.recovered_at or end) + _SLACK_SECONDS
    seen = next(
        (
            each
            for each in unmatched
            if each.rung in _LOST and fault.at - _SLACK_SECONDS <= times.parse(each.at) <= until
        ),
        None,
    )
    if seen is None:
        return fault
    unmatched.remove(seen)
    detect = {"detect": seen.seconds["detect"]} if "detect" in seen.seconds else {}
    return replace(
        fault,
        cause=seen.cause,
        rung=seen.rung,
        witness=seen.witness,
        node=seen.node or fault.node,
        rank=seen.rank,
        exit_code=seen.exit_code,
        log_tail=tuple(seen.log_tail) or fault.log_tail,
        message=seen.message or fault.message,
        seconds={**fault.seconds, **detect},
    )
