"""What a host stood still for is told once, and not as work."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep_trainer.measuring.clocks import HostClock
from lockstep_trainer.measuring.hostpauses import HostPauses, quota_file, throttled_seconds

WAITED = 1e-6
"""Seconds, less than any collection takes."""


class Machine:
    """How long a thread has waited for a CPU, and its group for the quota."""

    waited = throttled = 0.0


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def host(machine: Machine) -> Iterator[HostPauses]:
    pauses = HostPauses()
    pauses.begin(lambda: machine.waited, lambda: machine.throttled)
    yield pauses
    pauses.close()


def test_waiting_for_a_cpu_is_told_in_the_step_in_which_it_was(host: HostPauses, machine: Machine) -> None:
    machine.waited, machine.throttled = 0.5, 2.0
    stood = host.take()
    assert (stood.seconds, stood.garbage, stood.throttled) == (0.5, 0.0, 2.0)
    assert host.take().seconds == 0.0


def test_a_collection_counts_and_what_it_waits_for_a_cpu_counts_once(host: HostPauses, machine: Machine) -> None:
    class Slow:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            machine.waited += WAITED

    Slow()
    gc.collect()
    stood = host.take()
    assert stood.garbage > 0
    assert stood.seconds == pytest.approx(WAITED + stood.garbage)


def test_a_clock_of_the_host_stands_still_with_it(host: HostPauses, machine: Machine) -> None:
    clock = HostClock(host.seconds)
    begun = clock.mark()
    machine.waited += 1000.0
    clock.add(begun, clock.mark())
    assert clock.take() < -900.0  # wall time that the machine of this test did not spend


def test_once_closed_it_hears_nothing() -> None:
    pauses = HostPauses()
    pauses.begin()
    pauses.close()
    known = len(gc.callbacks)
    gc.collect()
    assert pauses.take().seconds == 0.0
    pauses.close()
    assert len(gc.callbacks) == known


def test_this_machine_counts_what_a_thread_waits_for_a_cpu() -> None:
    """The number that the kernel shows is the one that is told, in seconds."""
    pauses = HostPauses()
    pauses.begin()
    told = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    if not told.exists():
        pytest.skip("this kernel counts no delays")
    before = pauses.seconds()
    least = int(told.read_text().split()[1]) / 1e9
    after = pauses.seconds()
    assert before <= least <= after
    pauses.close()


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        ("0::/pods/one", "sys/fs/cgroup/pods/one"),
        ("0::/not/mounted/here", "sys/fs/cgroup"),
        ("4:memory:/x\n2:cpu,cpuacct:/pods/one\n0::/", "sys/fs/cgroup/cpu,cpuacct/pods/one"),
    ],
)
def test_the_quota_is_read_where_the_control_group_is(tmp_path: Path, lines: str, place: str) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines + "\n")
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "cpu.stat").write_text("nr_throttled 3\nthrottled_usec 1500000\n")
    assert quota_file(tmp_path) == folder / "cpu.stat"


def test_without_control_groups_no_quota_is_told(tmp_path: Path) -> None:
    assert quota_file(tmp_path) is None


def test_both_versions_of_control_groups_are_understood() -> None:
    assert throttled_seconds("nr_periods 9\nthrottled_usec 1500000\n") == 1.5
    assert throttled_seconds("nr_periods 9\nthrottled_time 1500000000\n") == 1.5
    assert throttled_seconds("usage_usec 1\n") == 0.0
