"""Agents and operators live for weeks: their memory must not grow around what comes and goes."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")

PROGRAM = """
from pathlib import Path
from lockstep_api.heap import trim

def resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

kept = [bytearray(100_000)]  # below the bound for pages of its own
for _ in range(500):
    kept.append(bytearray(100_000))  # the last one's neighbour, or its end would be the heap's
    del kept[-2][1_000:]
full = resident()
trim()
print(full - resident())
"""


def test_what_lies_between_small_things_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 20e6, "of 50 MB"
