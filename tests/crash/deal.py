"""Draws rounds from a seed: what is killed, when, and what is damaged meanwhile."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from crash import damage
from crash.instants import PHASES, Appears
from crash.strikes import ALL, LEADER, LEADER_POD, MEMBER, MEMBER_POD, SERVER, WORKER, Aim, Strike

_CARDS = (
    "worker in a section", "worker in a section", "worker at a file", "worker at a file", "worker at any time",
    LEADER, MEMBER, SERVER, SERVER, "pod", "two", ALL, ALL, ALL,
)  # fmt: skip
_SINGLE = ("worker in a section", "worker at a file", LEADER, MEMBER, SERVER, "pod")


@dataclass(frozen=True, slots=True)
class Drawn:
    """One round."""

    strikes: tuple[Strike, ...]
    damages: tuple[str, ...] = ()  # to the newest step folders, newest first, while all pods are dead


class Deck:
    """Cards in an order of the seed's: each comes up once before any comes up again."""

    def __init__(self, cards: Sequence[str], dice: random.Random) -> None:
        self._cards, self._dice, self._left = tuple(cards), dice, list[str]()

    def draw(self) -> str:
        """The next one."""
        if not self._left:
            self._left = self._dice.sample(self._cards, len(self._cards))
        return self._left.pop()


class Dealer:
    """Draws rounds among the instants that a job has."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._cards = Deck(_CARDS, dice)
        self._singles = Deck(_SINGLE, dice)
        self._damages = Deck((*damage.KINDS, ""), dice)

    def draw(self, files: Sequence[Appears], sections: Sequence[str]) -> Drawn:
        """The next round."""
        dice = self._dice
        card = self._cards.draw()
        if card == ALL:
            depth = dice.choices((1, 2, 3), (6, 3, 1))[0]
            damages = tuple(kind for kind in (self._damages.draw() for _ in range(depth)) if kind)
            return Drawn((Strike(ALL, self._file_or_any_time(files)),), damages)
        if card != "two":
            return Drawn((self._strike(card, files, sections),))
        first = self._strike(self._singles.draw(), files, sections)
        if first.part == WORKER and dice.random() < 0.5:  # while it recovers
            return Drawn((first, Strike(WORKER, Aim(section="restore"), rank=dice.randrange(2))))
        second = self._strike(self._singles.draw(), files, sections)
        return Drawn((first, Strike(second.part, self._any_time(), second.rank, second.down)))

    def _strike(self, card: str, files: Sequence[Appears], sections: Sequence[str]) -> Strike:
        dice = self._dice
        rank = dice.randrange(2)
        match card:
            case "worker in a section":
                return Strike(WORKER, Aim(section=dice.choice(sections)), rank)
            case "worker at a file":
                return Strike(WORKER, self._file(files), rank)
            case "worker at any time":
                return Strike(WORKER, self._any_time(), rank)
            case "pod":
                return Strike(dice.choice((LEADER_POD, MEMBER_POD)), self._file_or_any_time(files))
            case _:
                down = dice.choice((0.05, 0.5, 3.0)) if card == SERVER else 0.0
                return Strike(card, self._file(files), down=down)

    def _file_or_any_time(self, files: Sequence[Appears]) -> Aim:
        return self._file(files) if self._dice.random() < 0.7 else self._any_time()

    def _file(self, files: Sequence[Appears]) -> Aim:
        """Each phase of a checkpoint is as likely as the others, however many files it has."""
        dice = self._dice
        phase = dice.choice([phase for phase in PHASES if any(file.phase == phase for file in files)])
        file = dice.choice([file for file in files if file.phase == phase])
        return Aim(file=file, delay=min(dice.expovariate(100.0), 0.1))

    def _any_time(self) -> Aim:
        """Within the next moments."""
        return Aim(delay=self._dice.uniform(0.0, 0.6))
