"""What is compared, by name and in the order of the computation. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward", "update", "check"]


@dataclass(frozen=True, slots=True)
class Point:
    """A tensor of a micro-batch's computation, on one rank."""

    stage: int
    """Of the pipeline."""
    phase: Phase
    name: str
    """The module whose output, or in the backward pass whose input's gradient it is, or the parameter whose gradient
    it is, or whose update; what was computed of known numbers."""
    local: bool
    """This rank made it out of what is compared as well. False: a collective stands between, so that another rank of
    the unit may be to blame."""

    def __str__(self) -> str:
        """As a person reads it."""
        return f"{self.name} ({self.phase}, stage {self.stage})"


@dataclass(frozen=True, slots=True, order=True)
class Order:
    """When a point is computed, comparable between the ranks of a unit: a micro-batch goes forward from the first stage
    to the last and backward to the first; within a stage, the ranks of a tensor and context group do the same things
    in the same order."""

    backward: bool
    stage: int  # counted in the direction of the pass
    position: int
    """How many points came before on its rank."""


def order(point: Point, position: int) -> Order:
    """When ``point`` is computed, which came as the ``position``-th on its rank."""
    backward = point.phase == "backward"
    return Order(backward, -point.stage if backward else point.stage, position)
