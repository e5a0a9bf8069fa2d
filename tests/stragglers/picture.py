"""What detectors find, kind by kind, and how soon, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stragglers.outcome import Outcome
from stragglers.score import Score

COLOURS = ("#0072b2", "#d55e00")  # Okabe and Ito's, told apart without colour vision


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Kind → its score, in the order in which they come."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.kind, []).append(outcome)
    return {kind: Score.of(each) for kind, each in found.items()}


def draw(played: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Write the picture; ``played`` is detector → outcomes of the same scenarios. Its kind is the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "stragglers"  # the same outcomes make the same file
    scores = {name: by_kind(outcomes) for name, outcomes in played.items()}
    kinds = list(next(iter(scores.values())))
    slow = [kind for kind in kinds if next(iter(scores.values()))[kind].expected]
    figure, (found, false, soon) = plt.subplots(1, 3, figsize=(13, 8.5), width_ratios=[1.1, 1.1, 1])
    height = 0.8 / len(scores)
    for n, (name, of) in enumerate(scores.items()):
        colour, label = COLOURS[n % len(COLOURS)], {"label": name}
        lines = [y + n * height for y in range(len(slow))]
        found.barh(lines, [of[kind].recall or 0 for kind in slow], height, color=colour, **label)
        lines = [y + n * height for y in range(len(kinds))]
        false.barh(lines, [of[kind].false for kind in kinds], height, color=colour, **label)
        score = Score.of(each for each in played[name] if each.scored)
        shares = [(at + 1) / max(1, score.expected) for at in range(len(score.delays))]
        soon.step(score.delays, shares, where="post", color=colour, **label)
    for axis, names in ((found, slow), (false, kinds)):
        axis.set_yticks([y + 0.4 - height / 2 for y in range(len(names))], names, fontsize=7)
        axis.invert_yaxis()
    found.set_title("found, share of what was to be found")
    false.set_title("false findings")
    soon.set_title("found within so many steps")
    soon.set_ylim(0, 1)
    soon.set_xscale("symlog")  # none took less than 0 steps
    soon.set_xlim(left=0)
    for axis in (found, false, soon):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
