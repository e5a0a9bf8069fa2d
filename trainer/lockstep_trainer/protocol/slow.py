"""The leader's search for slow ranks: their work goes to the detector, what it finds to status, journal and metrics.

Each worker measures its device by itself every few steps (``yardstick``), and its link to another rank (``pairmeter``).
So a probe is answered by the first measurements that are newer than the question: of devices by those of its ranks, of
links by those of all pairs, which are other ones than the question names, and more. What was found is kept with the
reports; measurements begin anew with each agent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lockstep_api.messages import RankWork, SlowVerdict, StepSummary
from lockstep_trainer.protocol.effects import Effect
from lockstep_trainer.protocol.standstill import Reason, Standstill

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader
    from lockstep_trainer.stragglers.detector import Detector, Said
    from lockstep_trainer.stragglers.work import Finding, Place, Probe

KEPT = 10
"""Verdicts that are remembered."""
WAITING = 64
"""Steps whose work waits at most for the step to be finished."""
_STANDSTILL = frozenset({"Host", "Pauses"})


@dataclass(frozen=True, slots=True)
class SlowRules:
    """``resilience.stragglers``, and what of ``parallelism`` says which ranks do the same work."""

    threshold: float = 0.1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1

    def place(self, rank: int, world_size: int, node: str) -> Place:
        """Where a rank is; ranks are numbered as ``parallel.layout.Layout`` has them."""
        from lockstep_trainer.stragglers.work import Place

        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, world_size // (self.tensor * self.context * self.pipeline))
        return Place(rank, node, data=data, pipeline=pipeline, tensor=tensor, context=context)


class SlowRanks:
    """The search in one epoch. ``rules`` None: there is none."""

    def __init__(self, rules: SlowRules | None) -> None:
        self._rules = rules
        self._detector: Detector | None = None
        self._work: dict[int, list[RankWork]] = defaultdict(list)
        self._measured: dict[int, RankWork] = {}
        """Rank → its newest measurement of its device."""
        self._linked: dict[tuple[int, int], tuple[int, float]] = {}
        """Pair → step of whose report its newest measurement is, and seconds."""
        self._probes: list[tuple[Probe, int]] = []
        """What is asked, and the step behind which."""
        self._standstill = Standstill()
        self._restarted = True

    def started(self) -> None:
        """A generation is started: steps may repeat, and its ranks may be elsewhere."""
        self._restarted = True
        self._work.clear()
        self._probes.clear()
        self._measured.clear()
        self._linked.clear()
        self._standstill.clear()

    def heard(self, work: Iterable[RankWork]) -> None:
        """What a node's workers did."""
        if self._rules is None:
            return
        for one in work:
            self._work[one.step].append(one)
        while len(self._work) > WAITING:
            del self._work[min(self._work)]

    def stepped(self, leader: Leader, finished: Iterable[StepSummary], now: float) -> list[Effect]:
        """Steps were finished by all members."""
        effects: list[Effect] = []
        for summary in finished:
            work = self._work.pop(summary.step, [])
            if work:
                effects += self._step(leader, summary, work, now)
        return effects

    def _step(self, leader: Leader, summary: StepSummary, work: list[RankWork], now: float) -> list[Effect]:
        from lockstep_trainer.stragglers.work import Work

        effects = self._begin(leader, now)
        assert self._detector is not None
        told = [
            Work(one.rank, one.compute, one.data, one.host, one.waited, one.tokens, one.squares, clock=one.clock)
            for one in work
        ]
        self._standstill.add(work)
        said = list(self._detector.step(summary.step, told, summary.seconds))
        self._measured.update({one.rank: one for one in work if one.product is not None and one.copy is not None})
        for one in work:
            if one.peer is not None and one.link is not None:
                self._linked[min(one.rank, one.peer), max(one.rank, one.peer)] = (one.step, one.link)
        said += self._answered(summary.step)
        return effects + self._take(leader, said, summary.step, now)

    def _begin(self, leader: Leader, now: float) -> list[Effect]:
        """A detector for the generation that runs. It takes numpy, which nothing else of an agent does: not before."""
        assert self._rules is not None
        if not self._restarted:
            return []
        self._restarted = False
        from lockstep_trainer.stragglers.detector import Detector
        from lockstep_trainer.stragglers.settings import Settings

        world = leader.plan.nodes * leader.plan.gpus_per_node
        nodes = _nodes(leader)
        places = [self._rules.place(rank, world, nodes[rank // leader.plan.gpus_per_node]) for rank in range(world)]
        if self._detector is not None:
            return self._take(leader, list(self._detector.restart(places)), 0, now)
        self._detector = Detector(places, Settings(self._rules.threshold))
        standing = [one for one in leader.reports.slow if one.ended is None]  # of an earlier agent
        return [effect for one in standing for effect in leader.reports.no_longer_slow(leader, one, now)]

    def _answered(self, now: int) -> list[Said]:
        """Probes of which all measurements are there, and what the detector says to them."""
        assert self._detector is not None
        from lockstep_trainer.stragglers.work import Probed

        said: list[Said] = []
        for asked in list(self._probes):
            probe, step = asked
            if probe.kind == "link":
                newer = {pair: (told, seconds) for pair, (told, seconds) in self._linked.items() if told > step}
                if newer and min(told for told, _ in newer.values()) < now:  # some GPUs tell it a step later
                    self._probes.remove(asked)
                    pairs = {pair: seconds for pair, (_, seconds) in newer.items()}
                    said += self._detector.probed(Probed("link", pairs=pairs))
                continue
            found = {rank: self._measured[rank] for rank in probe.ranks if rank in self._measured}
            if len(found) < len(probe.ranks) or any(one.step <= step for one in found.values()):
                continue
            self._probes.remove(asked)
            seconds = {rank: one.product if probe.kind == "compute" else one.copy for rank, one in found.items()}
            known = {rank: value for rank, value in seconds.items() if value is not None}
            said += self._detector.probed(Probed(probe.kind, known))
        return said

    def _take(self, leader: Leader, said: Iterable[Said], step: int, now: float) -> list[Effect]:
        from lockstep_trainer.stragglers.work import Ended, Finding

        effects: list[Effect] = []
        for one in said:
            match one:
                case Finding():
                    effects += leader.reports.slow_found(leader, self._verdict(leader, one, now), now)
                case Ended(finding=finding):
                    standing = self._verdict(leader, finding, now)
                    effects += leader.reports.no_longer_slow(leader, standing, now)
                case _:  # whoever asks again no longer waits for the answer to the question before
                    others = [asked for asked in self._probes if asked[0].kind != one.kind]
                    self._probes = [*others, (one, step)]
        patience = 2 * WAITING  # by then the detector has long dropped the question
        self._probes = [(probe, asked) for probe, asked in self._probes if step - asked < patience]
        return effects

    def _verdict(self, leader: Leader, finding: Finding, now: float) -> SlowVerdict:
        nodes = _nodes(leader)
        named = dict.fromkeys(nodes[rank // leader.plan.gpus_per_node] for rank in finding.ranks)
        cause = str(finding.cause)
        why = self._standstill.why(finding.ranks) if cause in _STANDSTILL else Reason()
        return SlowVerdict(
            cause=cause,
            ranks=finding.ranks,
            nodes=tuple(named) if finding.cause.blames_node and not why.follows else (),
            since=finding.since,
            slowdown=round(finding.slowdown, 3),
            cost=round(finding.cost, 4),
            evidence=" ".join(filter(None, (finding.evidence, why.sentence))),
            at=now,
        )


def remember(known: list[SlowVerdict], found: SlowVerdict) -> list[SlowVerdict]:
    """The newest verdicts, with this one. What is over goes first: of what stands something may have to be done."""
    kept = [*known, found]
    while len(kept) > KEPT:
        kept.remove(next((one for one in kept if one.ended is not None), kept[0]))
    return kept


def over(known: list[SlowVerdict], ended: SlowVerdict, now: float) -> list[SlowVerdict]:
    """The verdicts, of which this one is over."""
    return [replace(one, ended=now) if _stands(one, ended) else one for one in known]


def blamed(known: list[SlowVerdict], ended: SlowVerdict) -> tuple[str, ...]:
    """Nodes that the verdict named when it was said. By its end its ranks may be elsewhere, and what a host stood still
    for is over."""
    return next((one.nodes for one in known if _stands(one, ended)), ended.nodes)


def _stands(one: SlowVerdict, ended: SlowVerdict) -> bool:
    return one.ended is None and (one.cause, one.ranks) == (ended.cause, ended.ranks)


def _nodes(leader: Leader) -> dict[int, str]:
    """Slot → its node, or its pod where the node is not known."""
    return {info.slot: info.domain or info.pod for info in leader.membership.slots}
