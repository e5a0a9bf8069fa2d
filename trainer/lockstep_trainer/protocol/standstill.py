"""What hosts stood still for: for the verdicts on late hosts and on pauses, a sentence with the remedy, and whether a
node may be blamed at all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lockstep_api.messages import RankWork

STEPS = 20
"""Steps that are looked at: the shortest window of the search."""


@dataclass(frozen=True, slots=True)
class Reason:
    """What a host mostly stood still for."""

    sentence: str = ""
    """With the remedy; empty where it is not known."""
    follows: bool = False
    """The pod takes it along to whatever node it goes."""


_GARBAGE = Reason(
    "Mostly it collected garbage: call gc.collect() in the same step on all ranks, or leave it to the trainer, which "
    "does so; another node does not help.",
    follows=True,
)
_QUOTA = Reason(
    "Mostly its container had used up its share of the CPUs: raise resources.limits.cpu in the pod template; another "
    "node does not help.",
    follows=True,
)
_CPU = Reason(
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

    def why(self, ranks: Iterable[int]) -> Reason:
        """Of these ranks, or of all where there are none."""
        chosen = frozenset(ranks)
        known = [one for step in self._steps for one in step if not chosen or one.rank in chosen]
        most = sum(one.host for one in known) / 2
        if not most:
            return Reason()
        if sum(one.garbage for one in known) >= most:
            return _GARBAGE
        return _QUOTA if sum(one.throttled for one in known) >= most else _CPU
