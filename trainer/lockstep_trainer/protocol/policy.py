"""What a fault leads to: restart in place, another pod, or the end of the job. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

USER_ERROR_EXIT = 65
"""EX_DATAERR of sysexits.h: the worker says that its configuration or data is wrong."""
PEER_LOST_EXIT = 75
"""EX_TEMPFAIL: a collective failed since another worker went away; never the root of a fault."""
STORE_AWAY_EXIT = 69
"""EX_UNAVAILABLE of sysexits.h: a store that the worker needs does not answer, and it could not wait in its place."""
CORRUPTION = "Corruption"
"""Cause of a fault that ranks were found to compute wrong numbers."""
SUSPECTED = "CorruptionSuspected"
"""Of one that some do, and nobody can say who: see ``dispute``."""
CRASH_LOOP_REPLACE = 2
CRASH_LOOP_FAIL = 3
"""So many faults in a row of one rank at one step are no chance: another pod is tried, then the job fails."""
_OF_THE_DEVICE = ("cuda error", "cublas", "cudnn", "nccl", "ecc")
"""In an exception's text: the GPU or its fabric may be to blame, not the program."""
_OF_THE_PROGRAM = ("device-side assert", "out of memory")
"""In one of these, all the same: an index that is out of range, a batch that is too large."""
CONTAINER_RESTART_WINDOW = 600.0
"""Seconds: a second container restart of one slot within this time goes a rung up."""


@dataclass(frozen=True, slots=True)
class RetryRule:
    """Ends of a worker that have a meaning of their own."""

    action: Literal["Restart", "Fail", "ExcludeNode"]
    exit_codes: frozenset[int] | None = None
    """None: any."""
    pattern: str | None = None
    """Searched for in the error and the last lines of output; None: any."""

    def matches(self, fault: Fault) -> bool:
        """Whether the worker ended like this."""
        if self.exit_codes is not None and fault.exit_code not in self.exit_codes:
            return False
        lines = (fault.error or "", *fault.log_tail)
        return self.pattern is None or any(re.search(self.pattern, line) for line in lines)


@dataclass(frozen=True, slots=True)
class Ladder:
    """The job's rules: budgets of restarts in place, and what exit codes mean."""

    process_budget: int = 10
    in_process_budget: int = 20
    rules: tuple[RetryRule, ...] = ()
    crash_loops: bool = True
    """Watch for faults that repeat at one step; pointless where the workers report no steps."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one generation, as far as it is known."""

    cause: str  # WorkerExited, AgentLost, StoreLost, Hang, ContainerRestarted, MemberLost, Corruption …
    witness: str  # exit, stream, heartbeat, progress, arbiter
    at: float
    """When it happened, as near as is known."""
    noticed: float
    """When the leader heard of it."""
    step: int = 0
    """Newest step of its generation."""
    slot: int | None = None
    rank: int | None = None
    exit_code: int | None = None
    error: str | None = None
    user_error: bool = False
    log_tail: tuple[str, ...] = ()
    pod: str = ""
    """Of a rank that computes wrong numbers."""
    answer: str = ""
    """The rung that answered it, once it is judged."""


@dataclass(frozen=True, slots=True)
class Used:
    """Restarts since the last checkpoint beyond a fault became durable."""

    process: int = 0
    in_process: int = 0


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the next generation with the same members."""

    rung: Literal["inProcess", "process", "container"]


@dataclass(frozen=True, slots=True)
class Replace:
    """Give the slot to another pod."""

    slot: int
    why: str
    names_node: bool = False
    """A rule of the job's says that the node is to blame."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The job can't succeed."""

    reason: str
    message: str


Decision = Restart | Replace | Fail


def root_cause(suspects: Iterable[Fault]) -> Fault:
    """The fault that the others follow from.

    One dead worker makes its peers' collectives fail, so several exits are reported within milliseconds, in any order.
    Wrong numbers explain whatever else is said of them; a user's error speaks for itself; a signal has a cause outside
    the process, and so has the restart of a whole container; a worker that says that it lost a peer is a victim; of the
    rest the earliest is the root.
    """

    def weight(fault: Fault) -> tuple[int, float]:
        if fault.cause in (CORRUPTION, SUSPECTED):
            return (-1, fault.at)
        if fault.user_error or fault.exit_code == USER_ERROR_EXIT:
            return (0, fault.at)
        if fault.cause == "ContainerRestarted" or (fault.exit_code is not None and fault.exit_code < 0):
            return (1, fault.at)
        if fault.exit_code == PEER_LOST_EXIT:
            return (3, fault.at)
        return (2, fault.at)

    return min(suspects, key=weight)


def decide(fault: Fault, earlier: Sequence[Fault], used: Used, ladder: Ladder, *, intact: bool = False) -> Decision:
    """The cheapest rung that can work for ``fault``.

    ``earlier`` are the faults before it, oldest first; ``intact``: no worker has ended, all of them rest.
    """
    if fault.cause == CORRUPTION:
        return _of_corruption(fault, earlier)
    if fault.cause == SUSPECTED:
        # Memory is written anew by new processes; what goes on in the old ones is suspected too.
        return Restart("process") if fault.slot is None else Replace(fault.slot, "its rank may compute wrong numbers")
    if fault.cause == "WorkerExited" and (said := _rules_say(fault, ladder.rules)):
        return said
    if _store_away(fault, ladder):
        return Restart("process")  # as often as it takes: another pod would meet the same
    repeats = 1 + _repeats(fault, earlier) if ladder.crash_loops else 1
    if intact and repeats == 1 and not _tried_in_process(fault, earlier) and used.in_process < ladder.in_process_budget:
        return Restart("inProcess")
    where = f"at step {fault.step}" + ("" if fault.rank is None else f" on rank {fault.rank}")
    again = repeats >= CRASH_LOOP_REPLACE and _is_exception(fault) and earlier[-1].error == fault.error
    if again and not may_be_hardware(fault.error or ""):
        return Fail(
            "RepeatedError",
            f"two faults in a row {where}, each in a process of its own, with the same exception: {fault.error}; "
            "another restart would meet it again; its last checkpoint is kept",
        )
    if repeats >= CRASH_LOOP_FAIL:
        what = fault.error or _exit_text(fault)
        return Fail("CrashLoop", f"{repeats} faults in a row {where}, the last on another pod's turn: {what}")
    if fault.cause == "ContainerRestarted":
        again = any(
            other.cause == fault.cause and other.slot == fault.slot and fault.at - other.at < CONTAINER_RESTART_WINDOW
            for other in earlier
        )
        if again and fault.slot is not None:
            return Replace(fault.slot, "its container was restarted twice within ten minutes")
        return Restart("container")
    if fault.slot is not None:
        if repeats >= CRASH_LOOP_REPLACE:
            return Replace(fault.slot, f"two faults in a row {where}")
        if used.process >= ladder.process_budget:
            return Replace(fault.slot, f"resilience.budgets.process ({ladder.process_budget}) is used up")
    elif used.process >= ladder.process_budget:
        return Fail(
            "BudgetExceeded",
            f"resilience.budgets.process ({ladder.process_budget}) is used up and no rank is to blame for the last "
            f"fault: {fault.cause} {where}",
        )
    return Restart("process")


def _of_corruption(fault: Fault, earlier: Iterable[Fault]) -> Decision:
    """A rank that was found to compute wrong numbers loses its pod. The same rank, at the same step, on another pod:
    then it is no GPU, and another rollback would meet it again."""
    if fault.slot is None:
        return Fail("CorruptionUndecided", fault.error or "ranks disagree, and nobody can say who is wrong")
    same = (CORRUPTION, fault.rank, fault.step)
    before = [
        other.pod for other in earlier if (other.cause, other.rank, other.step) == same and other.pod != fault.pod
    ]
    if before:
        return Fail(
            "CorruptionRepeated",
            f"rank {fault.rank} was found to compute wrong numbers at step {fault.step} in {before[-1]} and then in "
            f"{fault.pod}: {fault.error}. Where they were on different nodes it is the program that does not repeat "
            "itself: set resilience.corruption.action to Report",
        )
    return Replace(fault.slot, "its rank computes wrong numbers", names_node=True)


def blame(fault: Fault, decision: Decision) -> Literal["", "Suspected", "Named"]:
    """What the fault says against its node, which the operator remembers across jobs: a rule names it, or the worker's
    error may be its GPU's or the fabric's."""
    if isinstance(decision, Replace) and decision.names_node:
        return "Named"
    worker = fault.cause == "WorkerExited" and not fault.user_error and not isinstance(decision, Fail)
    return "Suspected" if worker and may_be_hardware(fault.error or "") else ""


def _rules_say(fault: Fault, rules: Iterable[RetryRule]) -> Decision | None:
    if fault.user_error or fault.exit_code == USER_ERROR_EXIT:
        return Fail("UserError", fault.error or f"rank {fault.rank} refused its configuration or data (exit code 65)")
    rule = next((rule for rule in rules if rule.matches(fault)), None)
    if rule is None or rule.action == "Restart":
        return None
    if rule.action == "ExcludeNode" and fault.slot is not None:
        return Replace(fault.slot, "resilience.retry blames its node", names_node=True)
    text = f"rank {fault.rank} ended by {_exit_text(fault)}, which resilience.retry declares fatal"
    reason = "FatalLogPattern" if rule.exit_codes is None else "FatalExitCode"
    return Fail(reason, f"{text}: {fault.error}" if fault.error else text)


def _store_away(fault: Fault, ladder: Ladder) -> bool:
    """A worker of Lockstep's own says so; of a script's exit codes nothing is known but what its rules say."""
    return ladder.crash_loops and fault.cause == "WorkerExited" and fault.exit_code == STORE_AWAY_EXIT


def _repeats(fault: Fault, earlier: Sequence[Fault]) -> int:
    """How many of the newest earlier faults were at the same step and place, without another between; those that the
    lowest rung has answered do not count, nor does a store's outage."""
    count = 0
    for other in reversed(earlier):
        if not _alike(other, fault):
            break
        count += other.answer != "inProcess" and other.exit_code != STORE_AWAY_EXIT
    return count


def _alike(other: Fault, fault: Fault) -> bool:
    """At the same step and place. An exception that all ranks raise is reported of any of them."""
    same = other.rank == fault.rank or (_is_exception(fault) and other.error == fault.error)
    return (other.step, other.cause) == (fault.step, fault.cause) and same


def _tried_in_process(fault: Fault, earlier: Sequence[Fault]) -> bool:
    """The newest fault was this one, and the lowest rung has not helped."""
    return bool(earlier) and earlier[-1].answer == "inProcess" and _alike(earlier[-1], fault)


def _is_exception(fault: Fault) -> bool:
    """Python ended the worker, and it left a sentence."""
    raised = (fault.exit_code or 0) > 0 and fault.exit_code != PEER_LOST_EXIT
    return fault.cause == "WorkerExited" and raised and bool(fault.error)


def may_be_hardware(error: str) -> bool:
    """Whether a worker's exception may be its GPU's or the fabric's."""
    text = error.lower()
    return any(sign in text for sign in _OF_THE_DEVICE) and not any(sign in text for sign in _OF_THE_PROGRAM)


def _exit_text(fault: Fault) -> str:
    if fault.exit_code is None:
        return fault.cause
    return f"signal {-fault.exit_code}" if fault.exit_code < 0 else f"exit code {fault.exit_code}"
