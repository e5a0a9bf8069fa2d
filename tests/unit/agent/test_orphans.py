"""What a pod's supervisor starts does not outlive it, whenever it dies: in a local run nothing else would end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("module", "code"), [("agent", -signal.SIGTERM), ("zygote", -signal.SIGTERM), ("supervisor", 0)]
)
def test_a_parent_that_died_during_the_imports_counts(tmp_path: Path, module: str, code: int) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = {
        **os.environ,
        "LOCKSTEP_RUN_DIR": str(tmp_path),
        "LOCKSTEP_SUPERVISOR_PID": str(gone.pid),
        "LOCKSTEP_DIE_WITH_PARENT": str(gone.pid),
    }
    child = subprocess.run(
        [sys.executable, "-m", f"lockstep_trainer.{module}"], env=environment, timeout=60, check=False
    )
    assert child.returncode == code
