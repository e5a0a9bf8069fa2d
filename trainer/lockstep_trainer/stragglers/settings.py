"""What the user sets, and the constants of the search.

The constants without another source were frozen on the tuning set (``tests/stragglers/tuning.py``, scored by
``tests/stragglers/tune.py``) before anything else was scored with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user sets.

    Raises:
        ValueError: ``threshold`` is not within 0.02 to 1.
    """

    threshold: float = 0.1
    """A part of a rank's work that takes longer by this share counts: 0.1 is 10 %, as in Greyhound (ATC'25) and in
    ByteDance's what-if analysis (OSDI'25)."""

    def __post_init__(self) -> None:
        if not 0.02 <= self.threshold <= 1:
            raise ValueError(f"threshold: {self.threshold} is not within 0.02 and 1: set 0.1 for ranks 10 % slow")

    @property
    def logarithm(self) -> float:
        """The threshold for logarithms of ratios."""
        return math.log1p(self.threshold)


WARM = 3
"""Steps ignored at the start of a generation: compilation, autotuning, caches that fill."""

CALIBRATE = (10, 20, 40, 80)
"""Steps known when the expected time is fitted (again); later every ``RECALIBRATE`` steps."""
RECALIBRATE = 40

WINDOWS = (20, 40, 80, 160)
"""Steps over which a level is looked at. The shortest is also the persistence: what began later is not suspected yet.
A longer one finds what the noise hides from a shorter one."""
LONGEST = WINDOWS[-1]

SUSPECT = 0.9
"""Share of the threshold from which a level is suspected: half of the levels that are as high as the threshold are
estimated lower."""
MARGIN = 2.0
"""Standard errors that a level must be above that share: a window is looked at in every step, and the worst of all
looks at what is somewhat below the threshold is above it. Where the noise is that high, a longer window decides."""
PERSISTENT = 0.5
"""Share of the threshold that the median of each third of the window must reach: what was over after two thirds is no
suspicion. A rank of a suspect's node is probed with it from the same share on."""
QUIET_GAPS = 2
"""Mean gaps between events that may be without one at either end of the window, for the same reason."""
OVER = 0.5
"""Share of the threshold below which a finding has ended."""

CERTAIN = 5.0
"""Standard errors that a level must be above its reference: 3 in 10 million for normal noise, for up to 10⁴ ranks in
10³ windows that share no step; what is left is stopped by the probe."""
OFTEN = 0.5
"""Share of the steps from which a host is late all the time; now and then it may be saving or evaluating."""
UNLIKELY = 18.0
"""Chernoff's exponent for counts of events: less than e⁻¹⁸ = 1.5 in 100 million."""
RARE = 0.005
"""Events per step that any healthy rank is granted."""

PAUSE_LEAST = 0.02
"""What they must cost whatever the threshold: half a step's work in every 50th, for a checkpoint, costs half of it."""
PAUSE_EVENTS = 8
"""Pauses within a window before they are called that."""
PAUSE = 0.1
"""Share of a step's work from which a host has paused, or the threshold where that is more."""
PAUSE_LOSS = 0.75
"""Share of the threshold that pauses of all ranks together must cost, by ``MARGIN`` standard errors."""
UNEVEN = 12.0
"""Chernoff's exponent from which one rank has more of the pauses than chance gives it."""

LINK_COST = 0.03
"""Share of the threshold that a slow transfer must cost of the step's time at least: 0.3 % of the step."""

REFERENCES = 8
"""Ranks without suspicion that are probed beside the suspects."""
STAGE_SAMPLE = 4
"""Ranks of a suspected stage that are probed."""
PROBE_AGREES = 0.5
"""Share of the threshold by which a probe must be slow to agree: the suspicion stands already."""
PROBE_CERTAIN = 2.5
"""Standard deviations of the references by which it must be slow, for thresholds near to what devices differ by."""
PROBE_EXPLAINS = 0.25
"""Share of the suspected slowdown that a probe or the clock must show to explain it."""
CLOCK_EXPLAINS = 0.4
"""Share of the slowdown that the clock must be lower by to be its cause."""
PROBE_ROUNDS = 6
"""Rounds of a probe at most, when the noise leaves it undecided."""
PROBE_FEW_ROUNDS = 3
"""Rounds at least where fewer than three references are there to tell the noise: the rounds themselves must."""
LINK_AGREES = 0.75
"""The same for a pair of ranks, of which each suspect has a few."""
LINK_LOOKS = (5, 22)
"""Steps known when all links are looked at, as what is slow from the start has no past; the second time only where the
first one found some: they may have been slow for a moment."""
LINK_CERTAIN = 4.0
"""Standard errors by which a rank's pairs must be slow on average: 3 in 100,000 for each rank of a group."""
LINK_FROM_START = 0.26
"""How slow, as a logarithm, a link must be at both looks: 30 % at least, as nothing in the steps confirms it."""
LINK_ROUNDS = 3
"""Rounds of a probe of links: each suspect with this many partners."""
PATIENCE = 10
"""Steps within which a probe is answered; later its question is dropped."""
BACKOFF = 50
"""Steps for which a suspicion that no probe confirmed rests; twice as long each time."""
BACKOFF_DOUBLINGS = 6
