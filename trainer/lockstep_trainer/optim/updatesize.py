"""How large AdamW's update is, whatever the learning rate and the number of parameters: its root mean square, 1 at most
or little more.

What broken memory does to the optimizer's moments shows here and stays: a gradient is new in each step, a moment is
not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lockstep_trainer.parallel.gradients import copies
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.sharded import local_shard

EVERY = 16
"""Steps between two measurements: each reads both moments once, as the step itself does beside gradient and weight."""
_CHUNK = 2**22
"""Elements that are looked at at a time, so that no copy of a large tensor is made: 32 MiB."""


def update_squares(
    parameters: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.AdamW,
    layout: Layout,
    second_copies: Collection[str] = (),
) -> Tensor:
    """This rank's share of Σ u² and of the number of elements, (2,) float64, with u = m̂ / (√v̂ + ε), Adam's update
    without learning rate and weight decay (Kingma and Ba 2015, algorithm 1). Summed over the world each element counts
    once; ``parallel.gradients.squares`` says how."""
    names = {parameter: name for name, parameter in parameters}
    stage_ranks = layout.world_size // layout.pipeline
    total = None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            state = optimizer.state.get(parameter, {})
            if name in second_copies or "exp_avg" not in state:
                continue
            squares, elements = _of(state, group)
            own = torch.stack([squares, squares.new_tensor(float(elements))]) / copies(name, parameter, stage_ranks)
            total = own if total is None else total + own
    return torch.zeros(2, dtype=torch.float64, device=parameters[0][1].device) if total is None else total


def rms(totals: Tensor) -> float | None:
    """Of what all ranks add up to; None before the first step."""
    squares, elements = totals.tolist()
    return math.sqrt(squares / elements) if elements else None


def _of(state: dict[str, Tensor], group: dict[str, object]) -> tuple[Tensor, int]:
    betas, eps = group["betas"], group["eps"]
    assert isinstance(betas, tuple)
    assert isinstance(eps, float)
    step = state["step"]  # it may be on the GPU, and is not waited for
    first, second = (local_shard(state[name]).flatten() for name in ("exp_avg", "exp_avg_sq"))
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    scale = (1 - betas[1] ** step).sqrt()
    for at in range(0, first.numel(), _CHUNK):
        m, v = first[at : at + _CHUNK], second[at : at + _CHUNK]
        update = m / (v.sqrt() / scale + eps)
        total += torch.linalg.vector_norm(update, dtype=torch.float64).square()
    return total / (1 - betas[0] ** step) ** 2, first.numel()
