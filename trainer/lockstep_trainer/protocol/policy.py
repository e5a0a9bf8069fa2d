"""What a fault leads to: restart in place, another pod, or the end of the job. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from lockstep_api.tails import FATAL, of_a_dump, tail

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
SCRIPT_LOOP_SECONDS = 600.0
"""A script that ran for longer may have made progress that nobody sees: its end is no repetition."""
ALIKE_SECONDS, ALIKE_SHARE = 5.0, 0.2
"""So much, or such a share, may the times that a script ran differ by where it ended at the same place."""
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')
_UNCAUGHT = re.compile(r"^  what\(\):\s*(.+)$")
_RANK = re.compile(r"^\[rank\d+\]: ")
"""Before each line of an exception where torch prints it."""
_WORDS = 500
"""Characters that are kept of a process's last words."""


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
        if self.pattern is None or self.pattern in fault.found:
            return True
        return _in(self.pattern, (fault.error or "", *fault.log_tail))


@dataclass(frozen=True, slots=True)
class Ladder:
    """The job's rules: budgets of restarts in place, and what exit codes mean."""

    process_budget: int = 10
    in_process_budget: int = 20
    rules: tuple[RetryRule, ...] = ()
    script: bool = False
    """The workers are the user's own script: it reports no steps, and its exit codes mean what ``rules`` say."""


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
    ran: float = 0.0
    """Seconds since its generation was started."""
    slot: int | None = None
    rank: int | None = None
    exit_code: int | None = None
    error: str | None = None
    user_error: bool = False
    log_tail: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    """Patterns of rules that were in its output when that was judged, of which ``log_tail`` may have less since."""
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
    if ladder.script and (runs := _runs_alike(fault, earlier, ladder.rules)) >= CRASH_LOOP_FAIL:
        return Fail(
            "CrashLoop",
            f"{runs} runs of the script in a row ended with exit code {fault.exit_code}, each about {fault.ran:.0f} s "
            f"after its start, the last on rank {fault.rank}: {last_words(fault) or 'it said nothing'}; another "
            "restart would meet it again. Where it would not, say so in resilience.retry, with action Restart",
        )
    repeats = 1 if ladder.script else 1 + _repeats(fault, earlier)
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
        what = fault.error or _with_words(_exit_text(fault), fault)
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


def searched(fault: Fault, rules: Iterable[RetryRule]) -> Fault:
    """With the patterns of ``rules`` that are in its output, and of that as much as is remembered and reported: it is
    looked through once, and may be long."""
    patterns = dict.fromkeys(rule.pattern for rule in rules if rule.pattern is not None)
    found = tuple(pattern for pattern in patterns if _in(pattern, fault.log_tail))
    return replace(fault, found=found, log_tail=tuple(tail(fault.log_tail)))


def _in(pattern: str, lines: Iterable[str]) -> bool:
    return any(re.search(pattern, line) for line in lines)


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
        text = f"rank {fault.rank} refused its configuration or data (exit code 65)"
        return Fail("UserError", fault.error or _with_words(text, fault))
    rule = _rule_for(fault, rules)
    if rule is None or rule.action == "Restart":
        return None
    if rule.action == "ExcludeNode" and fault.slot is not None:
        return Replace(fault.slot, "resilience.retry blames its node", names_node=True)
    text = f"rank {fault.rank} ended by {_exit_text(fault)}, which resilience.retry declares fatal"
    reason = "FatalLogPattern" if rule.exit_codes is None else "FatalExitCode"
    return Fail(reason, _with_words(text, fault))


def _rule_for(fault: Fault, rules: Iterable[RetryRule]) -> RetryRule | None:
    return next((rule for rule in rules if rule.matches(fault)), None)


def _store_away(fault: Fault, ladder: Ladder) -> bool:
    """A worker of Lockstep's own says so; of a script's exit codes nothing is known but what its rules say."""
    return not ladder.script and fault.cause == "WorkerExited" and fault.exit_code == STORE_AWAY_EXIT


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


def _runs_alike(fault: Fault, earlier: Sequence[Fault], rules: Sequence[RetryRule]) -> int:
    """How many runs of a script in a row, the newest included, ended alike: by themselves, with one exit code, soon.

    A script's steps are not seen; the time that it ran stands in for them. A signal has a cause outside the process (a
    shell gives it as 128 and more), a GPU's error may go with another pod, and of others a rule may say that they do.
    """

    def own(end: Fault) -> bool:
        by_itself = end.cause == "WorkerExited" and 0 < (end.exit_code or 0) < 128 and end.ran < SCRIPT_LOOP_SECONDS
        return by_itself and not may_be_hardware(last_words(end)) and _rule_for(end, rules) is None

    def alike(end: Fault) -> bool:
        bound = max(ALIKE_SECONDS, ALIKE_SHARE * fault.ran)
        return own(end) and end.exit_code == fault.exit_code and abs(end.ran - fault.ran) <= bound

    return 1 + len(list(takewhile(alike, reversed(earlier)))) if own(fault) else 0


def _tried_in_process(fault: Fault, earlier: Sequence[Fault]) -> bool:
    """The newest fault was this one, and the lowest rung has not helped."""
    return bool(earlier) and earlier[-1].answer == "inProcess" and _alike(earlier[-1], fault)


def _is_exception(fault: Fault) -> bool:
    """Python ended the worker, and it left a sentence."""
    raised = (fault.exit_code or 0) > 0 and fault.exit_code != PEER_LOST_EXIT
    return fault.cause == "WorkerExited" and raised and bool(fault.error)


def last_words(fault: Fault) -> str:
    """What a process that ended by itself said of it: its error, else the last exception in its output, else the last
    line; of one that a signal ended where it was; "" where it said nothing."""
    if fault.error or fault.cause != "WorkerExited" or not fault.exit_code:
        return fault.error or ""
    if fault.exit_code < 0:
        return _crash(fault.log_tail)[:_WORDS]
    lines = [_RANK.sub("", line.rstrip()) for line in fault.log_tail if line.strip()]
    # Warnings of what is torn down behind an exception often come last.
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    raised = (line for line in lines[frames[-1] :] if not line.startswith(" ")) if frames else ()
    return next(iter(raised), lines[-1] if lines else "")[:_WORDS]


def _crash(lines: Sequence[str]) -> str:
    """``Segmentation fault in mine/read.py:12 tokens``, of what the interpreter's fault handler wrote last, and what a
    C++ exception said that nobody caught; "" where there is neither.

    A dump that other output follows was a child's, which the worker has outlived; so is what was said before it.
    """
    dump: list[str] = []
    said = ""
    for line in lines:
        begins = line.startswith(FATAL)
        if dump and (begins or not of_a_dump(line)):
            dump, said = [], ""
        if dump or begins:
            dump.append(line)
        elif found := _UNCAUGHT.match(line):
            said = said or found[1]
    words = "".join(dump[:1]).removeprefix(FATAL)
    for file, number, function in (found.groups() for found in map(_FRAME.match, dump) if found):
        words += f" in {'/'.join(file.split('/')[-2:])}:{number} {function}"
        break
    return ": ".join(filter(None, (words, said)))


def may_be_hardware(error: str) -> bool:
    """Whether a worker's exception may be its GPU's or the fabric's."""
    text = error.lower()
    return any(sign in text for sign in _OF_THE_DEVICE) and not any(sign in text for sign in _OF_THE_PROGRAM)


def _with_words(text: str, fault: Fault) -> str:
    words = last_words(fault)
    return f"{text}: {words}" if words else text


def _exit_text(fault: Fault) -> str:
    if fault.exit_code is None:
        return fault.cause
    return f"signal {-fault.exit_code}" if fault.exit_code < 0 else f"exit code {fault.exit_code}"
