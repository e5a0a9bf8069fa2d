"""Which layers make a stage of a pipeline: what layers cost, and the split that makes the dearest stage cheapest.

Without torch, so that the command line can say what a layout needs; ``pipeline.measured_costs`` times the real thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lockstep_trainer.model.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Costs:
    """What forward and backward of each piece cost, in any one unit."""

    embedding: float
    layers: tuple[float, ...]
    head: float  # with the last norm

    def numbers(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return self.embedding, *self.layers, self.head


def modelled_costs(config: DecoderConfig, sequence_length: int, *, recompute: str = "none") -> Costs:
    """Costs by FLOPs of a token.

    2 per weight in the forward pass and twice that in the backward pass; scores and values of attention over half of
    the sequence, or the window. With full recomputation a layer's forward pass counts twice. An embedding is a look-up
    and costs nothing.
    """
    seen = min(sequence_length / 2, config.window or sequence_length)
    width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = 2 * config.dim * (2 * width + 2 * kv_width) + 4 * width * seen
    matrices = 3 if config.gated else 2
    passes = 4 if recompute == "full" else 3

    def layer(number: int) -> float:
        router, hidden = 0, config.ffn_dim
        if config.has_experts(number):
            router = 2 * config.dim * config.experts
            hidden = config.experts_per_token * (config.expert_dim or config.ffn_dim) + config.shared_expert_dim
        return passes * (attention + router + 2 * matrices * config.dim * hidden)

    return Costs(0.0, tuple(layer(number) for number in range(config.layers)), 6.0 * config.dim * config.vocab_size)


def costs_by_count(config: DecoderConfig) -> Costs:
    """Each layer costs the same; embedding and head cost nothing."""
    return Costs(0.0, (1.0,) * config.layers, 0.0)


def split_layers(costs: Costs, stages: int) -> list[range]:
    """The layers of each stage: contiguous, at least one each, with the dearest stage as cheap as can be.

    Of the splits that reach this, the one whose stages differ least (least sum of squares), of equal ones the one with
    more layers at the start. Raises ValueError where there are fewer layers than stages. Dynamic programming, in time
    stages × layers².
    """
    layers = len(costs.layers)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers don't make {stages} stages")
    up_to = [0.0]
    for cost in costs.layers:
        up_to.append(up_to[-1] + cost)

    def cost_of(stage: int, start: int, end: int) -> float:
        cost = up_to[end] - up_to[start]
        return cost + (costs.embedding if stage == 0 else 0.0) + (costs.head if stage == stages - 1 else 0.0)

    dearest, _ = _best(layers, stages, cost_of, max)
    limit = dearest * (1 + 1e-9)  # the same sum in another order must not exclude the best split

    def squares(before: float, cost: float) -> float:
        return before + cost * cost if cost <= limit else float("inf")

    _, bounds = _best(layers, stages, cost_of, squares)
    return [range(start, end) for start, end in pairwise(bounds)]


def _best(
    layers: int,
    stages: int,
    cost_of: Callable[[int, int, int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The least value of ``combine`` folded over the stages' costs, and the split that has it: bounds from 0 to
    ``layers``."""
    best = {end: (combine(0.0, cost_of(0, 0, end)), [0, end]) for end in range(1, layers - stages + 2)}
    for stage in range(1, stages):
        following: dict[int, tuple[float, list[int]]] = {}
        for end in range(stage + 1, layers - stages + stage + 2):
            values = {start: combine(best[start][0], cost_of(stage, start, end)) for start in best if start < end}
            start = min(values, key=lambda at: (values[at], -at))
            following[end] = (values[start], [*best[start][1], end])
        best = following
    return best[layers]
