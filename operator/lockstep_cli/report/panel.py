"""One chart over time as SVG: frame, axes, and the marks of faults that every chart of a report shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from lockstep_cli.journal import Journal
from lockstep_cli.report import scale
from lockstep_cli.report.scale import Scale
from lockstep_cli.report.series import Point

WIDTH = 1080
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 22, 24


@dataclass(frozen=True, slots=True)
class Panel:
    """Drawing area of one chart; x is seconds since the run began."""

    title: str
    unit: str
    height: int
    x: Scale
    y: Scale
    journal: Journal

    @classmethod
    def over(cls, journal: Journal, title: str, unit: str, *, height: int, low: float, high: float) -> Panel:
        """A panel over the whole run with y from low to high."""
        x = Scale(0.0, max(journal.end - journal.begin, 1e-9), LEFT, WIDTH - RIGHT)
        return cls(title, unit, height, x, Scale(low, high, height - BOTTOM, TOP), journal)

    def line(self, points: Sequence[Point], css: str) -> str:
        """A polyline with a band of the spread behind it, where points stand for several values."""
        if not points:
            return ""
        band = ""
        if any(p.high > p.low for p in points):
            upper = " ".join(f"{self.x(p.x):.1f},{self._y(p.high)}" for p in points)
            lower = " ".join(f"{self.x(p.x):.1f},{self._y(p.low)}" for p in reversed(points))
            band = f'<polygon class="band {css}" points="{upper} {lower}"/>'
        if len(points) == 1:
            return f'<circle class="dot {css}" cx="{self.x(points[0].x):.1f}" cy="{self._y(points[0].y)}" r="1.6"/>'
        path = " ".join(f"{self.x(p.x):.1f},{self._y(p.y)}" for p in points)
        return f'{band}<polyline class="line {css}" points="{path}"/>'

    def steps(self, values: Sequence[float], below: Sequence[float], css: str) -> str:
        """A filled staircase of equal bins over the whole run, on top of another one."""
        width = (self.x.high - self.x.low) / len(values)

        def corners(heights: Sequence[float]) -> list[str]:
            return [
                f"{self.x(side):.1f},{self._y(height)}"
                for index, height in enumerate(heights)
                for side in (index * width, (index + 1) * width)
            ]

        top = corners([a + b for a, b in zip(values, below, strict=True)])
        return f'<polygon class="area {css}" points="{" ".join(top + corners(below)[::-1])}"/>'

    def dots(self, points: Iterable[tuple[float, float, str]], css: str) -> str:
        """Circles with a tooltip each."""
        return "".join(
            f'<circle class="dot {css}" cx="{self.x(x):.1f}" cy="{self._y(y)}" r="3.6">'
            f"<title>{escape(tip)}</title></circle>"
            for x, y, tip in points
        )

    def rule(self, value: float, label: str, css: str) -> str:
        """A horizontal line across, with a label at its right end."""
        y = self._y(value)
        return (
            f'<line class="rule {css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="rule-label {css}" x="{WIDTH - RIGHT - 4}" y="{float(y) - 5:.1f}" text-anchor="end">'
            f"{escape(label)}</text>"
        )

    def _y(self, value: float) -> str:
        return f"{self.y(min(max(value, self.y.low), self.y.high)):.1f}"

    def svg(self, body: str, *, y_ticks: bool = True) -> str:
        """The whole chart around what was drawn."""
        floor = self.height - BOTTOM
        grid = "".join(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self._y(t)}" y2="{self._y(t)}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{float(self._y(t)) + 3.5:.1f}" text-anchor="end">'
            f"{scale.short(t)}</text>"
            for t in (scale.ticks(self.y.low, self.y.high, 5 if self.height > 180 else 3) if y_ticks else [])
        )
        times = "".join(
            f'<text class="tick" x="{self.x(t):.1f}" y="{floor + 16}" text-anchor="middle">{scale.clock(t)}</text>'
            for t in scale.time_ticks(self.x.high)
        )
        return (
            f'<svg class="panel" viewBox="0 0 {WIDTH} {self.height}" data-left="{LEFT}" data-right="{WIDTH - RIGHT}" '
            f'role="img" aria-label="{escape(self.title)}">'
            f'<text class="title" x="{LEFT}" y="13">{escape(self.title)}'
            f'<tspan class="unit" dx="6">{escape(self.unit)}</tspan></text>'
            f"{grid}{self._suspensions(floor)}{self._faults(floor, numbered=y_ticks)}{body}"
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>{times}'
            f'<line class="cursor" x1="0" x2="0" y1="{TOP - 4}" y2="{floor}"/></svg>'
        )

    def _faults(self, floor: float, numbered: bool) -> str:
        """Every fault as a line, and the time until the first new step after it as a shade."""
        marks = []
        for number, fault in enumerate(self.journal.faults, 1):
            left = self.x(fault.at - self.journal.begin)
            shade = self._shade("recovery", fault.at, fault.recovered_at, floor) if fault.mended_with is None else ""
            marks.append(
                f'{shade}<line class="fault" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP - 4}" y2="{floor}"/>'
                + (f'<text class="fault-label" x="{left + 4:.1f}" y="{TOP + 6}">{number}</text>' if numbered else "")
            )
        return "".join(marks)

    def _suspensions(self, floor: float) -> str:
        return "".join(
            self._shade("suspension", each.at, each.until, floor, tip="suspended") for each in self.journal.suspensions
        )

    def _shade(self, css: str, begin: float, end: float | None, floor: float, tip: str = "") -> str:
        """A stretch of time over the whole height; without ``end``, to the end of the journal."""
        left = self.x(begin - self.journal.begin)
        right = self.x((end or self.journal.end) - self.journal.begin)
        title = f"<title>{tip}</title>" if tip else ""
        return (
            f'<rect class="{css}" x="{left:.1f}" y="{TOP - 4}" width="{max(right - left, 1):.1f}" '
            f'height="{floor - TOP + 4}">{title}</rect>'
        )
