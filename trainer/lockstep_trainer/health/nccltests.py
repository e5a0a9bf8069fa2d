"""NVIDIA's own nccl-tests, where the image has them (https://github.com/NVIDIA/nccl-tests)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

from lockstep_trainer.health.measured import Collective

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter")
SIZES = ("1M", "1G", "32")
"""From, to, factor: 1 MiB, 32 MiB and 1 GiB."""
_COLUMNS = 13
"""size count type redop root, then time algbw busbw #wrong, out of place and in place."""


def installed(which: Callable[[str], str | None] = shutil.which) -> bool:
    """Whether all that are used are on PATH."""
    return all(which(f"{operation}_perf") for operation in OPERATIONS)


def run(gpus: int, timeout: float) -> list[Collective]:
    """One process drives all GPUs of the machine. What fails is a row with an error."""
    rows: list[Collective] = []
    for operation in OPERATIONS:
        command = [f"{operation}_perf", "-b", SIZES[0], "-e", SIZES[1], "-f", SIZES[2], "-g", str(gpus)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            rows.append(failed(operation, gpus, f"no end within {timeout:.0f} s"))
            continue
        found = parse(operation, gpus, done.stdout)
        rows += found
        if done.returncode or not found:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
            rows.append(failed(operation, gpus, f"exit code {done.returncode}: {last[0]}"))
    return rows


def parse(operation: str, gpus: int, output: str) -> list[Collective]:
    """Rows of the output, out of place; comments and headings start with #. ``#wrong`` is N/A where it was not
    checked."""
    rows: list[Collective] = []
    for line in output.splitlines():
        words = line.split()
        if len(words) != _COLUMNS or not words[0].isdigit():
            continue
        size, count, kind, redop, _, time_us, algbw, busbw, wrong = words[:9]
        rows.append(
            Collective(
                operation,
                f"0-{gpus - 1}",
                int(size),
                int(count),
                kind,
                redop,
                float(time_us),
                float(algbw),
                float(busbw),
                int(float(wrong)) if wrong != "N/A" else 0,
            )
        )
    return rows


def failed(operation: str, gpus: int, error: str) -> Collective:
    """A row that says why there is none."""
    return Collective(operation, f"0-{gpus - 1}", 0, 0, "", "", 0.0, 0.0, 0.0, error=error)
