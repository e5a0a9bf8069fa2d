"""Thins out what is drawn: a chart has a thousand pixels, a run may have a million steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep_cli.journal import Step


@dataclass(frozen=True, slots=True)
class Point:
    """A mean, and the spread that it stands for."""

    x: float
    y: float
    low: float
    high: float


def thin(points: Sequence[tuple[float, float]], at_most: int) -> list[Point]:
    """At most ``at_most`` points: means over equal counts, each with its smallest and largest value."""
    if not points:
        return []
    count = -(-len(points) // max(1, at_most))
    thinned = []
    for index in range(0, len(points), count):
        part = points[index : index + count]
        values = [y for _, y in part]
        x = sum(x for x, _ in part) / len(part)
        thinned.append(Point(x, sum(values) / len(part), min(values), max(values)))
    return thinned


def stretches(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps cut where the term changes, or where new steps follow redone ones: a line must not bridge a fault."""
    cut: list[list[Step]] = []
    for step in steps:
        same = cut and (cut[-1][-1].epoch, cut[-1][-1].generation, cut[-1][-1].recomputed) == (
            step.epoch,
            step.generation,
            step.recomputed,
        )
        if same:
            cut[-1].append(step)
        else:
            cut.append([step])
    return cut


def throughput(steps: Sequence[Step], begin: float, end: float, bins: int) -> tuple[list[float], list[float]]:
    """Tokens per second in equal bins of [begin, end]: (new tokens, tokens of steps that were done again).

    A step's tokens are spread evenly over the time it took, so that time in which nothing ran shows as zero.
    """
    width = (end - begin) / bins
    new, again = [0.0] * bins, [0.0] * bins
    if width <= 0:
        return new, again
    for step in steps:
        start, stop = max(begin, step.at - step.seconds), min(end, step.at)
        if stop <= start:
            continue
        rate = step.tokens / (stop - start)
        target = again if step.recomputed else new
        first, last = int((start - begin) / width), min(bins - 1, int((stop - begin) / width))
        for index in range(first, last + 1):
            left, right = begin + index * width, begin + (index + 1) * width
            target[index] += rate * max(0.0, min(stop, right) - max(start, left)) / width
    return new, again


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
