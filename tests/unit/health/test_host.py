"""What the container sees of its machine, from files as a kernel writes them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from lockstep_trainer.health.classify import classify
from lockstep_trainer.health.host import kernel_clock, read_host
from lockstep_trainer.health.readings import HostReadings, Readings
from lockstep_trainer.health.table import load

MEMINFO = "MemTotal:       1000000 kB\nMemAvailable:     500000 kB\n"


def machine(tmp_path: Path, **group: str) -> Path:
    """A root folder with these files of its control group."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    for name, text in group.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    return tmp_path


def synchronized() -> tuple[int, int]:
    """A clock as chrony keeps it: STA_PLL, 1.5 ms."""
    return 0x1, 1500


def test_memory_is_the_machines_where_the_container_has_no_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, memory_max="max\n", memory_current="1000\n")
    assert read_host(None, root=root, adjtimex=synchronized).memory_available == 500_000 * 1024


def test_memory_is_what_the_containers_limit_leaves_and_old_files_give_back(tmp_path: Path) -> None:
    root = machine(tmp_path, memory_max="1000000\n", memory_current="900000\n", memory_stat="inactive_file 50000\n")
    assert read_host(None, root=root, adjtimex=synchronized).memory_available == 150_000


def test_the_clock_is_what_the_kernel_says(tmp_path: Path) -> None:
    root = machine(tmp_path)
    good = read_host(None, root=root, adjtimex=synchronized)
    assert (good.clock_synchronized, good.clock_error_ms) == (1, 1.5)
    assert read_host(None, root=root, adjtimex=lambda: (0x41, 16_000_000)).clock_synchronized == 0
    assert read_host(None, root=root, adjtimex=lambda: None).clock_synchronized is None


def test_this_kernel_has_a_clock_and_this_machine_is_read() -> None:
    clock = kernel_clock()
    assert clock is not None
    assert clock[1] >= 0
    found = read_host(Path("/tmp"))
    assert found.shm_free is not None
    assert found.shm_total is not None
    assert 0 <= found.shm_free <= found.shm_total
    assert found.memory_available is not None


def test_open_files_are_what_this_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the checks has raised it as far as it goes."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 524288))
    assert read_host(None).open_files == 1024


def test_a_host_short_of_things_is_said_and_none_of_it_keeps_the_node_from_work() -> None:
    host = HostReadings(
        shm_total=64 << 20, shm_free=1, run_free=1, open_files=1024, memory_available=1, clock_synchronized=0,
        clock_error_ms=1e6, driver="LibraryNotFound",
    )  # fmt: skip
    found = {finding.kind: finding.severity for finding in classify(Readings(host), load())}
    assert found == dict.fromkeys(
        (
            *("host.shm-small", "host.shm-full", "host.run-folder-full", "host.open-files", "host.memory-short"),
            *("host.clock-unsynchronized", "host.clock-off"),
        ),
        "warn",
    )


def test_a_gpu_fewer_than_was_given_is_fatal() -> None:
    (finding,) = classify(Readings(HostReadings(gpus=7, gpus_missing=1)), load())
    assert (finding.kind, finding.severity) == ("host.gpus-missing", "fatal")
