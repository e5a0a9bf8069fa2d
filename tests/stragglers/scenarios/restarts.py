"""Kinds: the job starts a new generation on the way, on the same devices or on others."""

from __future__ import annotations

from dataclasses import replace

from lockstep_trainer.stragglers.work import Cause
from stragglers.scenarios.drafts import DEVICES, Draft, Unsuited, acceptable, expect
from stragglers.scenarios.faults import Course, Fault
from stragglers.scenarios.layout import Layout
from stragglers.scenarios.scenario import Generation, Scenario


def same(draft: Draft) -> Scenario:
    """Slow before and after, at the same rank; the restart may come before there could be a verdict."""
    draft.draw_job(most=128)
    before, begins = draft.whole(90, 150), draft.whole(50, 88)
    return _slow(draft, begins, _again(draft, before, tuple(range(draft.layout.size))), [(begins, None)])


def moved(draft: Draft) -> Scenario:
    """The nodes get other ranks, and the slow device with them."""
    _draw_nodes(draft)
    before, begins = draft.whole(150, 200), draft.whole(50, 80)
    turned = tuple((unit + draft.per_node) % draft.layout.size for unit in range(draft.layout.size))
    return _slow(draft, begins, _again(draft, before, turned), [(begins, before), (before, None)])


def swapped(draft: Draft) -> Scenario:
    """A spare node takes the slow one's place, and all is well."""
    _draw_nodes(draft)
    before, begins = draft.whole(150, 200), draft.whole(50, 80)
    rank, size, per_node = draft.rank(), draft.layout.size, draft.per_node
    spare = tuple(size + unit % per_node if unit // per_node == rank // per_node else unit for unit in range(size))
    return _slow(draft, begins, _again(draft, before, spare), [(begins, before)], rank)


def fewer(draft: Draft) -> Scenario:
    """A replica is lost, the others have more to do each; then one of them becomes slow."""
    _draw_fewer(draft)
    generations = _without_last(draft, draft.whole(60, 120), draft.whole(50, 80) + draft.after())
    before = generations[0].steps
    begins = before + draft.whole(40, 60)
    return _slow(draft, begins, generations, [(begins, None)])


def clean(draft: Draft) -> Scenario:
    """Nobody is slow, with fewer replicas or other nodes."""
    if draft.maybe(0.5):
        _draw_fewer(draft)
        generations = _without_last(draft, draft.whole(80, 150), 200)
    else:
        draft.draw_job(most=128)
        generations = _again(draft, draft.whole(80, 150), tuple(reversed(range(draft.layout.size))))
    return draft.scenario("a healthy job starts again", generations=generations)


def _slow(
    draft: Draft,
    begins: int,
    generations: tuple[Generation, ...],
    spans: list[tuple[int, int | None]],
    unit: int | None = None,
) -> Scenario:
    """One device is slow from ``begins`` on; a finding is due in each of ``spans``, the executed steps from and to, by
    the rank that the device then has."""
    cause, clocks = draft.one(*DEVICES, Cause.HOST), draft.one(1.0, 0.0)
    last = generations[-1]
    unit = draft.one(*set(generations[0].units) & set(last.units)) if unit is None else unit
    layout = last.layout if unit in last.units else draft.layout
    draft.job = replace(draft.job, layout=layout)
    rank = (last if unit in last.units else generations[0]).units.index(unit)
    fitted = draft.slow(cause, rank, draft.target(), Course(begins))
    fault = Fault(cause, fitted.size, fitted.course, units=(unit,))
    expected = []
    for first, end in spans:
        generation = generations[0] if first < generations[0].steps else last
        ranks = [generation.units.index(unit)]
        expected.append(expect(ranks, *acceptable(cause, clocks), begins=first, ends=end))
    return draft.scenario(
        f"device {unit} is slow, and the job starts again after {generations[0].steps} steps",
        generations=generations,
        faults=(fault,),
        expected=tuple(expected),
        clocks=clocks,
    )


def _draw_nodes(draft: Draft) -> None:
    """Two nodes or more, so that a node can be another."""
    draft.draw_job(least=4, most=128)
    if draft.layout.size < 2 * draft.per_node or draft.layout.size % draft.per_node:
        raise Unsuited


def _draw_fewer(draft: Draft) -> None:
    draft.draw_job(replicas=4, most=128)


def _again(draft: Draft, before: int, units: tuple[int, ...]) -> tuple[Generation, ...]:
    """The second generation repeats up to ten steps: those since the last checkpoint."""
    first = draft.generation(before)
    number = first.number + before - draft.whole(0, 10)
    return first, Generation(draft.layout, units, draft.after(), number)


def _without_last(draft: Draft, before: int, steps: int) -> tuple[Generation, ...]:
    first = draft.generation(before)
    layout = draft.layout
    smaller = Layout(
        layout.data - 1, layout.pipeline, layout.tensor, layout.outermost, layout.micro_batches, layout.sharded
    )
    units = tuple(int(layout.ranks[where]) for where in smaller.coordinates)
    return first, Generation(smaller, units, steps, first.number + before - draft.whole(0, 10))
