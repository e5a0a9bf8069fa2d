"""What a fault leads to: the ladder as tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockstep_trainer.protocol.policy import (
    Decision,
    Fail,
    Fault,
    Ladder,
    Replace,
    Restart,
    RetryRule,
    Used,
    blame,
    decide,
    last_words,
    root_cause,
)

CRASH = Fault("WorkerExited", "exit", at=100.0, noticed=100.1, step=7, slot=1, rank=3, exit_code=-11)
RAISED = replace(CRASH, exit_code=1, error="IndexError: list index out of range")
DEVICE = replace(RAISED, error="AcceleratorError: CUDA error: uncorrectable ECC error encountered")
AWAY = replace(RAISED, exit_code=69, error="read s3://texts/0.tokens: no connection")
RULES = Ladder(
    process_budget=2,
    rules=(
        RetryRule("Fail", frozenset({3})),
        RetryRule("Restart", frozenset({4})),
        RetryRule("ExcludeNode", frozenset({9}), r"NVLink.*down"),
        RetryRule("Fail", pattern="licence .* expired"),
    ),
)


CRASHED = (
    "step 3",
    "Fatal Python error: Segmentation fault",
    "",
    "Current thread 0x00007f2bfb45db80 (most recent call first):",
    '  File "/home/me/mine/read.py", line 12 in tokens',
    '  File "/home/me/mine/train.py", line 80 in <module>',
)


WATCHDOG = "[PG 0 Rank 3] Process group watchdog thread terminated with exception: CUDA error"
UNCAUGHT = ("terminate called after throwing an instance of 'c10::DistBackendError'", f"  what():  {WATCHDOG}")


CHILDS = (
    "  what():  bad archive",
    "Fatal Python error: Bus error",
    "",
    "Stack (most recent call first):",
    '  File "/home/me/mine/loader.py", line 3 in fetch',
    "",
    "Extension modules: numpy.core._multiarray_umath (total: 1)",
)
"""What one of the worker's processes wrote that crashed."""


def fault(**changes: object) -> Fault:
    return replace(CRASH, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "earlier", "used", "expected"),
    [
        pytest.param(CRASH, [], 0, Restart("process"), id="first crash"),
        pytest.param(CRASH, [fault(step=5)], 1, Restart("process"), id="crash at another step"),
        pytest.param(CRASH, [fault(rank=2)], 1, Restart("process"), id="crash of another rank"),
        pytest.param(CRASH, [CRASH], 1, Replace, id="same rank and step twice in a row: another pod"),
        pytest.param(CRASH, [CRASH, fault(step=5)], 1, Restart("process"), id="twice, but not in a row"),
        pytest.param(CRASH, [CRASH, CRASH], 1, Fail, id="three times: no pod will help"),
        pytest.param(RAISED, [RAISED], 1, Fail, id="an exception on a fresh process again: the program's own"),
        pytest.param(replace(RAISED, rank=2), [RAISED], 1, Fail, id="an exception of all ranks, another one first"),
        pytest.param(RAISED, [replace(RAISED, error="KeyError: 1", step=6)], 1, Restart("process"), id="another error"),
        pytest.param(DEVICE, [DEVICE], 1, Replace, id="an exception that hardware may have caused: another pod"),
        pytest.param(replace(RAISED, exit_code=75), [replace(RAISED, exit_code=75)], 1, Replace, id="lost peers"),
        pytest.param(AWAY, [AWAY, AWAY, AWAY], 2, Restart("process"), id="a store is away: no pod brings it back"),
        pytest.param(CRASH, [AWAY], 1, Restart("process"), id="a crash where a store was away before"),
        pytest.param(fault(step=9), [CRASH], 2, Replace, id="budget is used up"),
        pytest.param(fault(exit_code=65), [], 0, Fail, id="EX_DATAERR"),
        pytest.param(fault(exit_code=1, user_error=True), [], 0, Fail, id="user error"),
        pytest.param(fault(exit_code=3), [], 0, Fail, id="declared fatal"),
        pytest.param(fault(exit_code=4), [], 0, Restart("process"), id="declared harmless"),
        pytest.param(fault(exit_code=9, log_tail=("a", "NVLink 3 is down")), [], 0, Replace, id="its node is blamed"),
        pytest.param(fault(exit_code=9, log_tail=("a",)), [], 0, Restart("process"), id="the code without the line"),
        pytest.param(fault(error="the licence has expired"), [], 0, Fail, id="a line that is declared fatal"),
        pytest.param(fault(cause="Hang", slot=None, rank=None, exit_code=None), [], 2, Fail, id="nobody to replace"),
        pytest.param(fault(cause="ContainerRestarted"), [], 5, Restart("container"), id="container, once"),
        pytest.param(
            fault(cause="ContainerRestarted", at=500.0, step=9), [fault(cause="ContainerRestarted")], 0, Replace,
            id="container, twice within ten minutes",
        ),
        pytest.param(
            fault(cause="ContainerRestarted", at=900.0, step=9), [fault(cause="ContainerRestarted")], 0,
            Restart("container"), id="container, twice in a quarter of an hour",
        ),
    ],
)  # fmt: skip
def test_decide(now: Fault, earlier: list[Fault], used: int, expected: Decision | type) -> None:
    """Each rung only when the cheaper one can't work."""
    decision = decide(now, earlier, Used(process=used), RULES)
    if isinstance(expected, type):
        assert isinstance(decision, expected), decision
    else:
        assert decision == expected


LOST = replace(CRASH, exit_code=75)
IN_PROCESS = replace(LOST, answer="inProcess")
ANEW = replace(LOST, answer="process")


@pytest.mark.parametrize(
    ("now", "earlier", "used", "expected"),
    [
        pytest.param(LOST, [], Used(), Restart("inProcess"), id="nobody has ended"),
        pytest.param(LOST, [replace(IN_PROCESS, step=6)], Used(), Restart("inProcess"), id="at another step"),
        pytest.param(LOST, [IN_PROCESS], Used(), Restart("process"), id="again: new processes"),
        pytest.param(LOST, [IN_PROCESS, ANEW], Used(), Replace, id="and again: another pod"),
        pytest.param(LOST, [IN_PROCESS, ANEW, replace(ANEW, answer="pod")], Used(), Fail, id="no pod helps"),
        pytest.param(LOST, [], Used(in_process=3), Restart("process"), id="budget is used up"),
        pytest.param(LOST, [], Used(in_process=3, process=2), Replace, id="both are"),
        pytest.param(fault(exit_code=65), [], Used(), Fail, id="rules come first"),
    ],
)
def test_where_all_workers_rest_the_lowest_rung_is_tried_once(
    now: Fault, earlier: list[Fault], used: Used, expected: Decision | type
) -> None:
    decision = decide(now, earlier, used, replace(RULES, in_process_budget=3), intact=True)
    assert decision == expected or (isinstance(expected, type) and isinstance(decision, expected)), decision


VALUE = "ValueError: no closing tag"
SAID = (
    "Traceback (most recent call last):",
    '  File "train.py", line 3, in <module>',
    "    raise",
    VALUE,
    "",
    "W: teardown",
)
SCRIPT = Ladder(process_budget=10, script=True, rules=(RetryRule("Restart", frozenset({4})),))


def run(ran: float = 3.0, **changes: object) -> Fault:
    """The end of a run of a script, which reports no steps."""
    return fault(**{"step": 0, "exit_code": 1, "ran": ran, "log_tail": SAID, **changes})


@pytest.mark.parametrize(
    ("now", "earlier", "expected"),
    [
        pytest.param(run(), [run(), run()], Fail, id="three runs end alike"),
        pytest.param(run(rank=0), [run(rank=2), run(rank=1)], Fail, id="whichever rank is first"),
        pytest.param(run(70.0), [run(60.0), run(80.0)], Fail, id="about as long after their start"),
        pytest.param(run(), [run()], Restart("process"), id="two"),
        pytest.param(run(), [run(), run(exit_code=2), run()], Restart("process"), id="not in a row"),
        pytest.param(run(), [run(), run(90.0)], Restart("process"), id="one of them went further"),
        pytest.param(run(7200.0), [run(7200.0)] * 2, Restart("process"), id="they may have made progress"),
        pytest.param(run(exit_code=-11), [run(exit_code=-11)] * 2, Restart("process"), id="a signal"),
        pytest.param(run(exit_code=137), [run(exit_code=137)] * 2, Restart("process"), id="a signal, by a shell"),
        pytest.param(run(exit_code=4), [run(exit_code=4)] * 2, Restart("process"), id="declared harmless"),
        pytest.param(run(exit_code=69), [run(exit_code=69)] * 2, Fail, id="an exit code of Lockstep's own workers"),
        pytest.param(
            run(log_tail=("CUDA error: ECC",)), [run(log_tail=("CUDA error: ECC",))] * 2, Restart("process"),
            id="another pod's GPU may help",
        ),
    ],
)  # fmt: skip
def test_a_script_that_ends_again_and_again_in_the_same_way(
    now: Fault, earlier: list[Fault], expected: Decision | type
) -> None:
    """Its steps are not seen; exit code and running time stand in for them."""
    decision = decide(now, earlier, Used(process=2), SCRIPT)
    assert decision == expected or (isinstance(expected, type) and isinstance(decision, expected)), decision


def test_a_crash_loop_of_a_script_is_told_with_its_last_words() -> None:
    decision = decide(run(), [run(), run()], Used(process=2), SCRIPT)
    assert isinstance(decision, Fail)
    assert decision.reason == "CrashLoop"
    assert decision.message == (
        "3 runs of the script in a row ended with exit code 1, each about 3 s after its start, the last on rank 3: "
        "ValueError: no closing tag; another restart would meet it again. Where it would not, say so in "
        "resilience.retry, with action Restart"
    )


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (run(), VALUE),
        (run(log_tail=(*(f"[rank0]: {line}" for line in SAID[:4]), "[rank0]:[W] teardown")), VALUE),
        (run(log_tail=("step 3", "no room left", "")), "no room left"),
        (run(log_tail=()), ""),
        (run(exit_code=-9), ""),  # killed: what it was saying was no reason
        (run(exit_code=-11, log_tail=CRASHED), "Segmentation fault in mine/read.py:12 tokens"),
        (run(exit_code=-6, log_tail=(*UNCAUGHT, "Fatal Python error: Aborted")), f"Aborted: {WATCHDOG}"),
        (run(exit_code=-6, log_tail=UNCAUGHT), WATCHDOG),
        (run(exit_code=-11, log_tail=(*CHILDS, "step 4", *CRASHED)), "Segmentation fault in mine/read.py:12 tokens"),
        (run(exit_code=-11, log_tail=(*CHILDS, *CRASHED[1:])), "Segmentation fault in mine/read.py:12 tokens"),
        (run(exit_code=-9, log_tail=(*CHILDS, "step 4")), ""),  # a child's: the worker has gone on
        (run(exit_code=-6, log_tail=(*CHILDS, "step 4", *UNCAUGHT)), WATCHDOG),
        (run(error="OutOfMemoryError: CUDA"), "OutOfMemoryError: CUDA"),
        (fault(cause="Hang", exit_code=None, error="rank 3 did not come", log_tail=("frame",)), "rank 3 did not come"),
    ],
)
def test_last_words(end: Fault, words: str) -> None:
    assert last_words(end) == words


def test_a_fatal_exit_of_a_script_is_told_with_its_last_words() -> None:
    decision = decide(run(exit_code=3), [], Used(), RULES)
    assert isinstance(decision, Fail)
    assert decision.message.endswith("which resilience.retry declares fatal: ValueError: no closing tag")
    decision = decide(run(exit_code=65), [], Used(), SCRIPT)
    assert isinstance(decision, Fail)
    assert decision.message == "rank 3 refused its configuration or data (exit code 65): ValueError: no closing tag"


@pytest.mark.parametrize(
    ("suspects", "rank"),
    [
        ([fault(rank=0, exit_code=75, at=1.0), fault(rank=3, exit_code=-9, at=2.0)], 3),  # killed beats its victim
        ([fault(rank=0, exit_code=75, at=1.0), fault(rank=2, exit_code=1, at=2.0)], 2),  # crashed beats its victim
        ([fault(rank=1, exit_code=1, at=2.0), fault(rank=2, exit_code=1, at=1.0)], 2),  # the earlier of two crashes
        ([fault(rank=1, exit_code=-9, at=1.0), fault(rank=2, exit_code=65, at=2.0)], 2),  # the user's error speaks
    ],
)
def test_root_cause(suspects: list[Fault], rank: int) -> None:
    """The fault record names the worker that failed first, whatever order the reports came in."""
    assert root_cause(suspects).rank == rank
    assert root_cause(reversed(suspects)).rank == rank


@pytest.mark.parametrize(
    ("fields", "rules", "against"),
    [
        ({"error": "CUDA error: an illegal instruction"}, (), "Suspected"),
        ({"error": "CUDA error: device-side assert triggered"}, (), ""),  # an index out of range
        ({"error": "CUDA out of memory"}, (), ""),
        ({"error": "IndexError: list index out of range"}, (), ""),
        ({"error": "NCCL error", "user_error": True}, (), ""),
        ({"error": "lost", "cause": "MemberLost"}, (), ""),
        ({"error": "boom"}, (RetryRule("ExcludeNode", None, "boom"),), "Named"),
        ({"error": "NCCL error"}, (RetryRule("Fail", None, "NCCL"),), ""),  # the user says that it is the program
    ],
)
def test_what_is_said_against_a_node(fields: dict[str, Any], rules: tuple[RetryRule, ...], against: str) -> None:
    """The operator remembers it across jobs: a program's own error must not count."""
    fault = Fault(**{"cause": "WorkerExited", "witness": "exit", "at": 1.0, "noticed": 1.0, "slot": 1, **fields})
    assert blame(fault, decide(fault, [], Used(), Ladder(rules=rules))) == against
