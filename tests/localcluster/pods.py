"""The processes of pods. A pod's container is a process of this machine like any other, below a node's cgroup."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from localcluster.cgroups import ROOT, is_v2
from localcluster.paths import Layout

_POD = re.compile(r"/(node\d+)/.*/pod([0-9a-f-]{36})(/|$)")


@dataclass(frozen=True, slots=True)
class PodProcess:
    """A process of a pod that is alive, in this machine's numbers."""

    pid: int
    node: str
    pod_uid: str
    words: tuple[str, ...]  # its command line

    def runs(self, module: str) -> bool:
        """Whether it is ``python -m module``, and not one that is named as standing by for it."""
        if self.words[1:3] != ("-m", module):
            return False
        try:
            return "(standby)" not in Path(f"/proc/{self.pid}/comm").read_text()
        except OSError:
            return False


def processes(layout: Layout, node: str = "node*") -> Iterator[PodProcess]:
    """All processes of all pods of a node, or of all nodes."""
    for folder in cgroups(layout, node):
        match = _POD.search(str(folder))
        if match is None:
            continue
        with contextlib.suppress(OSError):  # processes and pods come and go meanwhile
            for pid in map(int, (folder / "cgroup.procs").read_text().split()):
                words = _command_line(pid)
                if words:
                    yield PodProcess(pid, match[1], match[2], words)


def running(layout: Layout, pod_uid: str, module: str) -> list[int]:
    """The processes of a pod that run ``python -m module``; none where the pod is not running here."""
    return [process.pid for process in processes(layout) if process.pod_uid == pod_uid and process.runs(module)]


def cgroups(layout: Layout, node: str = "node*") -> Iterator[Path]:
    """Every cgroup below a node's own, or below those of all nodes: of classes of service, pods and containers. In one
    hierarchy, which has every process once."""
    above = (ROOT if is_v2() else ROOT / "memory") / layout.cgroup
    for top in above.glob(node):
        with contextlib.suppress(OSError):
            yield from (path for path in top.rglob("*") if path.is_dir())


def _command_line(pid: int) -> tuple[str, ...]:
    """Empty for a process that only waits to be reaped."""
    try:
        return tuple(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0"))
    except OSError:
        return ()
