"""The leader names slow ranks, by their work and by what their devices are measured by."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lockstep_api.messages import (
    Inventory,
    Join,
    Membership,
    Quiesced,
    RankWork,
    SlotInfo,
    SlowVerdict,
    Steps,
    StepSummary,
    Term,
)
from lockstep_trainer.measuring import pairmeter
from lockstep_trainer.measuring.yardstick import EVERY
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, Journal
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader, LeaderMemory
from lockstep_trainer.protocol.slow import KEPT, SlowRules, remember

JOB = "uid"


class Run:
    """Ranks, two on each of two nodes, that make steps of a second; ``slow`` is by how much rank 2 computes longer,
    ``device`` by how much its matrix product takes longer, ``link`` its exchanges with others, ``transfer`` what all
    ranks wait in collectives."""

    def __init__(
        self, rules: SlowRules | None, memory: LeaderMemory | None = None, *, nodes: int = 2, per_node: int = 2
    ) -> None:
        self.per_node, self.ranks = per_node, nodes * per_node
        infos = [SlotInfo(n, f"pod-{n}", f"uid-{n}", "boot", f"10.0.0.{n}:1", f"node-{n}") for n in range(nodes)]
        plan = JobPlan(JOB, nodes, per_node, steps=10_000, checkpoints=False, slow=rules)
        self.leader = Leader(plan, Membership(JOB, 1, tuple(infos)), memory, 0.0)
        self.random = random.Random(7)
        self.slow = self.device = self.link = self.transfer = 1.0
        self.stood: Callable[[int, int], tuple[float, float, float]] = lambda *_: (0.0, 0.0, 0.0)
        """Of rank and step: host, garbage, throttled."""
        self.low = False
        """Clocks are told, and a slow device is slow for its own."""
        self.lines: list[dict[str, Any]] = []
        self.now, self.step = 1.0, 0
        self.take(self.leader.begin(0.0))
        for slot, info in enumerate(infos):
            here = Inventory(JOB, info.pod, info.pod_uid, "boot", Term(1, 0), slot, slot, None, 0, None, 1, 1)
            self.tell(events.MemberConnected(slot, Join(JOB, 1, slot, here)))
            self.tell(events.MemberSaid(slot, Quiesced(JOB, self.leader.abandoned, slot)))
        self.tell(events.StoreReady("10.0.0.0", 1))
        assert self.leader.running is not None

    def tell(self, event: events.LeaderEvent) -> None:
        self.take(self.leader.handle(event, self.now))

    def take(self, effects: list[Effect]) -> None:
        self.lines += [each.line for each in effects if isinstance(each, Journal)]

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 1.0
            self.step += 1
            done = StepSummary(self.step, self.now, 1.0, 2.0, 4096, 1.0, 1e-3)
            for slot in range(self.ranks // self.per_node):
                ranks = range(slot * self.per_node, (slot + 1) * self.per_node)
                work = tuple(self.work(rank) for rank in ranks)
                self.tell(events.MemberSaid(slot, Steps(JOB, self.leader.term, slot, (done,), "forward", work)))

    def work(self, rank: int) -> RankWork:
        slow, device = (self.slow, self.device) if rank == 2 else (1.0, 1.0)
        compute = 0.5 * slow * self.random.gauss(1.0, 0.01)
        product = 1e-3 * device * self.random.gauss(1.0, 0.01) if self.step % EVERY == 0 else None
        copy = 1e-3 if product else None
        clock = 1980.0 / device if self.low else None
        told = RankWork(
            rank, self.step, compute, 0.001, 1024, 1024 * 64, product, copy, *self.stood(rank, self.step), clock=clock
        )
        waited = {"data": 0.05 * self.transfer * self.random.gauss(1.0, 0.01)}
        turn, between = divmod(self.step - 1, pairmeter.EVERY)
        peer = pairmeter.partners(self.ranks, turn).get(rank)
        if between or peer is None:
            return replace(told, waited=waited)
        link = 1e-3 * (self.link if 2 in (rank, peer) else 1.0) * self.random.gauss(1.0, 0.01)
        return replace(told, waited=waited, peer=peer, link=link)

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]


def test_a_slow_device_is_named_with_its_node_and_no_longer_once_it_is_well() -> None:
    run = Run(SlowRules())
    run.train(60)
    assert not run.said("straggler")
    run.slow = run.device = 1.5
    run.train(60)
    (line,) = run.said("straggler")
    assert (line["ranks"], line["nodes"], line["cause"]) == ((2,), ("node-1",), "Compute")
    assert line["slowdown"] == pytest.approx(0.5, abs=0.1)
    assert 50 <= line["since"] <= 75
    (verdict,) = run.leader.reports.slow
    assert (verdict.ranks, verdict.ended) == ((2,), None)
    run.slow = run.device = 1.0
    run.train(80)
    assert len(run.said("straggler_ended")) == 1
    (verdict,) = run.leader.reports.slow
    assert verdict.ended is not None


def test_a_device_that_is_slow_for_its_clock_is_told_apart_from_others() -> None:
    run = Run(SlowRules())
    run.low = True
    run.train(60)
    run.slow = run.device = 1.5
    run.train(60)
    (line,) = run.said("straggler")
    assert (line["ranks"], line["cause"]) == ((2,), "Clock")


def test_slow_work_on_a_device_as_fast_as_the_others_names_nobody() -> None:
    run = Run(SlowRules())
    run.train(60)
    run.slow = 1.5
    run.train(100)
    assert not run.said("straggler")


@pytest.mark.parametrize(
    ("garbage", "throttled", "nodes", "remedy"),
    [
        (0.0, 0.2, (), "raise resources.limits.cpu"),
        (0.0, 0.05, ("node-1",), "other processes of its node"),
        (0.0, 0.0, ("node-1",), "other processes of its node"),
        (0.1, 0.0, (), "gc.collect()"),
    ],
)
def test_a_late_host_blames_its_node_unless_what_holds_it_up_is_its_own(
    garbage: float, throttled: float, nodes: tuple[str, ...], remedy: str
) -> None:
    """On another node it would be as late: the operator would leave one after the other for it."""
    run = Run(SlowRules())
    run.train(60)
    run.stood = lambda rank, _: (0.15, garbage, throttled) if rank == 2 else (0.0, 0.0, 0.0)
    run.train(60)
    (line,) = run.said("straggler")
    assert (line["ranks"], line["cause"], line["nodes"]) == ((2,), "Host", nodes)
    assert remedy in line["evidence"]
    (verdict,) = run.leader.reports.slow
    assert verdict.nodes == nodes

    run.stood = lambda *_: (0.0, 0.0, 0.0)
    run.train(80)
    (ended,) = run.said("straggler_ended")
    assert tuple(ended["nodes"]) == nodes, "by then the host stands still for nothing"
    (verdict,) = run.leader.reports.slow
    assert verdict.ended is not None


def test_other_ranks_limits_acquit_no_node() -> None:
    """Those beside a late one may use up theirs and be in time."""
    run = Run(SlowRules())
    run.train(60)
    run.stood = lambda rank, _: (0.15, 0.0, 0.0) if rank == 2 else (0.0, 0.0, 0.5)
    run.train(60)
    (line,) = run.said("straggler")
    assert (line["ranks"], line["cause"], line["nodes"]) == ((2,), "Host", ("node-1",))


def test_a_device_that_is_slow_is_its_nodes_whatever_its_containers_limit_is() -> None:
    run = Run(SlowRules())
    run.train(60)
    run.slow = run.device = 1.5
    run.stood = lambda rank, _: (0.001, 0.0, 0.2) if rank == 2 else (0.0, 0.0, 0.0)
    run.train(60)
    (line,) = run.said("straggler")
    assert (line["cause"], line["nodes"]) == ("Compute", ("node-1",))


def test_pauses_now_of_one_rank_now_of_another_are_found_and_blame_no_node() -> None:
    run = Run(SlowRules())
    run.train(60)
    run.stood = lambda rank, step: (0.3, 0.3, 0.0) if step % 3 == 0 and step // 3 % 4 == rank else (0.0, 0.0, 0.0)
    run.train(120)
    lines = run.said("straggler")
    assert [(line["ranks"], line["nodes"], line["cause"]) for line in lines] == [((), (), "Pauses")]
    assert "garbage" in lines[0]["evidence"]


def test_a_rank_whose_link_is_slow_in_training_and_with_each_partner_is_named() -> None:
    run = Run(SlowRules(), nodes=4, per_node=1)
    run.train(60)
    assert not run.said("straggler")
    run.link = run.transfer = 2.0
    run.train(80)
    (line,) = run.said("straggler")
    assert (line["ranks"], line["nodes"], line["cause"]) == ((2,), ("node-2",), "Network")
    assert 55 <= line["since"] <= 65
    run.link = run.transfer = 1.0
    run.train(60)
    assert len(run.said("straggler_ended")) == 1


def test_a_link_that_is_slow_from_the_first_step_is_named_while_it_has_no_past_to_show_it() -> None:
    run = Run(SlowRules(), nodes=4, per_node=1)
    run.link = run.transfer = 2.0
    run.train(60)
    (line,) = run.said("straggler")
    assert (line["ranks"], line["cause"]) == ((2,), "Network")


def test_transfers_that_take_longer_than_usual_between_fast_links_accuse_nobody() -> None:
    run = Run(SlowRules(), nodes=4, per_node=1)
    run.train(60)
    run.transfer = 2.0
    run.train(100)
    assert not run.said("straggler")


def test_nothing_is_looked_for_where_the_job_does_not_want_it() -> None:
    run = Run(None)
    run.train(40)
    run.slow = run.device = 2.0
    run.train(80)
    assert not run.said("straggler")


def test_what_an_earlier_agent_found_is_over_with_the_first_step_that_a_new_one_sees() -> None:
    """It measures anew, and finds it again where it is still so."""
    run = Run(SlowRules())
    found = SlowVerdict("Compute", (2,), ("node-1",), 5, 0.5, 0.2, "", 3.0)
    run.leader.reports.slow = [found]
    run.train(1)
    assert [verdict.ended is not None for verdict in run.leader.reports.slow] == [True]


def test_what_comes_and_goes_pushes_nothing_out_that_stands() -> None:
    """Pauses that are found every half minute, and a node that is about to be left."""
    stands = SlowVerdict("Compute", (2,), ("node-1",), 5, 0.5, 0.2, "", 3.0)
    known = [stands]
    for number in range(KEPT + 3):
        known = remember(known, SlowVerdict("Pauses", (), (), number, 0.5, 0.2, "", 4.0 + number, ended=5.0 + number))
    assert stands in known
    assert len(known) == KEPT
    assert known[-1].since == KEPT + 2


def test_verdicts_are_remembered_up_to_a_number() -> None:
    known: list[SlowVerdict] = []
    for number in range(KEPT + 3):
        known = remember(known, SlowVerdict("Compute", (number,), (), number, 0.5, 0.2, "", 3.0))
    assert [verdict.since for verdict in known] == list(range(3, KEPT + 3))


@pytest.mark.parametrize(
    "layout",
    [Layout(shard=4), Layout(replicate=2, shard=2, tensor=2, pipeline=2), Layout(context=2, shard=3, tensor=2)],
)
def test_ranks_are_numbered_as_the_trainer_numbers_them(layout: Layout) -> None:
    rules = SlowRules(tensor=layout.tensor, context=layout.context, pipeline=layout.pipeline)
    for rank in range(layout.world_size):
        place, at = rules.place(rank, layout.world_size, "node"), layout.coordinates(rank)
        assert (place.pipeline, place.context, place.tensor) == (at.pipeline, at.context, at.tensor)
        assert place.data == layout.data_rank(rank)
