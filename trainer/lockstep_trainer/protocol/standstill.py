"""What hosts stood still for: a sentence for the verdicts on late hosts and on pauses, with the remedy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from lockstep_api.messages import RankWork

STEPS = 20
"""Steps that are looked at: the shortest window of the search."""

_GARBAGE = (
    "Mostly it collected garbage: call gc.collect() in the same step on all ranks, or leave it to the trainer, which "
    "does so."
)
_QUOTA = (
    "Mostly its container had used up its share of the CPUs: raise resources.limits.cpu in the pod template; another "
    "node does not help."
)
_CPU = (
    "Mostly it waited for a CPU: other processes of its node had them; give the pods more CPUs, or the node less to do."
)


class Standstill:
    """The last steps' reports of work."""

    def __init__(self) -> None:
        self._steps: deque[Sequence[RankWork]] = deque(maxlen=STEPS)

    def add(self, work: Sequence[RankWork]) -> None:
        """One step's."""
        self._steps.append(work)

    def clear(self) -> None:
        """Other ranks from now on."""
        self._steps.clear()

    def why(self, ranks: Iterable[int]) -> str:
        """Of these ranks, or of all where there are none. Empty where no host stood still."""
        chosen = frozenset(ranks)
        known = [one for step in self._steps for one in step if not chosen or one.rank in chosen]
        most = sum(one.host for one in known) / 2
        if not most:
            return ""
        if sum(one.garbage for one in known) >= most:
            return _GARBAGE
        return _QUOTA if sum(one.throttled for one in known) >= most else _CPU
