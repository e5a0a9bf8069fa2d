"""Learning rate over the steps."""

from __future__ import annotations

import math

from lockstep_api.v1alpha1 import ScheduleSpec


def learning_rate(step: int, *, steps: int, peak: float, schedule: ScheduleSpec) -> float:
    """The learning rate of step ``step`` (the first is 1) of ``steps``.

    It rises linearly over the first ``warmup`` steps, reaches ``peak`` on the last of them, and then stays there
    (constant) or falls along half a cosine to ``peak`` × ``final_ratio`` on the last step (Loshchilov, Hutter: SGDR,
    2017, without restarts).
    """
    if step <= schedule.warmup:
        return peak * step / schedule.warmup
    if schedule.name == "constant" or steps <= schedule.warmup:
        return peak
    done = (step - schedule.warmup) / (steps - schedule.warmup)
    low = peak * schedule.final_ratio
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))
