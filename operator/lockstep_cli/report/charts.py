"""The charts of a report: loss, step time, throughput, members, and bars of where time went."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape

from lockstep_cli.journal import Journal, Step
from lockstep_cli.report import scale
from lockstep_cli.report.panel import BOTTOM, LEFT, TOP, Panel
from lockstep_cli.report.series import quantile, stretches, thin, throughput

_POINTS = 900
"""Points along one curve: about one per pixel."""


def loss(journal: Journal) -> str:
    """Training loss, losses on held-out text, and the bigram model's loss as a line to beat.

    A held-out loss that is no number has no place here; the table has it.
    """
    values = [step.loss for step in journal.steps]
    evaluations = [e for e in journal.evaluations if math.isfinite(e.loss)]
    held_out = [e.loss for e in evaluations]
    bigram = next((e.bigram_loss for e in reversed(journal.evaluations) if e.bigram_loss is not None), None)
    low = min([*values, *held_out, *([bigram] if bigram else [])], default=0.0)
    high = max([quantile(values, 0.999) if values else 1.0, *held_out, bigram or 0.0])
    room = (high - low) * 0.06 or 1.0
    panel = Panel.over(journal, "Loss", "nats per token", height=280, low=max(0.0, low - room), high=high + room)
    drawn = _curves(panel, journal, lambda step: step.loss)
    if bigram is not None:
        drawn += panel.rule(bigram, f"bigram model {bigram:.3f}", "bigram")
    drawn += panel.dots(
        ((e.at - journal.begin, e.loss, f"held-out loss {e.loss:.4f} at step {e.step}") for e in evaluations),
        "held-out",
    )
    return panel.svg(drawn)


def step_time(journal: Journal) -> str:
    """Wall time of each step; the axis ends above the 99th percentile, longer ones touch its top."""
    values = [step.seconds for step in journal.steps]
    high = min(max(values), quantile(values, 0.99) * 1.3) if values else 1.0
    panel = Panel.over(journal, "Step time", "seconds", height=150, low=0.0, high=high * 1.05)
    saved = panel.dots(
        (
            (c.at - journal.begin, 0.0, f"checkpoint of step {c.step}, {scale.size(c.bytes)} in {c.seconds:.2f} s")
            for c in journal.checkpoints
        ),
        "checkpoint",
    )
    return panel.svg(_curves(panel, journal, lambda step: step.seconds) + saved)


def tokens(journal: Journal) -> str:
    """Tokens per second over time; new ones, and those of steps that were done again."""
    span = journal.end - journal.begin
    typical = quantile([step.seconds for step in journal.steps], 0.5) if journal.steps else 1.0
    bins = max(10, min(270, int(span / max(typical * 3, 1e-9))))
    new, again = throughput(journal.steps, journal.begin, journal.end, bins)
    high = max((a + b for a, b in zip(new, again, strict=True)), default=1.0) or 1.0
    panel = Panel.over(journal, "Throughput", "tokens per second", height=150, low=0.0, high=high * 1.08)
    drawn = panel.steps(new, [0.0] * bins, "new") + (panel.steps(again, new, "again") if any(again) else "")
    return panel.svg(drawn)


def members(journal: Journal) -> str:
    """Which pod held which slot, and on which node."""
    slots = sorted({slot for m in journal.memberships for slot in m.slots})
    if not slots:
        return ""
    shown = slots[:64]
    row = 26 if len(shown) <= 16 else 12
    height = TOP + row * len(shown) + BOTTOM
    more = f"; the first {len(shown)} of {len(slots)} slots" if len(shown) < len(slots) else ""
    panel = Panel.over(journal, "Members", f"pod in each slot{more}", height=height, low=0.0, high=float(len(shown)))
    drawn = []
    for index, slot in enumerate(shown):
        y = TOP + index * row
        drawn.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + row / 2 + 3.5:.1f}" text-anchor="end">slot {slot}</text>'
        )
        for number, (begin, end, pod, node) in enumerate(_holders(journal, slot)):
            left, right = panel.x(begin - journal.begin), panel.x(end - journal.begin)
            label = f"{pod} on {node}" if node else pod
            text = label if len(label) * 6.2 < right - left - 10 else pod if len(pod) * 6.2 < right - left - 10 else ""
            drawn.append(
                f'<rect class="held held-{number % 4}" x="{left + 0.75:.1f}" y="{y + 2}" '
                f'width="{max(right - left - 1.5, 1):.1f}" height="{row - 4}" rx="3">'
                f"<title>{escape(label)}</title></rect>"
                + (
                    f'<text class="held-label" x="{left + 9:.1f}" y="{y + row / 2 + 3.5:.1f}">{escape(text)}</text>'
                    if row > 20
                    else ""
                )
            )
    return panel.svg("".join(drawn), y_ticks=False)


def _holders(journal: Journal, slot: int) -> list[tuple[float, float, str, str]]:
    """(from, until, pod, node) of the pods that held ``slot`` one after another."""
    held: list[tuple[float, float, str, str]] = []
    ends = [m.at for m in journal.memberships[1:]] + [journal.end]
    for membership, next_at in zip(journal.memberships, ends, strict=True):
        end = min([next_at, *(each.at for each in journal.suspensions if each.at >= membership.at)])
        if slot not in membership.slots:
            continue
        pod, node = membership.slots[slot]
        if held and held[-1][1:3] == (membership.at, pod):
            held[-1] = (held[-1][0], end, pod, node)
        else:
            held.append((membership.at, end, pod, node))
    return held


def bar(parts: Mapping[str, float], unit: str = "s", height: int = 26) -> str:
    """One horizontal bar of parts in proportion."""
    total = sum(parts.values())
    if total <= 0:
        return ""
    drawn, x = [], 0.0
    for name, value in parts.items():
        width = value / total * 1000
        drawn.append(
            f'<rect class="{css_class(name)}" x="{x:.2f}" y="0" width="{width:.2f}" height="{height}">'
            f"<title>{escape(name)}: {value:.4g} {unit}, {value / total:.1%}</title></rect>"
        )
        x += width
    return (
        f'<svg class="bar" viewBox="0 0 1000 {height}" preserveAspectRatio="none" style="height:{height}px">'
        f"{''.join(drawn)}</svg>"
    )


def css_class(name: str) -> str:
    """Style of a ledger class, a step's section or a part of a recovery, as an attribute's value: the journal may
    have any name."""
    return escape("part part-" + "-".join(name.lower().replace("_", " ").split()))


def _curves(panel: Panel, journal: Journal, value: Callable[[Step], float]) -> str:
    total = max(1, len(journal.steps))
    drawn = []
    for stretch in stretches(journal.steps):
        share = max(2, round(_POINTS * len(stretch) / total))
        points = thin([(step.at - journal.begin, value(step)) for step in stretch], share)
        drawn.append(panel.line(points, "again" if stretch[0].recomputed else "new"))
    return "".join(drawn)


def hover_data(journal: Journal) -> list[list[float | str]]:
    """[seconds since begin, step, loss, step seconds, recomputed, time as on the axis] for the readout under the
    cursor."""
    every = -(-len(journal.steps) // 4000) or 1
    return [_hover(step, journal.begin) for step in journal.steps[::every]]


def _hover(step: Step, begin: float) -> list[float | str]:
    at = step.at - begin
    again = int(step.recomputed)
    return [round(at, 2), step.step, round(step.loss, 4), round(step.seconds, 4), again, scale.clock(at)]
