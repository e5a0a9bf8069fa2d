"""Which fault comes next and when, and whom it strikes: drawn from a seed, before anything is touched."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORKER_KILLED, WORKER_STOPPED, AGENT_KILLED, POD_DELETED = (
    "worker killed",
    "worker stopped",
    "agent killed",
    "pod deleted",
)
OPERATOR_KILLED, STORE_AWAY = "operator killed", "store away"
POWER_CUT, PARTITION, DRAIN = "power cut", "partition", "drain"
OF_NODES = (POWER_CUT, PARTITION, DRAIN)
"""Of these one at a time: the job needs two of the three nodes."""
KINDS = (WORKER_KILLED, WORKER_STOPPED, AGENT_KILLED, POD_DELETED, OPERATOR_KILLED, STORE_AWAY, *OF_NODES)
HOLD = {STORE_AWAY: (2.0, 10.0), POWER_CUT: (10.0, 30.0), PARTITION: (3.0, 20.0), DRAIN: (3.0, 20.0)}
"""Seconds until it is put right again, from and to. What is not here is put right by Lockstep."""


@dataclass(frozen=True, slots=True)
class Card:
    """A fault that was drawn."""

    kind: str
    hold: float  # seconds until it is put right again; 0 where nothing is to be put right
    choice: float  # 0 to 1: which of those that it may strike


class Deck:
    """Draws each kind once before any comes twice. Gaps between faults are exponential: they know nothing of each
    other, and some come at once."""

    def __init__(self, seed: int, mean_gap: float) -> None:
        self._dice, self._mean = random.Random(seed), mean_gap
        self._cards: list[Card] = []

    def gap(self) -> float:
        """Seconds until the next fault."""
        return self._dice.expovariate(1 / self._mean)

    def draw(self, fits: Callable[[str], bool]) -> Card | None:
        """The next card whose kind fits now; those before it keep their turn. None where no kind fits."""
        for _ in range(2):
            for card in self._cards:
                if fits(card.kind):
                    self._cards.remove(card)
                    return card
            self._cards += self._round()
        return None

    def _round(self) -> list[Card]:
        kinds = self._dice.sample(KINDS, len(KINDS))
        return [
            Card(kind, round(self._dice.uniform(*HOLD.get(kind, (0, 0))), 1), self._dice.random()) for kind in kinds
        ]


@dataclass(frozen=True, slots=True)
class Seat:
    """A pod of the job or of the operator."""

    pod: str
    uid: str
    node: str
    slot: int | None = None  # None: a spare, or an operator


@dataclass(frozen=True, slots=True)
class Spared:
    """What is not struck any more, so that it lives long enough to be measured: a node with the pods of the job that
    are there, and the operator that works. Workers are struck everywhere."""

    node: str = ""
    operator: str = ""


def aim(card: Card, pods: Sequence[Seat], operators: Sequence[Seat], holder: str, spared: Spared) -> Seat | None:
    """Whom the card strikes; of a node's fault anyone on that node. None where there is nobody. ``holder``: the
    operator's pod that works, who is struck unless it is spared."""
    slots = [pod for pod in pods if pod.slot is not None]
    if card.kind in (WORKER_KILLED, WORKER_STOPPED):
        return _pick(slots, card)
    if card.kind == OPERATOR_KILLED:
        first = [one for one in operators if one.pod == holder != spared.operator]
        return _pick(first or [one for one in operators if one.pod != spared.operator], card)
    elsewhere = [pod for pod in slots if pod.node and pod.node != spared.node]
    return _pick(elsewhere, card)


def _pick(seats: Sequence[Seat], card: Card) -> Seat | None:
    ordered = sorted(seats, key=lambda seat: (seat.slot is None, seat.slot, seat.pod))
    return ordered[int(card.choice * len(ordered))] if ordered else None
