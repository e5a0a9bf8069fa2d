"""How often a kept state is brought to the store, where the user does not say it."""

from __future__ import annotations

import math
from dataclasses import dataclass

PRIOR_GPU_SECONDS = 50_000 * 3600.0
"""One interruption in 50,000 GPU hours: Llama 3 405B had 419 unexpected ones in 54 days on 16,384 GPUs (Llama Team,
"The Llama 3 Herd of Models", 2024, section 3.3.4)."""
UPLOAD_SHARE = 0.02
"""What part of the time that an upload takes is lost for training: agents read memory and send beside it."""
SHORTEST_SECONDS = 10.0
LONGEST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Cadence:
    """The interval between two durable checkpoints, and what it comes from; all in seconds but ``faults``."""

    interval: float
    cost: float  # of one checkpoint, in time that training loses
    blocked: float  # that the loop stood still for the snapshot
    upload: float  # from the order to the commit
    mtbf: float  # mean time between faults of the whole job
    faults: int  # that were seen
    observed: float  # how long was looked

    def figures(self) -> dict[str, float]:
        """For a report."""
        return {name: round(float(getattr(self, name)), 3) for name in self.__slots__}


def cadence(*, blocked: float, upload: float, faults: int, observed: float, gpus: int) -> Cadence:
    """interval = sqrt(2 x cost x MTBF), with cost = blocked + UPLOAD_SHARE x upload.

    The interval at which the time that checkpoints cost and the work that a fault takes away are least in sum, to first
    order: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly,
    FGCS 22(3), 2006, whose higher terms matter only where an interval is near the MTBF.

    MTBF = (observed + prior) / (faults + 1), with prior = PRIOR_GPU_SECONDS / gpus: the mean of the faults' rate after
    so many faults, where one in ``prior`` seconds was expected before. Never shorter than an upload takes, and within
    SHORTEST_SECONDS and LONGEST_SECONDS.
    """
    prior = PRIOR_GPU_SECONDS / max(1, gpus)
    mtbf = (max(0.0, observed) + prior) / (faults + 1)
    cost = blocked + UPLOAD_SHARE * upload
    wanted = math.sqrt(2.0 * cost * mtbf)
    interval = min(max(wanted, SHORTEST_SECONDS, upload), max(LONGEST_SECONDS, upload))
    return Cadence(interval, cost, blocked, upload, mtbf, faults, observed)
