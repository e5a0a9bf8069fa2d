"""Learning rate over the steps: a pure function of the step."""

from __future__ import annotations

import math

from lockstep_api.v1alpha1 import ScheduleSpec


def learning_rate(step: int, *, steps: int, peak: float, schedule: ScheduleSpec) -> float:
    """The learning rate of step ``step`` (the first is 1) of ``steps``.

    It rises linearly over the first ``warmup`` steps and reaches ``peak`` on the last of them. Then, by ``name``:

    - ``constant``: stays there;
    - ``cosine``: falls along half a cosine (Loshchilov, Hutter: SGDR, 2017, without restarts);
    - ``linear``: falls in a straight line;
    - ``wsd``: stays, and falls in a straight line over the last ``decay`` steps (Hu et al.: MiniCPM, 2024; the
      straight line after Hägele et al.: Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations,
      2024).

    Those that fall reach ``peak`` × ``final_ratio`` on the last step.
    """
    if step <= schedule.warmup:
        return peak * step / schedule.warmup
    fall = _fall(steps, schedule)
    if step <= steps - fall:
        return peak
    done = (step - (steps - fall)) / fall
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    low = peak * schedule.final_ratio
    return low + (peak - low) * left


def _fall(steps: int, schedule: ScheduleSpec) -> int:
    """How many steps at the end the rate falls in."""
    free = max(0, steps - schedule.warmup)
    if schedule.name == "constant":
        return 0
    if schedule.name == "wsd":
        return min(free, schedule.decay if schedule.decay is not None else max(1, steps // 10))
    return free
