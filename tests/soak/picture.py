"""A soak as one picture: progress and faults above, what operators and agents use below."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from soak.campaign import Soaked
from soak.deck import KINDS
from soak.readings import ROLES, Reading

COLOURS = {"operator": "#0072b2", "agent": "#d55e00"}  # Okabe and Ito's, told apart without colour vision
PANELS = (("memory", "resident memory, MB\n(without files)"), ("descriptors", "descriptors"), ("threads", "threads"))


def draw(soaked: Soaked, path: Path) -> None:
    """Write the picture; its kind is the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "soak"  # the same soak makes the same file
    figure, axes = plt.subplots(2 + len(PANELS), 1, sharex=True, figsize=(9, 10), height_ratios=[2, 1.6, 2, 1.2, 1.2])
    struck = [blow for blow in soaked.blows if not blow.missed]
    axes[0].plot([p.at / 60 for p in soaked.progress], [p.step for p in soaked.progress], color="#009e73")
    axes[0].set_ylabel("step")
    axes[0].set_title(f"{len(struck)} faults in {soaked.seconds / 60:.0f} minutes on one job of 2 nodes and a spare")
    axes[1].scatter([b.at / 60 for b in struck], [KINDS.index(b.kind) for b in struck], s=14, color="#444444")
    axes[1].set_yticks(range(len(KINDS)), KINDS, fontsize=7)
    axes[1].invert_yaxis()
    for axis, (value, label) in zip(axes[2:], PANELS, strict=True):
        for role in ROLES:
            for number, line in enumerate(_lines(soaked.readings, role)):
                axis.plot(
                    [r.at / 60 for r in line], [getattr(r, value) for r in line],
                    color=COLOURS[role], linewidth=0.9, label=f"{role}s" if not number else None,
                )  # fmt: skip
        axis.set_ylabel(label, fontsize=8)
        axis.set_ylim(bottom=0)
    axes[2].legend(fontsize=8, loc="lower right")
    axes[-1].set_xlabel("minutes")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _lines(readings: list[Reading], role: str) -> list[list[Reading]]:
    found: dict[str, list[Reading]] = defaultdict(list)
    for reading in readings:
        if reading.role == role:
            found[reading.process].append(reading)
    return list(found.values())
