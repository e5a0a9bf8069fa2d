"""On which steps is replayed: the same steps on all ranks and in each repetition of a run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SUSPICIOUS_SHARE = 0.1
"""Share of the steps that is replayed while a suspicion stands. A fault that spoils 1 in 100 micro-batches is then seen
after 500 steps and not 20,000: a rank takes part in two comparisons of a replayed step."""
SUSPICIOUS_STEPS = 2000
"""How long a suspicion stands without a further disagreement: within them, a fault of 1 in 100 micro-batches is seen
again with probability 0.98."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which steps of a run are replayed."""

    seed: int
    share: float
    """Of the steps, 0 to 1."""
    suspected_at: int | None = None
    """The last step on which units disagreed, or one that is made again because they did."""
    doubted: int | None = None
    """A step that is replayed whatever the share."""

    def includes(self, step: int) -> bool:
        """Whether ``step`` is replayed. What a smaller share includes, a larger one does too."""
        return step == self.doubted or _uniform(self.seed, step) < self.share_at(step)

    def share_at(self, step: int) -> float:
        """The share that counts at ``step``."""
        suspected = self.suspected_at is not None and step - self.suspected_at <= SUSPICIOUS_STEPS
        return max(self.share, SUSPICIOUS_SHARE) if suspected else self.share


def _uniform(seed: int, step: int) -> float:
    """A number from 0 to below 1."""
    drawn = hashlib.blake2b(f"replay/{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "little") / 2**64
