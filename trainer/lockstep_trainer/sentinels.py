"""Sentinels: loss, gradient norm and update size that are far above what they lately were. Pure.

A bit that flips in the right place makes one of them jump, on whatever rank it was: all know the same figures, and no
second computation is needed. What stays within a run's own noise they can't see, and that is most of what broken
hardware does (3 of 18 incidents of AEGIS showed any symptom): ring replay looks for that.

A figure is judged by its logarithm, against the median and the median absolute deviation of the last ``WINDOW`` steps.
Both hold still while half of the window is wrong. Only what is too large counts: training lets all three fall.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass

WINDOW = 128
"""Steps that tell what is usual. Megatron's rerun machine takes 100."""
WARM = 32
"""Steps without which nothing is judged: a deviation over fewer is off by a quarter and more."""
DEVIATIONS = 10.0
"""How many deviations above the median a figure must be. EROICA takes median + 5 MAD, 3.4 deviations, and compares
machines that do the same; a run's figures have tails. Losses of batches of 256 tokens were recorded 6.9 above."""
NORMAL_MAD = 1.4826
"""Median absolute deviations in the standard deviation of a normal distribution."""
OVER = 8
"""Usual steps in a row after which an episode is over."""
NEW_LEVEL = 64
"""Unusual steps in a row after which what is unusual has become the run's own level, and is learned anew."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is too large."""

    signal: str
    times: float
    """At least so many times the median: a figure that hardly moves would be unusual at once."""
    spread: float
    """Deviation of the logarithm that is assumed at least."""


RULES = (
    # Megatron's rerun machine takes 10 times the largest loss of 100: for cross-entropy more than a model that knows
    # nothing has. Losses of a batch of 256 tokens, the smallest that was recorded, stayed below 1.3 times the median.
    Rule("loss", times=1.5, spread=0.01),
    # Norms have spikes with sound hardware, which clipping is there for: 18 times the median was recorded, with two
    # samples in a step. A high bit of an exponent is worth 10⁴ times and more, so little is lost by not looking lower.
    Rule("gradientNorm", times=32.0, spread=0.05),
    # AdamW's updates hardly differ from step to step: a moment of 0.9 and 0.999 is an average of many.
    Rule("updateSize", times=2.0, spread=0.02),
)


@dataclass(frozen=True, slots=True)
class Outlier:
    """A figure is unusual, or (``ended``) is not any more."""

    signal: str
    step: int
    """At which it began."""
    value: float
    """Then; infinite and NaN are unusual at once."""
    usual: float
    """Median of the steps before it; NaN where there were too few."""
    deviations: float
    ended: bool = False

    @property
    def evidence(self) -> str:
        """The numbers: a sentence without a full stop."""
        words = _WORDS[self.signal]
        if not math.isfinite(self.value):
            return f"the {words} is {self.value}"
        return (
            f"the {words} is {self.value:.4g}, {self.value / self.usual:.3g} times its median of {self.usual:.4g} and "
            f"{self.deviations:.0f} deviations above it"
        )


_WORDS = {"loss": "loss", "gradientNorm": "gradient's norm", "updateSize": "size of the optimizer's update"}


class Sentinel:
    """Of one figure."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._logs: deque[float] = deque(maxlen=WINDOW)
        self._sorted: list[float] = []
        self._standing: Outlier | None = None
        self._usual_steps = self._unusual_steps = 0

    def judge(self, step: int, value: float) -> Outlier | None:
        """Take the figure of a step; at the beginning and at the end of an episode it says so."""
        found = self._unusual(step, value)
        if found is None:
            self._learn(math.log(max(value, 1e-300)))
            return self._was_usual()
        self._usual_steps = 0
        self._unusual_steps += 1
        if self._unusual_steps >= NEW_LEVEL:
            self._logs.clear()
            self._sorted.clear()
            self._unusual_steps = 0
        if self._standing is not None:
            return None
        self._standing = found
        return found

    def _unusual(self, step: int, value: float) -> Outlier | None:
        if not math.isfinite(value):
            return Outlier(self.rule.signal, step, value, math.nan, math.inf)
        if len(self._sorted) < WARM:
            return None
        middle = _median(self._sorted)
        above = math.log(max(value, 1e-300)) - middle
        if above < math.log(self.rule.times):
            return None  # before the costly part: nearly every step ends here
        apart = _median(sorted(abs(one - middle) for one in self._sorted))
        deviations = above / max(NORMAL_MAD * apart, self.rule.spread)
        if deviations < DEVIATIONS:
            return None
        return Outlier(self.rule.signal, step, value, math.exp(middle), deviations)

    def _learn(self, log: float) -> None:
        if len(self._logs) == WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._logs[0])]
        self._logs.append(log)
        bisect.insort(self._sorted, log)

    def _was_usual(self) -> Outlier | None:
        self._unusual_steps = 0
        self._usual_steps += 1
        if self._standing is None or self._usual_steps < OVER:
            return None
        ended, self._standing = self._standing, None
        return Outlier(ended.signal, ended.step, ended.value, ended.usual, ended.deviations, ended=True)


class Sentinels:
    """Of all figures of a run; a generation begins without memory."""

    def __init__(self, rules: tuple[Rule, ...] = RULES) -> None:
        self._sentinels = {rule.signal: Sentinel(rule) for rule in rules}

    def step(self, step: int, **figures: float | None) -> list[Outlier]:
        """What is to be said of a step's figures, by signal; None where one was not measured."""
        said = (self._sentinels[signal].judge(step, value) for signal, value in figures.items() if value is not None)
        return [one for one in said if one is not None]


def _median(values: list[float]) -> float:
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2
