"""How soon faults are found, and who is named, as one picture."""

from __future__ import annotations

from pathlib import Path

from corruption.kept import Kept
from corruption.outcome import expected_delay
from corruption.sums import by, curves, within_reach
from corruption.trial import RATES

COLOURS = ("#0072b2", "#009e73", "#e69f00", "#d55e00", "#999999")  # Okabe and Ito's, told apart without colour vision
PARTS = (
    ("rank", "the rank"),
    ("stage", "its unit's ranks of a stage"),
    ("undecided", "one of two units' ranks"),
    ("wrong", "somebody else"),
)


def draw(kept: Kept, path: Path) -> None:
    """Write the picture. Its kind is the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "corruption"  # the same outcomes make the same file
    figure, (delay, located) = plt.subplots(1, 2, figsize=(13, 5.5), width_ratios=[1, 1.2])
    rows = curves(kept)
    shares = [10 ** (at / 20 - 3) for at in range(61)]
    for rate, colour in zip(RATES, COLOURS, strict=False):
        delay.plot(shares, [expected_delay(rate, share) for share in shares], color=colour, linewidth=1)
        for how, marker in (("virtual", "o"), ("computed", "x")):
            mine = [row for row in rows if row["how"] == how and row["rate"] == rate]
            label = f"{rate:g} of the micro-batches" if how == "virtual" else None
            at, mean = [row["share"] for row in mine], [row["mean"] for row in mine]
            error = [2 * row["error"] for row in mine]
            delay.errorbar(at, mean, error, fmt=marker, color=colour, label=label, markersize=6, fillstyle="none")
    delay.set_xscale("log")
    delay.set_yscale("log")
    delay.set_xlabel("share of steps that are replayed")
    delay.set_title("steps until found (o virtual, x computed; lines: formula)", fontsize=10)
    delay.grid(alpha=0.3)
    delay.legend(fontsize=8, title="the fault hits")
    each = within_reach(kept)
    groups = {**by(each, lambda one: one.site), **by(each, lambda one: one.layout)}
    lines = range(len(groups))
    left = [0.0] * len(groups)
    for (key, label), colour in zip(PARTS, COLOURS, strict=False):
        width = [group.located.get(key, 0) / max(1, group.trials) for group in groups.values()]
        located.barh(lines, width, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for key, label, colour in (
        ("other", "not found: struck what is not compared", "#cccccc"),
        ("no change", "not found: changed no bit", "#eeeeee"),
        ("missed", "missed", "#000000"),
    ):
        width = [group.reasons.get(key, 0) / max(1, group.trials) for group in groups.values()]
        located.barh(lines, width, left=left, color=colour, label=label, edgecolor="#888888", linewidth=0.3)
        left = [a + b for a, b in zip(left, width, strict=True)]
    located.set_yticks(list(lines), [f"{name} ({group.trials})" for name, group in groups.items()], fontsize=8)
    located.invert_yaxis()
    located.set_xlim(0, 1)
    located.set_title("flips on replayed steps: who is named, share (number)", fontsize=10)
    located.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
