"""The processes of pods. A pod's container is a process of this machine like any other, below a node's cgroup."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from localcluster.cgroups import ROOT, is_v2
from localcluster.paths import Layout


def _above(layout: Layout) -> Path:
    """The cgroup above all nodes, in a hierarchy that has every process once."""
    return (ROOT if is_v2() else ROOT / "memory") / layout.cgroup


def cgroups_of(layout: Layout, node: str) -> list[Path]:
    """Every cgroup below a node's own: of the classes of service, pods and containers."""
    found = []
    with contextlib.suppress(OSError):  # pods come and go meanwhile
        found = [path for path in (_above(layout) / node).rglob("*") if path.is_dir()]
    return found


def processes_of(layout: Layout, pod_uid: str) -> dict[int, list[str]]:
    """Process → its command line, of all processes of a pod that are alive, in this machine's numbers. Empty when the
    pod is not running here."""
    found = {}
    for folder in _above(layout).glob(f"node*/kubepods/**/pod{pod_uid}"):
        for pid in _inside(folder):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if words[0]:  # empty once it only waits to be reaped
                    found[pid] = words[:-1]
    return found


def _inside(folder: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for file in folder.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                yield from map(int, file.read_text().split())


def running(layout: Layout, pod_uid: str, module: str) -> list[int]:
    """Those of a pod that run ``python -m module``, oldest first. A process that is named as one that stands by is none
    of them."""
    found = [pid for pid, words in processes_of(layout, pod_uid).items() if words[1:3] == ["-m", module]]
    return sorted(pid for pid in found if not _stands_by(pid))


def _stands_by(pid: int) -> bool:
    try:
        return "(standby)" in Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return True
