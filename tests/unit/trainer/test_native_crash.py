"""A worker that dies in native code says where: the line of Python that called it is in its output, and from there in
the fault's record."""

from __future__ import annotations

import ctypes
import signal
from pathlib import Path

import pytest

from forked import start_workers, wait_all
from lockstep_trainer.agent.output import Output
from lockstep_trainer.protocol.policy import Fault, last_words
from lockstep_trainer.worker import Worker


def test_a_segmentation_fault_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def reads_nowhere(worker: Worker) -> int:
        print("step 3")
        ctypes.string_at(0)
        return 0

    monkeypatch.setattr(Worker, "live", reads_nowhere)
    (code,) = wait_all(start_workers([tmp_path]))
    assert code == -signal.SIGSEGV
    output = Output(tmp_path, rank=3)
    output.forward(3, final=True)
    output.close()
    assert any("in reads_nowhere" in line for line in output.last), output.last
    end = Fault("WorkerExited", "exit", at=1.0, noticed=1.1, exit_code=code, log_tail=tuple(output.last))
    words = last_words(end)
    assert words.startswith("Segmentation fault in ctypes/__init__.py:")
    assert words.endswith(" string_at")
