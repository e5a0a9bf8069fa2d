"""Ranks whose device or host is slow, and stages with more to do: suspected by their work, told apart by probes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from lockstep_trainer.stragglers import evidence, settings
from lockstep_trainer.stragglers.hardware import Clock, Inquiry, Reading, cause
from lockstep_trainer.stragglers.history import median
from lockstep_trainer.stragglers.measures import Measures
from lockstep_trainer.stragglers.register import Register, Standing
from lockstep_trainer.stragglers.settings import Settings
from lockstep_trainer.stragglers.shifts import Shift, Watch
from lockstep_trainer.stragglers.work import Cause, Ended, Finding, Probe, Probed, ProbeKind

_NOW = 5
"""Steps that tell the clock as it is now."""
_CAUSES = frozenset({Cause.CLOCK, Cause.MEMORY, Cause.COMPUTE})


class DeviceSearch:
    """One inquiry at a time, for all that is suspected when it starts."""

    def __init__(
        self,
        measures: Measures,
        register: Register,
        user: Settings,
        healthy: Mapping[ProbeKind, float] | None = None,
    ) -> None:
        """Args: ``healthy``, for a rank alone in its job, what the last generation knew of it on the same node."""
        self._measures = measures
        self._register = register
        self._user = user
        self._layout = measures.layout
        self._alone = len(self._layout.places) == 1
        peers, every_stage = self._layout.peers, np.arange(len(self._layout.stages))
        self._watches = {
            "compute": Watch(measures.compute, peers, user.logarithm),
            "host": Watch(measures.host, peers, user.threshold, test="events"),
            "stages": Watch(measures.stages, (every_stage,), user.logarithm),
        }
        self._inquiry: Inquiry | None = None
        self.healthy: dict[ProbeKind, float] = dict(healthy or {})
        """Logarithms of the seconds that probes of a rank alone in its job took when it was well."""

    def step(self) -> list[Probe]:
        """After a step: what is to be probed."""
        known_for = self._now - settings.CALIBRATE[0]
        if self._alone and not self.healthy and known_for >= 0 and known_for % settings.BACKOFF == 0:
            # nobody to be compared with later but itself now
            ranks = (self._rank(0),)
            return [Probe("compute", ranks), Probe("memory", ranks)]
        if self._inquiry is not None:
            if self._now - self._inquiry.asked > settings.PATIENCE:
                self._drop(self._inquiry)
            return []
        compute, host, stages = self._suspicions()
        if not (compute or host or stages):
            return []
        self._inquiry = inquiry = self._open(compute, host, stages)
        if inquiry.references or self.healthy:
            return inquiry.ask()
        self._drop(inquiry)
        return []

    def probed(self, answer: Probed) -> list[Probe | Finding]:
        """An answer to a probe of devices."""
        inquiry = self._inquiry
        if inquiry is None:
            if self._alone and answer.kind not in self.healthy:
                for seconds in answer.ranks.values():
                    self.healthy[answer.kind] = math.log(max(seconds, 1e-9))
            return []
        if not inquiry.take(answer):
            return []
        readings = {rank: inquiry.reading(rank, self.healthy) for rank in inquiry.suspects}
        if inquiry.undecided(readings, self._user.logarithm):
            inquiry.asked = self._now
            return [*inquiry.ask()]
        self._inquiry = None
        return [*self._verdicts(inquiry, {rank: one for rank, one in readings.items() if one is not None})]

    def over(self, standing: Standing) -> bool:
        """A finding of this search is over."""
        return self._watches[standing.part].over(standing.units, standing.window)

    def narrowed(self, step: int) -> list[Ended | Finding]:
        """Findings whose ranks are not all slow any more, for those that still are."""
        return self._register.narrowed(step, self._now, self._healthy)

    def _healthy(self, standing: Standing, unit: int) -> bool:
        return self._watches[standing.part].over(frozenset({unit}), standing.window)

    @property
    def frozen(self) -> frozenset[int]:
        """Stages of a single rank that is suspected or found: what it does now is not to become its usual."""
        units = set(self._register.units("compute") | self._register.units("host"))
        if self._inquiry is not None:
            units |= {*self._inquiry.compute, *self._inquiry.host}
        return frozenset(
            at for at, stage in enumerate(self._layout.stages) if len(stage) == 1 and int(stage[0]) in units
        )

    def _suspicions(self) -> tuple[dict[int, Shift], dict[int, Shift], dict[int, Shift]]:
        """By index of the rank: compute and host; by stage."""
        slow = self._known_slow()
        explained = {at for at, stage in enumerate(self._layout.stages) if slow & set(stage.tolist())}
        found: dict[str, dict[int, Shift]] = {}
        for part, aside in (("compute", slow), ("host", slow), ("stages", frozenset(explained))):
            blocked, watch = self._register.blocked(part, self._now) | aside, self._watches[part]
            shifts = watch.shifts(blocked)
            if part != "stages" and shifts:
                nodes = {self._layout.places[one.unit].node for one in shifts}
                beside = [at for at, place in enumerate(self._layout.places) if place.node in nodes]
                shifts += watch.companions(shifts, (at for at in beside if at not in blocked))
            found[part] = {one.unit: one for one in shifts}
        host = {at: one for at, one in found["host"].items() if self._often(one)}
        return found["compute"], host, found["stages"]

    def _often(self, shift: Shift) -> bool:
        rows = self._measures.host.rows(shift.window)[:, shift.unit]
        return float((rows >= self._user.threshold / 2).mean()) > settings.OFTEN

    @property
    def _now(self) -> int:
        return self._measures.steps

    def _known_slow(self) -> frozenset[int]:
        ranks = [rank for one in self._register.standing if one.finding.cause in _CAUSES for rank in one.finding.ranks]
        return frozenset(self._layout.index[rank] for rank in ranks)

    def _open(self, compute: Mapping[int, Shift], host: Mapping[int, Shift], stages: Mapping[int, Shift]) -> Inquiry:
        places = self._layout.places
        suspects: dict[int, float] = {self._rank(at): 0.0 for at in host}
        apart: set[int] = set()
        for stage, shift in stages.items():
            members = self._layout.stages[stage]
            apart |= set(members.tolist())
            excess = self._watches["stages"].size(shift)
            suspects |= {self._rank(at): excess for at in _spaced(members.tolist(), settings.STAGE_SAMPLE)}
        suspects |= {self._rank(at): self._watches["compute"].size(shift) for at, shift in compute.items()}
        apart |= {self._layout.index[rank] for rank in suspects} | self._known_slow()
        nodes = {places[self._layout.index[rank]].node for rank in suspects}
        others = [at for at in range(len(places)) if at not in apart]
        elsewhere = [at for at in others if places[at].node not in nodes]
        chosen = elsewhere if len(elsewhere) >= settings.REFERENCES else others
        references = tuple(self._rank(at) for at in _spaced(chosen, settings.REFERENCES))
        return Inquiry(self._measures.steps, suspects, references, compute, host, stages)

    def _drop(self, inquiry: Inquiry) -> None:
        for part, units in (("compute", inquiry.compute), ("host", inquiry.host), ("stages", inquiry.stages)):
            self._register.rest(part, units, self._now)
        self._inquiry = None

    def _verdicts(self, inquiry: Inquiry, readings: Mapping[int, Reading]) -> list[Finding]:
        index, threshold = self._layout.index, self._user.logarithm
        causes: dict[int, Cause] = {}
        for rank, reading in readings.items():
            excess = inquiry.suspects[rank]
            found = cause(reading, self._clock(index[rank], inquiry) or Clock(), excess, threshold)
            if found is not None:
                causes[index[rank]] = found
        findings = self._slow_devices(inquiry, readings, causes)
        findings += self._slow_stages(inquiry, readings, causes)
        findings += self._late_hosts(inquiry, readings, causes)
        named = {index[rank] for one in findings for rank in one.ranks}
        self._register.rest("compute", [at for at in inquiry.compute if at not in named], self._now)
        self._register.rest("host", [at for at in inquiry.host if at not in named], self._now)
        standing = self._register.units("stages")
        self._register.rest("stages", [stage for stage in inquiry.stages if stage not in standing], self._now)
        return findings

    def _slow_devices(
        self, inquiry: Inquiry, readings: Mapping[int, Reading], causes: Mapping[int, Cause]
    ) -> list[Finding]:
        by_node: dict[tuple[str, Cause], list[int]] = defaultdict(list)
        for at in inquiry.compute:
            if at in causes:
                by_node[self._layout.places[at].node, causes[at]].append(at)
        findings: list[Finding] = []
        for (_, why), members in by_node.items():
            shifts = {at: inquiry.compute[at] for at in members}
            lost = {at: self._compute_lost("compute", at, shift) for at, shift in shifts.items()}
            tell = {
                at: partial(
                    evidence.device, cause=why, reading=readings[self._rank(at)], clock=self._clock(at, inquiry)
                )
                for at in members
            }
            findings.append(self._stand_together("compute", shifts, lost, tell))
        return findings

    def _slow_stages(
        self, inquiry: Inquiry, readings: Mapping[int, Reading], causes: Mapping[int, Cause]
    ) -> list[Finding]:
        findings: list[Finding] = []
        for stage, shift in inquiry.stages.items():
            members = self._layout.stages[stage].tolist()
            measured = [at for at in members if self._rank(at) in readings]
            slow = [at for at in measured if at in causes]
            if not measured or any(at in inquiry.compute for at in slow):
                continue
            began = self._watches["stages"].began(shift)
            if not slow and began < min(settings.WINDOWS[1], self._measures.stages.count):
                continue  # no device is slow, and the stage was not so before: it may pass
            seen = self._seen("stages", shift, slow or members, self._compute_lost("stages", members[0], shift))
            if slow:
                reading = readings[self._rank(slow[0])]
                finding = evidence.device(seen, causes[slow[0]], reading, self._clock(slow[0], inquiry))
            else:
                finding = evidence.stage(seen, self._layout.places[members[0]].pipeline)
            findings.append(self._stand(finding, "stages", [stage], shift))
        return findings

    def _late_hosts(
        self, inquiry: Inquiry, readings: Mapping[int, Reading], causes: Mapping[int, Cause]
    ) -> list[Finding]:
        by_node: dict[str, list[int]] = defaultdict(list)
        for at in inquiry.host:
            if at not in causes and self._rank(at) in readings:
                by_node[self._layout.places[at].node].append(at)
        findings: list[Finding] = []
        for members in by_node.values():
            shifts = {at: inquiry.host[at] for at in members}
            lost = {at: shift.excess * self._measures.own(shift.window) for at, shift in shifts.items()}
            tell = {at: partial(evidence.host, reading=readings[self._rank(at)]) for at in members}
            findings.append(self._stand_together("host", shifts, lost, tell))
        return findings

    def _stand_together(
        self,
        part: str,
        shifts: Mapping[int, Shift],
        lost: Mapping[int, float],
        tell: Mapping[int, Callable[[evidence.Seen], Finding]],
    ) -> Finding:
        """One finding for ranks of a node, which says of all what was seen of the slowest.

        Args:
            part: The history that shows it.
            shifts: By index of the rank.
            lost: Seconds of a step.
            tell: The sentence.
        """
        seen = {at: self._seen(part, shift, [at], lost[at]) for at, shift in shifts.items()}

        def slowest(units: Iterable[int]) -> int:
            return max(units, key=lambda at: shifts[at].excess)

        def of(units: frozenset[int]) -> Finding:
            worst = slowest(units)
            return tell[worst](replace(seen[worst], ranks=tuple(sorted(self._rank(at) for at in units))))

        units = frozenset(shifts)
        standing = Standing(of(units), part, units, shifts[slowest(units)].window, self._now, of)
        return self._register.add(standing)

    def _seen(self, part: str, shift: Shift, members: list[int], seconds: float) -> evidence.Seen:
        return evidence.Seen(
            tuple(sorted(self._rank(at) for at in members)),
            self._measures.number(self._watches[part].began(shift)),
            self._watches[part].size(shift),
            self._measures.lost(seconds, settings.WINDOWS[0]),
            self._layout.places[members[0]].node,
        )

    def _compute_lost(self, part: str, at: int, shift: Shift) -> float:
        """Seconds of a step."""
        excess = self._watches[part].size(shift)
        return self._measures.level("compute", at, min(shift.window, settings.WINDOWS[0])) * (1 - math.exp(-excess))

    def _stand(self, finding: Finding, part: str, units: Iterable[int], shift: Shift) -> Finding:
        return self._register.add(Standing(finding, part, frozenset(units), shift.window, self._now))

    def _rank(self, at: int) -> int:
        return self._layout.places[at].rank

    def _clock(self, at: int, inquiry: Inquiry) -> Clock | None:
        """How much lower the rank's clock is than the references', or than it was; None where it is not known."""
        clocks = self._measures.raw("clock")
        others = [self._layout.index[rank] for rank in inquiry.references]
        lower: list[float] = []
        for last in (_NOW, settings.WINDOWS[0]):
            mine, theirs = median(clocks[-last:, at]), median(clocks[-last:, others].ravel())
            usual = theirs or float(np.nanmax(clocks[:, at], initial=0.0))
            if not mine or not usual:
                return None
            lower.append(math.log(usual / mine))
        return Clock(*lower)


def _spaced(members: list[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly chosen."""
    if len(members) <= count:
        return members
    return [members[int(at)] for at in np.linspace(0, len(members) - 1, count)]
