"""Ranks whose link is slow: their groups' transfers take long, and pairs say whose link it is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from lockstep_trainer.stragglers import evidence, settings
from lockstep_trainer.stragglers.hardware import agrees_from
from lockstep_trainer.stragglers.measures import Measures
from lockstep_trainer.stragglers.pairs import LinkInquiry
from lockstep_trainer.stragglers.register import Register, Standing
from lockstep_trainer.stragglers.settings import Settings
from lockstep_trainer.stragglers.shifts import Shift, Watch
from lockstep_trainer.stragglers.transfers import Transfers
from lockstep_trainer.stragglers.work import Finding, Probe, Probed

_ENOUGH = 8
"""Ranks that are paired at least, if the job has them, so that slow pairs have fast ones beside them."""


class LinkSearch:
    """One inquiry at a time, for all groups that are suspected when it starts."""

    def __init__(self, measures: Measures, transfers: Transfers, register: Register, user: Settings) -> None:
        self._measures = measures
        self._transfers = transfers
        self._register = register
        self._user = user
        self._layout = measures.layout
        self._watch = Watch(transfers.history, transfers.alone, user.logarithm)
        self._inquiry: LinkInquiry | None = None
        self._slow_at_first: frozenset[int] = frozenset()

    def step(self) -> list[Probe]:
        """After a step: what is to be probed."""
        now = self._measures.steps
        if self._inquiry is not None:
            if now - self._inquiry.asked > settings.PATIENCE:
                self._register.rest("links", self._inquiry.groups, now)
                self._inquiry = None
            return []
        named = {rank for one in self._register.standing if one.part == "links" for rank in one.finding.ranks}
        found = self._watch.shifts(self._register.blocked("links", now))
        suspected = {one.unit: one for one in found if self._matters(one) and not named & set(self._ranks(one.unit))}
        # what is slow from the start has no past that shows it
        first = now == settings.LINK_LOOKS[0] or (now == settings.LINK_LOOKS[1] and bool(self._slow_at_first))
        if not (suspected or first) or len(self._layout.places) < 3:  # of two ranks none can be told to be the slow one
            return []
        ranks = self._paired(suspected) if suspected else tuple(self._nodes())
        self._inquiry = LinkInquiry(now, suspected, ranks, self._nodes())
        return [self._inquiry.ask(self._user.logarithm)]

    def probed(self, answer: Probed) -> list[Probe | Finding]:
        """An answer to a probe of links."""
        inquiry = self._inquiry
        if inquiry is None:
            return []
        inquiry.rounds.append(dict(answer.pairs))
        if not inquiry.done(max(self._user.logarithm, settings.LINK_FROM_START)):
            inquiry.asked = self._measures.steps
            return [inquiry.ask(self._user.logarithm)]
        self._inquiry = None
        return [*(self._verdicts(inquiry) if inquiry.groups else self._from_the_start(inquiry))]

    def over(self, standing: Standing) -> bool:
        """A finding of this search is over."""
        return self._watch.over(standing.units, standing.window)

    @property
    def frozen(self) -> frozenset[int]:
        """Groups whose transfers now are not to become the usual."""
        asked = frozenset(self._inquiry.groups) if self._inquiry is not None else frozenset()
        return self._register.units("links") | asked

    def _matters(self, shift: Shift) -> bool:
        return self._cost(shift) >= settings.LINK_COST * self._user.threshold

    def _cost(self, shift: Shift) -> float:
        return self._lost(shift, self._watch.size(shift))

    def _lost(self, shift: Shift, excess: float) -> float:
        seconds = self._transfers.seconds(shift.unit, shift.window) * (1 - math.exp(-excess))
        return self._measures.lost(seconds, shift.window)

    def _stand(self, finding: Finding, units: Iterable[int], window: int) -> Finding:
        return self._register.add(Standing(finding, "links", frozenset(units), window, self._measures.steps))

    def _ranks(self, group: int) -> list[int]:
        return [self._layout.places[at].rank for at in self._layout.groups[group].members]

    def _nodes(self) -> dict[int, str]:
        return {place.rank: place.node for place in self._layout.places}

    def _paired(self, suspected: dict[int, Shift]) -> tuple[int, ...]:
        ranks = {rank for group in suspected for rank in self._ranks(group)}
        nodes = self._nodes()
        theirs = {nodes[rank] for rank in ranks}
        within = len(theirs) == 1
        # others of the same node for a link within it, of other nodes for a link between them
        others = sorted(set(nodes) - ranks, key=lambda rank: ((nodes[rank] in theirs) != within, rank))
        return tuple(sorted(ranks | set(others[: max(0, _ENOUGH - len(ranks))])))

    def _from_the_start(self, inquiry: LinkInquiry) -> list[Finding]:
        slow = inquiry.slow(max(self._user.logarithm, settings.LINK_FROM_START))
        if inquiry.asked < settings.LINK_LOOKS[1]:  # it may pass
            self._slow_at_first = frozenset(slow)
            return []
        still = {rank: excess for rank, excess in slow.items() if rank in self._slow_at_first}
        findings: list[Finding] = []
        for node, ranks in _by_node(still, inquiry.nodes).items():
            groups = [at for at in range(len(self._layout.groups)) if set(ranks) & set(self._ranks(at))]
            excess = min(ranks.values())
            shifts = [Shift(group, excess, min(self._measures.steps, settings.WINDOWS[0])) for group in groups]
            costs = {shift.unit: self._lost(shift, excess) for shift in shifts}
            worst = max(shifts, key=lambda one: costs[one.unit])
            if costs[worst.unit] < settings.LINK_COST * self._user.threshold:
                continue
            self._transfers.correct([worst.unit], excess)
            seen = evidence.Seen(tuple(ranks), self._measures.numbers[0], excess, costs[worst.unit], node)
            findings.append(self._stand(evidence.network(seen, excess), [worst.unit], worst.window))
        return findings

    def _verdicts(self, inquiry: LinkInquiry) -> list[Finding]:
        worst = max(self._watch.size(shift) for shift in inquiry.groups.values())
        cut = max(settings.LINK_AGREES * self._user.logarithm, agrees_from(worst, self._user.logarithm))
        slow = inquiry.slow(cut)
        explained: set[int] = set()
        findings: list[Finding] = []
        for node, ranks in _by_node(slow, inquiry.nodes).items():
            units = [group for group in inquiry.groups if set(ranks) & set(self._ranks(group))]
            if not units:
                continue
            shift = max((inquiry.groups[group] for group in units), key=self._cost)
            since = self._measures.number(self._watch.began(shift))
            seen = evidence.Seen(tuple(ranks), since, self._watch.size(shift), self._cost(shift), node)
            findings.append(self._stand(evidence.network(seen, max(ranks.values())), units, shift.window))
            explained |= set(units)
        rest = [group for group in inquiry.groups if group not in explained]
        self._register.rest("links", rest, self._measures.steps)
        self._transfers.accept(rest)
        return findings


def _by_node(slow: Mapping[int, float], nodes: Mapping[int, str]) -> dict[str, dict[int, float]]:
    by_node: dict[str, dict[int, float]] = defaultdict(dict)
    for rank in sorted(slow):
        by_node[nodes[rank]][rank] = slow[rank]
    return by_node
