"""The physics that the scenarios of slow ranks are made with."""

from __future__ import annotations

import numpy as np
import pytest

from stragglers.scenarios.layout import Layout
from stragglers.scenarios.physics import Floats, Transfers, Waits, order, waits

LAYOUTS = [
    Layout(4),
    Layout(4, sharded=True),
    Layout(2, tensor=4),
    Layout(2, pipeline=4, micro_batches=8),
    Layout(3, pipeline=2, tensor=2, outermost="pipeline", micro_batches=2),
]
TRANSFERS = Transfers(data=0.1, pipeline=0.02, tensor=0.05)


def run(layout: Layout, own: Floats, batch: Floats | None = None, link: Floats | None = None) -> Waits:
    """Steps with even micro-batches."""
    spread = np.full((layout.micro_batches, *own.shape), 1 / layout.micro_batches)
    nothing, healthy = np.zeros_like(own), np.ones_like(own)
    return waits(
        layout,
        own,
        nothing if batch is None else batch,
        healthy if link is None else link,
        transfers=TRANSFERS,
        spread=spread,
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_own_work_and_waiting_together_are_the_step_for_every_rank(layout: Layout) -> None:
    random = np.random.default_rng(3)
    own = random.lognormal(0, 0.2, (20, *layout.shape))
    batch = random.exponential(0.2, own.shape)
    link = 1 + random.exponential(0.5, own.shape)
    found = run(layout, own, batch, link)
    together = own + batch + sum(found.waited.values())
    np.testing.assert_allclose(together, np.broadcast_to(found.seconds[:, None, None, None], own.shape))
    assert all((each >= 0).all() for each in found.waited.values())
    assert set(found.waited) == {name for name in ("data", "pipeline", "tensor") if getattr(layout, name) > 1}


def test_the_slow_rank_of_a_data_group_waits_for_the_transfer_alone() -> None:
    own = np.ones((1, 4, 1, 1))
    own[0, 2] = 1.3
    found = run(Layout(4), own)
    assert found.seconds[0] == pytest.approx(1.4)
    np.testing.assert_allclose(found.waited["data"].reshape(-1), [0.4, 0.4, 0.1, 0.4])


def test_the_others_of_a_tensor_group_wait_within_the_step_and_other_replicas_at_its_end() -> None:
    own = np.ones((1, 2, 1, 2))
    own[0, 1, 0, 0] = 1.3
    found = run(Layout(2, tensor=2), own)
    np.testing.assert_allclose(found.waited["tensor"][0, :, 0], [[0.05, 0.05], [0.05, 0.35]])
    np.testing.assert_allclose(found.waited["data"][0, :, 0], [[0.4, 0.4], [0.1, 0.1]])


def test_a_slow_link_makes_the_transfers_of_its_groups_long_and_no_others() -> None:
    own = np.ones((1, 2, 1, 2))
    link = np.ones_like(own)
    link[0, 0, 0, 0] = 3
    found = run(Layout(2, tensor=2), own, link=link)
    least = found.waited["tensor"].min(axis=3).reshape(-1)
    assert least[0] == pytest.approx(0.15)
    assert found.waited["data"].min(axis=1)[0, 0, 0] == pytest.approx(0.3)
    assert found.waited["data"].min(axis=1)[0, 0, 1] == pytest.approx(0.1 + 0.0)


def test_a_pipeline_of_even_stages_has_the_bubble_of_its_schedule() -> None:
    stages, count = 4, 8
    layout = Layout(1, pipeline=stages, micro_batches=count)
    own = np.ones((1, *layout.shape))
    spread = np.full((count, *own.shape), 1 / count)
    found = waits(layout, own, np.zeros_like(own), np.ones_like(own), transfers=Transfers(0, 0, 0), spread=spread)
    assert found.seconds[0] == pytest.approx((count + stages - 1) / count)


def test_a_heavy_stage_makes_the_others_wait_for_their_neighbours() -> None:
    layout = Layout(2, pipeline=4, micro_batches=8)
    own = np.ones((1, *layout.shape))
    own[:, :, 3] = 1.4
    waited = run(layout, own).waited["pipeline"][0, 0, :, 0]
    assert waited[3] == pytest.approx(waited[:3].min() - 0.4, abs=0.01)


def test_a_late_batch_makes_the_whole_job_late() -> None:
    layout = Layout(2, pipeline=2, tensor=2)
    own, batch = np.ones((1, *layout.shape)), np.zeros((1, *layout.shape))
    batch[0, 1, 0, 1] = 5
    assert run(layout, own, batch).seconds[0] == pytest.approx(run(layout, own).seconds[0] + 5)


@pytest.mark.parametrize(("stages", "count"), [(2, 1), (4, 4), (8, 16)])
def test_every_micro_batch_passes_every_stage_once_each_way(stages: int, count: int) -> None:
    found = order(stages, count)
    assert len(found) == len(set(found)) == 2 * stages * count
    for stage, forward, number in found:
        source = stage - 1 if forward else stage + 1
        if 0 <= source < stages:
            assert found.index((source, forward, number)) < found.index((stage, forward, number))


def test_ranks_are_counted_with_the_outermost_coordinate_last() -> None:
    assert Layout(2, pipeline=2, tensor=2).coordinates[2] == (0, 1, 0)
    assert Layout(2, pipeline=2, tensor=2, outermost="pipeline").coordinates[2] == (1, 0, 0)
