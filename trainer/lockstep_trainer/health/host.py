"""What the container sees of its machine: shared memory, the run folder, limits, memory, the clock."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

from lockstep_trainer.health.readings import HostReadings

_STA_UNSYNC = 0x0040
"""<sys/timex.h>: the clock is not set by anybody."""


def read_host(
    run_dir: Path | None, *, root: Path = Path("/"), adjtimex: Callable[[], tuple[int, int] | None] | None = None
) -> HostReadings:
    """The machine now. ``root`` is where /proc, /sys and /dev are; ``adjtimex`` gives the kernel clock's status bits
    and estimated error in microseconds, or None."""
    shm, run = _space(root / "dev/shm"), _space(run_dir) if run_dir else None
    clock = (adjtimex or kernel_clock)()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return HostReadings(
        shm_total=shm[0] if shm else None,
        shm_free=shm[1] if shm else None,
        run_free=run[1] if run else None,
        open_files=None if soft == resource.RLIM_INFINITY else soft,
        memory_available=_memory(root),
        clock_synchronized=None if clock is None else int(not clock[0] & _STA_UNSYNC),
        clock_error_ms=None if clock is None else clock[1] / 1000,
    )


def _space(folder: Path) -> tuple[int, int] | None:
    """Bytes in all and free, as an ordinary user has them."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _memory(root: Path) -> int | None:
    """Bytes that a new process could get: of the machine and, in a container with a limit, of that."""
    machine = _numbers(root / "proc/meminfo").get("MemAvailable:")
    group = root / "sys/fs/cgroup"
    free = [] if machine is None else [machine * 1024]
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no limit («max»), or another version of control groups
        return free[0] if free else None
    # What was read from files long ago is given back before anybody is killed.
    return min([*free, limit - used + _numbers(group / "memory.stat").get("inactive_file", 0)])


def _numbers(path: Path) -> Mapping[str, int]:
    """Lines of a name and a number."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in words if len(pair) >= 2 and pair[1].isdigit()}


class _Timex(ctypes.Structure):
    """struct timex of Linux on 64 bits; what lies behind status is not looked at."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        *((name, ctypes.c_long) for name in ("offset", "freq", "maxerror", "esterror")),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_long * 32),
    ]


def kernel_clock() -> tuple[int, int] | None:
    """adjtimex(2), which anybody may read: status bits and estimated error in microseconds."""
    found = _Timex()
    try:
        if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(found)) < 0:
            return None
    except AttributeError:  # not Linux
        return None
    return found.status, found.esterror
