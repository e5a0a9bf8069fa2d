"""The search for slow ranks: what was measured goes in step by step, probes and verdicts come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from lockstep_trainer.stragglers import settings
from lockstep_trainer.stragglers.devices import DeviceSearch
from lockstep_trainer.stragglers.layout import Layout
from lockstep_trainer.stragglers.linksearch import LinkSearch
from lockstep_trainer.stragglers.measures import Measures
from lockstep_trainer.stragglers.register import Register, Standing
from lockstep_trainer.stragglers.settings import Settings
from lockstep_trainer.stragglers.transfers import Transfers
from lockstep_trainer.stragglers.work import Ended, Finding, Place, Probe, Probed, ProbeKind, Work
from lockstep_trainer.stragglers.workload import WorkloadSearch

Said: TypeAlias = Probe | Finding | Ended


class Detector:
    """Finds which rank is slow, since when, and why.

    Its clock is the steps that it is told of; they may repeat, or leave some out. A probe that it asks for is answered
    by ``probed``, or never. Memory is bounded: the last 160 steps.
    """

    def __init__(self, places: Sequence[Place], user: Settings | None = None) -> None:
        """For a job with these places.

        Raises:
            ValueError: no place, or a rank with two of them.
        """
        self._user = user or Settings()
        self._begin(Layout.of(places))

    def _begin(self, layout: Layout) -> None:
        self._layout = layout
        self._warm = settings.WARM
        self._number = 0
        self._register = Register()
        self._measures = Measures(layout, self._user)
        self._transfers = Transfers(layout, self._user)
        self._search({})

    def _search(self, healthy: Mapping[ProbeKind, float]) -> None:
        self._devices = DeviceSearch(self._measures, self._register, self._user, healthy)
        self._links = LinkSearch(self._measures, self._transfers, self._register, self._user)
        self._workload = WorkloadSearch(self._measures, self._register, self._user)

    @property
    def standing(self) -> tuple[Finding, ...]:
        """Findings that have not ended."""
        return tuple(one.finding for one in self._register.standing)

    def step(self, number: int, work: Sequence[Work], seconds: float) -> list[Said]:
        """One optimizer step.

        Args:
            number: The step's number.
            work: Of the ranks that told it; some may be missing.
            seconds: The job's time for the step.
        """
        self._number = number
        if self._warm > 0:
            self._warm -= 1
            return []
        measures = self._measures
        measures.add(number, work, seconds)
        self._transfers.add(work)
        if measures.calibration_due:
            measures.calibrate(self._devices.frozen)
            self._transfers.calibrate(self._links.frozen)
        said: list[Said] = []
        said += self._register.ended(number, measures.steps, self._over)
        said += self._devices.narrowed(number)
        host, data = measures.host.rows(1)[0], measures.data.rows(1)[0]
        said += self._workload.step(host, data)
        said += self._devices.step()
        said += self._links.step()
        return said

    def probed(self, answer: Probed) -> list[Said]:
        """The answer to a probe. One that was not asked for, or comes too late, changes nothing."""
        return [*(self._links.probed(answer) if answer.kind == "link" else self._devices.probed(answer))]

    def restart(self, places: Sequence[Place]) -> list[Ended]:
        """A new generation: steps may repeat, its first ones are slow, ranks may be on other nodes.

        What was known is kept where each rank does the same work as before; of a rank on another node everything is
        forgotten, and its finding has ended. At another layout the search begins anew, and all findings have ended.

        Raises:
            ValueError: no place, or a rank with two of them.
        """
        layout, before = Layout.of(places), self._layout
        if not layout.same_shape(before):
            ended = self._register.drop(self._number, lambda _: True)
            self._begin(layout)
            return ended
        moved = {now.rank for now, was in zip(layout.places, before.places, strict=True) if now.node != was.node}
        ended = self._register.drop(self._number, lambda finding: bool(moved & set(finding.ranks)))
        self._layout = self._measures.layout = self._transfers.layout = layout
        for rank in moved:
            self._measures.forget(layout.index[rank])
        self._register.forget()
        self._warm = settings.WARM
        self._search({} if moved else self._devices.healthy)
        return ended

    def _over(self, standing: Standing) -> bool:
        if standing.part == "links":
            return self._links.over(standing)
        if standing.part in ("compute", "host", "stages"):
            return self._devices.over(standing)
        return self._workload.over(standing)
