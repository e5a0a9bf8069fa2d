"""What workers are forked from: a process with everything imported, and nothing begun."""

from __future__ import annotations

import subprocess
import sys

LOOK = """
import os, torch
asked = []
torch._C._cuda_getDeviceCount = lambda: asked.append(1) or 0
from lockstep_trainer.preload import preload
preload()
print(len(os.listdir("/proc/self/task")), torch.cuda.is_initialized(), len(asked))
"""


def test_imports_start_no_thread_and_ask_no_gpu() -> None:
    """Neither survives a fork. Where a process has asked CUDA how many devices there are, those that are forked from it
    can't use them: the import of torch's compiler does, as an H100 has shown."""
    told = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True).stdout.split()
    assert told == ["1", "False", "0"]
