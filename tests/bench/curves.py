"""Curves of several runs as one SVG: losses on top, below them how far each is from a reference, on a log scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, BELOW = 460, 260, 130  # of one panel's losses, and of its differences, in pixels
LEFT, TOP, GAP = 56, 34, 40
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8a8a8a", "#cc79a7")  # Okabe and Ito's, told apart without colour vision
DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 4")
FLOOR = 1e-8


@dataclass(frozen=True, slots=True)
class Curve:
    """One run."""

    title: str
    losses: Sequence[float]
    held_out: Mapping[int, float]


def draw(panels: Mapping[str, Sequence[Curve]], *, reference: str) -> str:
    """A panel for each model; ``reference`` is the title of the curve that the others are compared with."""
    width = len(panels) * (LEFT + WIDTH + GAP)
    height = TOP + HEIGHT + GAP + BELOW + 30 + 18 * max(len(curves) for curves in panels.values())
    drawn = [line for n, (name, curves) in enumerate(panels.items()) for line in _panel(n, name, curves, reference)]
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *drawn,
            "</svg>\n",
        )
    )


def _panel(number: int, name: str, curves: Sequence[Curve], reference: str) -> Iterator[str]:
    x0, steps = number * (LEFT + WIDTH + GAP) + LEFT, len(curves[0].losses)
    low = math.floor(min(min(curve.losses) for curve in curves) * 2) / 2
    high = math.ceil(max(max(curve.losses) for curve in curves) * 2) / 2
    peer = next(curve for curve in curves if curve.title == reference)

    def across(step: float) -> float:
        return x0 + WIDTH * step / steps

    def loss_at(loss: float) -> float:
        return TOP + HEIGHT * (high - loss) / (high - low)

    bottom = TOP + HEIGHT + GAP

    def apart_at(apart: float) -> float:
        return bottom + BELOW * -math.log10(max(apart, FLOOR)) / -math.log10(FLOOR)

    yield f'<text x="{x0}" y="{TOP - 14}" font-size="14">{name}: loss in nats per token (dots: held out)</text>'
    yield f'<text x="{x0}" y="{bottom - 8}">distance from {reference}, nats</text>'
    for tick in range(math.ceil(low), math.floor(high) + 1):
        yield from _line(x0, loss_at(tick), str(tick))
    for power in range(0, 9, 2):
        yield from _line(x0, apart_at(10.0**-power), f"1e-{power}" if power else "1")
    every = next((number for number in (1, 2, 5, 10, 20, 50, 100, 200, 500) if steps <= 6 * number), steps)
    for tick in range(0, steps + 1, every):
        yield f'<text x="{across(tick):.1f}" y="{bottom + BELOW + 16}" text-anchor="middle">{tick}</text>'
    for at, curve in enumerate(curves):
        style = f'fill="none" stroke="{COLOURS[at]}" stroke-width="1.6" stroke-dasharray="{DASHES[at]}"'
        yield _path([(across(n + 1), loss_at(loss)) for n, loss in enumerate(curve.losses)], style)
        for step, loss in curve.held_out.items():
            yield f'<circle cx="{across(step):.1f}" cy="{loss_at(loss):.1f}" r="3" fill="{COLOURS[at]}"/>'
        if curve is not peer:
            apart = [abs(a - b) for a, b in zip(curve.losses, peer.losses, strict=True)]
            yield _path([(across(n + 1), apart_at(each)) for n, each in enumerate(apart)], style)
        y = bottom + BELOW + 34 + 18 * at
        yield _path([(x0, y - 4), (x0 + 40, y - 4)], style)
        yield f'<text x="{x0 + 48}" y="{y}">{curve.title}</text>'


def _line(x0: float, y: float, label: str) -> Iterator[str]:
    yield f'<line x1="{x0}" x2="{x0 + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
    yield f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def _path(points: Sequence[tuple[float, float]], style: str) -> str:
    return f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}" {style}/>'
