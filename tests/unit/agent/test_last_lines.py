"""What of a worker's output is kept for the record of its fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep_api.messages import Term
from lockstep_api.tails import LAST_LINES, LINE_CHARACTERS, SEARCHED_BYTES, SEARCHED_CHARACTERS, TAIL_BYTES, tail
from lockstep_api.v1alpha1.resilience import RetryRule
from lockstep_trainer.agent.output import Output
from lockstep_trainer.agent.process import Exit
from lockstep_trainer.agent.settings import Job, Settings
from lockstep_trainer.agent.worker import Worker
from lockstep_trainer.agent.workers import Workers
from lockstep_trainer.agent.zygote_client import ZygoteClient
from lockstep_trainer.protocol import events


def last(folder: Path, *written: str) -> list[str]:
    """The lines kept of what was written and read in these parts."""
    output = Output(folder, 0)
    for number, part in enumerate(written, 1):
        with (folder / "output.log").open("ab") as file:
            file.write(part.encode())
        output.forward(number, final=number == len(written))
    output.close()
    return list(output.last)


def test_a_progress_bar_leaves_room_for_the_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It writes carriage returns and no newline: all of it would be one line."""
    bars = [f"\r{step / 5000:4.0%}|{'█' * (step // 100):<50}| {step}/5000" for step in range(5000)]
    kept = last(tmp_path, *bars, "\nTraceback (most recent call last):\nRuntimeError: boom\n")
    assert kept[-3:] == [bars[-1][1:], "Traceback (most recent call last):", "RuntimeError: boom"]
    assert len(kept) <= LAST_LINES
    assert sum(len(line.encode()) for line in tail(kept)) <= TAIL_BYTES


def test_a_long_line_keeps_its_beginning_and_empty_ones_stay(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = last(tmp_path, f"shapes: {'x' * 100_000}\r\n\nthe end\r\n")
    assert [line[:8] for line in kept[-3:]] == ["shapes: ", "", "the end"]
    assert max(map(len, kept)) == SEARCHED_CHARACTERS
    assert max(map(len, tail(kept))) == LINE_CHARACTERS


def test_of_long_lines_the_last_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = last(tmp_path, "".join(f"{number:03} {'x' * 4000}\n" for number in range(100)))
    assert kept[-1].startswith("099 ")
    assert 10 < len(kept) < LAST_LINES
    assert sum(len(line.encode()) for line in kept) <= SEARCHED_BYTES
    assert 0 < len(tail(kept)) < LAST_LINES


def test_an_error_far_behind_in_its_line_is_kept_for_the_rules(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So a structured logger writes it, and a message of many long lines may follow."""
    error = json.dumps({"level": "ERROR", "stack": "x" * 3000, "error": "DataContractError: column gone"})
    kept = last(tmp_path, f"{error}\n", *(f"{'y' * 499}\n" for _ in range(LAST_LINES - 1)))
    assert kept[0] == error


@pytest.mark.parametrize("parts", [1, 4])
def test_of_a_crash_the_innermost_of_its_stack_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], parts: int
) -> None:
    """Whichever way it comes: of a deep stack the last lines are those that say the least."""
    before = [f"step {number}" for number in range(100)]
    stack = [f'  File "model.py", line {number} in forward' for number in range(60)]
    lines = [*before, "Fatal Python error: Segmentation fault", "", *stack, "", "Extension modules: many"]
    size = len(lines) // parts + 1
    kept = last(
        tmp_path, *("".join(f"{line}\n" for line in lines[at : at + size]) for at in range(0, len(lines), size))
    )
    crash = kept.index("Fatal Python error: Segmentation fault")
    assert kept[crash - 1] == "step 99"
    assert kept[crash + 2 :] == stack[: len(kept) - crash - 2]
    assert len(kept) == LAST_LINES


CHILDS = [
    "Fatal Python error: Segmentation fault",
    "",
    "Current thread 0x00007f2bfb45db80 (most recent call first):",
    *(f'  File "reader.py", line {number} in read' for number in range(60)),
    "",
    "Thread 0x00007f2bfa400640 (most recent call first):",
    "  <no Python frame>",
    "",
    "Extension modules: numpy.core._multiarray_umath (total: 1)",
]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_child_that_crashed_leaves_room_for_what_the_worker_says_later(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], size: int
) -> None:
    """It lives on, for days maybe, in whichever pieces all of it comes."""
    later = [f"step {number}" for number in range(3, 60)]
    lines = ["step 2", *CHILDS, *later[:9]]
    kept = last(
        tmp_path, *("".join(f"{line}\n" for line in lines[at : at + size]) for at in range(0, len(lines), size))
    )
    assert kept[-9:] == later[:9]
    assert kept[-10].startswith("  File "), "of a deep stack the innermost"
    assert CHILDS[3] in kept
    assert last(tmp_path, *(f"{line}\n" for line in later), "RuntimeError: boom") == [
        *later[-39:],
        "RuntimeError: boom",
    ]


def test_of_two_crashes_the_newer_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = ["Fatal Python error: Aborted", "", *(f'  File "train.py", line {number} in step' for number in range(60))]
    assert last(tmp_path, "".join(f"{line}\n" for line in [*CHILDS, *own]))[-30:] == own[:30]


@pytest.mark.parametrize(
    ("rules", "characters"),
    [([{"action": "Fail", "logPattern": "x"}], 1000), ([{"action": "Fail", "exitCodes": [3]}], LINE_CHARACTERS)],
)
def test_long_lines_are_told_where_a_rule_looks_through_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rules: list[dict[str, object]], characters: int
) -> None:
    """The leader of thousands of workers that end at once need not read them all for nothing."""
    names = ("POD_NAME", "POD_UID", "HOST", "BIND", "CONFIG_DIR", "TOKEN_DIR", "DATA_DIR")
    settings = Settings.from_env({"LOCKSTEP_RUN_DIR": str(tmp_path), **{f"LOCKSTEP_{name}": "any" for name in names}})
    job = Job("job", "default", "uid", {"nodes": 1, "gpusPerNode": 1, "resilience": {"retry": rules}})
    said: list[events.Event] = []
    workers = Workers(settings, job, ZygoteClient(tmp_path, 1, lambda _: None), said.append)
    (tmp_path / "output.log").write_text("x" * 1000 + "\n")
    workers._end(Worker(tmp_path, Term(1, 1), 0), Exit(3, 1.0))
    (ended,) = said
    assert isinstance(ended, events.WorkerEnded)
    assert [len(line) for line in ended.log_tail] == [characters]


def test_the_rules_on_output_say_how_many_lines_they_see() -> None:
    description = RetryRule.model_fields["log_pattern"].description or ""
    assert f"one of its last {LAST_LINES} lines" in description
    assert f"first {SEARCHED_CHARACTERS:,} characters" in description
    assert f"last {SEARCHED_BYTES // 1024} KiB" in description
