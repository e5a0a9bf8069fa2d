"""What workers are forked from: a process with everything imported, and nothing begun."""

from __future__ import annotations

import subprocess
import sys

import pytest

_LOOK = """
import os, sys
from lockstep_trainer.preload import COMPILER, preload
preload(compiler={compiler})
import torch
print(len(os.listdir("/proc/self/task")), torch.cuda.is_initialized(), all(name in sys.modules for name in COMPILER))
"""


@pytest.mark.parametrize("compiler", [False, True])
def test_imports_begin_nothing_and_hold_the_compiler_where_it_is_wanted(compiler: bool) -> None:
    """A thread or a CUDA context would not survive the fork."""
    command = [sys.executable, "-c", _LOOK.format(compiler=compiler)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert told == ["1", "False", str(compiler)]
