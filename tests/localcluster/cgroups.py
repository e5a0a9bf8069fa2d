"""The nodes' cgroups: one above all pods of a node, so that their limits are real and nothing is left behind."""

import contextlib
import os
import time
from pathlib import Path

from localcluster.processes import ClusterError

ROOT = Path("/sys/fs/cgroup")
_V1 = "cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd", "hugetlb", "unified"
_V2 = "cpuset", "cpu", "io", "memory", "pids"


def is_v2() -> bool:
    """Whether this machine has the unified hierarchy only."""
    return (ROOT / "cgroup.controllers").exists()


def _hierarchies() -> list[Path]:
    return [ROOT] if is_v2() else [ROOT / name for name in _V1 if (ROOT / name).is_dir()]


def _enable(folder: Path) -> None:
    """Cgroup v2: hand the controllers on to the folder's children."""
    there = (folder / "cgroup.controllers").read_text().split()
    for controller in (c for c in _V2 if c in there):
        (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def _inherit_cpuset(folder: Path) -> None:
    """Cgroup v1: a new cpuset is empty and takes no process until it is filled in."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        (folder / file).write_text((folder.parent / file).read_text())


def make(parent: str, node: int) -> str:
    """Make a node's cgroup in every hierarchy; the kubelet wants its path."""
    for hierarchy in _hierarchies():
        folder = hierarchy / parent / f"node{node}"
        folder.mkdir(parents=True, exist_ok=True)
        if is_v2():
            for above in (hierarchy, folder.parent):
                _enable(above)
        elif hierarchy.name == "cpuset":
            for one in (folder.parent, folder):
                _inherit_cpuset(one)
    return f"/{parent}/node{node}"


def remove(path: str, seconds: float = 10) -> None:
    """Remove a cgroup with all below it. The last processes may still be on their way out."""
    end = time.monotonic() + seconds
    while True:
        left = [h / path for h in _hierarchies() if (h / path).is_dir()]
        for top in left:
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        left = [top for top in left if top.is_dir()]
        if not left:
            return
        if time.monotonic() > end:
            raise ClusterError(f"cgroups with processes in them: {', '.join(map(str, left))}")
        time.sleep(0.05)
