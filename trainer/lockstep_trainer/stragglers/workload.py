"""What is the workload's doing and needs no probe: batches that come late, longer documents, pauses of all hosts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lockstep_trainer.stragglers import evidence, settings
from lockstep_trainer.stragglers.history import Floats
from lockstep_trainer.stragglers.measures import Measures
from lockstep_trainer.stragglers.pauses import Pauses
from lockstep_trainer.stragglers.register import Register, Standing
from lockstep_trainer.stragglers.settings import Settings
from lockstep_trainer.stragglers.shifts import Shift, Watch
from lockstep_trainer.stragglers.work import Finding

_EVERYONE = frozenset({-1})
"""The unit of a finding that names no rank."""


class WorkloadSearch:
    """Findings that blame no node."""

    def __init__(self, measures: Measures, register: Register, user: Settings) -> None:
        self._measures = measures
        self._register = register
        self._user = user
        self._layout = measures.layout
        peers, pause = self._layout.peers, max(user.threshold, settings.PAUSE)
        self._watches = {
            "data": Watch(measures.data, peers, user.threshold, test="events"),
            "store": Watch(measures.store, (np.zeros(1, dtype=np.intp),), user.threshold, test="events"),
            "lengths": Watch(
                measures.lengths,
                peers,
                user.logarithm,
                shortest=settings.WINDOWS[1],
            ),
        }
        self._pauses = Pauses(pause, max(settings.PAUSE_LOSS * user.threshold, settings.PAUSE_LEAST))
        self._stalls = Pauses(pause, max(settings.SUSPECT * user.threshold, settings.PAUSE_LEAST))

    def step(self, last_host: Floats, last_data: Floats) -> list[Finding]:
        """After a step, with its shares of host and data [ranks]."""
        return [*self._data(last_data), *self._lengths(), *self._pause(last_host)]

    def over(self, standing: Standing) -> bool:
        """A finding of this search is over."""
        if standing.part == "pauses":
            return self._pauses.over(standing.window)
        if standing.part == "stalls":
            return self._stalls.over(standing.window)
        return self._watches[standing.part].over(standing.units, standing.window)

    def _data(self, shares: Floats) -> list[Finding]:
        measures, findings = self._measures, list[Finding]()
        if found := self._watches["data"].shifts(self._register.blocked("data", measures.steps)):
            worst = max(found, key=lambda one: one.excess)
            seen = self._seen("data", found, worst, worst.excess * measures.own(worst.window))
            findings.append(self._stand(evidence.data(seen), "data", found))
        findings += self._store()
        self._stalls.add(shares, self._register.units("data"))
        window = self._stalls.frequent(len(self._layout.places))
        if window and not any(self._register.units(part) for part in ("stalls", "data", "store")):
            finding = evidence.data(self._together(self._stalls, window))
            findings.append(self._register.add(Standing(finding, "stalls", _EVERYONE, window, measures.steps)))
        return findings

    def _store(self) -> list[Finding]:
        """All ranks wait in the same steps. None is slower than the others, so the wait is compared with the work."""
        if self._register.units("store") or self._register.units("stalls"):
            return []
        found = self._watches["store"].shifts(frozenset())
        if not found:
            return []
        (shift,), measures = found, self._measures
        since = measures.number(self._watches["store"].began(shift))
        lost = measures.lost(shift.excess * measures.own(shift.window, ("compute", "host")), shift.window)
        seen = evidence.Seen((), since, shift.excess, lost)
        return [self._stand(evidence.data(seen, everyone=True), "store", found)]

    def _lengths(self) -> list[Finding]:
        measures = self._measures
        found = self._watches["lengths"].shifts(self._register.blocked("lengths", measures.steps))
        if not found:
            return []
        worst = max(found, key=lambda one: one.excess)
        seconds = measures.level("compute", worst.unit, worst.window) * (1 - math.exp(-worst.excess))
        return [self._stand(evidence.lengths(self._seen("lengths", found, worst, seconds)), "lengths", found)]

    def _pause(self, shares: Floats) -> list[Finding]:
        self._pauses.add(shares, self._register.units("host"))
        window = self._pauses.frequent(len(self._layout.places))
        if not window or self._register.units("pauses"):
            return []
        finding = evidence.pauses(self._together(self._pauses, window))
        return [self._register.add(Standing(finding, "pauses", _EVERYONE, window, self._measures.steps))]

    def _together(self, pauses: Pauses, window: int) -> evidence.Seen:
        share, measures = pauses.loss(window), self._measures
        return evidence.Seen((), measures.number(window), share, measures.lost(share * measures.own(window), window))

    def _seen(self, part: str, found: Sequence[Shift], worst: Shift, seconds: float) -> evidence.Seen:
        return evidence.Seen(
            tuple(sorted(self._layout.places[one.unit].rank for one in found)),
            self._measures.number(self._watches[part].began(worst)),
            worst.excess,
            self._measures.lost(seconds, worst.window),
        )

    def _stand(self, finding: Finding, part: str, found: Sequence[Shift]) -> Finding:
        units = frozenset(one.unit for one in found)
        window = max(settings.WINDOWS[1], *(one.window for one in found))  # what comes now and then needs a longer look
        return self._register.add(Standing(finding, part, units, window, self._measures.steps))
