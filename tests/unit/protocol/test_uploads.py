"""Which kept state is brought to the store, and when."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lockstep_api.messages import RestorePoint, StateId, StoredFile, Term, Upload, Uploaded, UploadProblem
from lockstep_trainer.protocol.cadence import LONGEST_SECONDS, PRIOR_GPU_SECONDS, SHORTEST_SECONDS, cadence
from lockstep_trainer.protocol.effects import UploadState
from lockstep_trainer.protocol.events import UploadFailed
from lockstep_trainer.protocol.holdings import Holdings, HoldingsMemory
from lockstep_trainer.protocol.uploads import Uploads

TERM = Term(1, 1)


def state(step: int) -> StateId:
    return StateId(step, 1, 1)


def durable(step: int) -> RestorePoint:
    return RestorePoint(state(step), f"step-{step}", "sha")


def order(uploads: Uploads, step: int, now: float = 0.0) -> None:
    uploads.give(Upload("job", TERM, state(step), None), now)


def done(slot: int, step: int) -> Uploaded:
    header = '{"version": 2}' if slot == 0 else None
    return Uploaded("job", TERM, slot, state(step), (StoredFile(f"__{slot}_0.distcp", 8, "0" * 16),), header)


@pytest.mark.parametrize(
    ("step", "since", "due"),
    [(8, 0, False), (10, 0, True), (12, 10, False), (19, 10, False), (21, 10, True), (97, 95, False), (100, 95, True)],
)
def test_due_at_the_first_kept_state_beyond_a_multiple(step: int, since: int, due: bool) -> None:
    """Every 10 steps, and the last step (100) in any case."""
    uploads = Uploads(every=10, last=100)
    assert uploads.wants(state(step), durable(since) if since else None, 0.0, 0.0) is due


def test_what_is_under_way_is_finished_first() -> None:
    """Uploads that take longer than the interval still end; then the newest kept state is next."""
    uploads = Uploads(every=1, last=None)
    order(uploads, 10)
    assert not uploads.wants(state(20), durable(5), 0.0, 100.0)
    assert uploads.uploaded(done(1, 10), 2, 100.0) is None
    pending = uploads.uploaded(done(0, 10), 2, 100.0)
    assert pending is not None
    assert [file.name for file in pending.files] == ["__0_0.distcp", "__1_0.distcp"]
    assert pending.header == '{"version": 2}'
    assert uploads.uploaded(done(0, 10), 2, 101.0) is None, "said again"
    uploads.drop()
    assert uploads.wants(state(30), durable(10), 0.0, 101.0)


def test_what_a_slot_brought_to_an_order_of_fewer_nodes_completes_no_folder() -> None:
    """Two nodes have made the state, the first of three has both copies and is to bring them. What the others once
    brought of it, each its own, is no part of that."""
    uploads = Uploads(every=1, last=None)
    uploads.give(Upload("job", TERM, state(10), None), 0.0, {0: (0, 1)})
    assert uploads.uploaded(done(1, 10), 3, 1.0) is None
    assert uploads.uploaded(done(0, 10), 3, 2.0) is None
    uploads.failed(UploadProblem("job", TERM, 1, state(10), "not in memory", gone=True))
    assert uploads.problem is None, "nor is it a problem that another has its own no more"
    both = replace(done(0, 10), files=done(0, 10).files + done(1, 10).files, slots=(0, 1))
    pending = uploads.uploaded(both, 3, 3.0)
    assert pending is not None
    assert [file.name for file in pending.files] == ["__0_0.distcp", "__1_0.distcp"]


def test_a_state_that_is_gone_gives_way_to_a_newer_one() -> None:
    """A slot whose copy was lost can't finish; a store that does not answer is no reason to change the order."""
    uploads = Uploads(every=1, last=None)
    order(uploads, 10)
    uploads.failed(UploadProblem("job", TERM, 1, state(10), "503"))
    assert uploads.problem == "slot 1: 503"
    assert not uploads.wants(state(20), durable(5), 0.0, 1.0)
    uploads.failed(UploadProblem("job", TERM, 1, state(10), "not in memory", gone=True))
    assert not uploads.wants(state(10), durable(5), 0.0, 1.0)
    assert uploads.wants(state(20), durable(5), 0.0, 1.0)


def test_a_member_obeys_an_order_for_an_earlier_state_once_the_later_one_is_gone() -> None:
    """A leader that forms an epoch asks for the newest state that is in memory, and for the next when that is lost."""
    orders = {step: Upload("job", TERM, state(step), durable(1)) for step in (2, 4)}
    holdings = Holdings(HoldingsMemory())
    assert UploadState(TERM, state(4), durable(1)) in holdings.ordered(orders[4])
    assert holdings.ordered(orders[2]) == [], "said before the newer one, and heard late"
    holdings.failed(UploadFailed(state(4), "503"))
    assert holdings.ordered(orders[2]) == [], "it is still tried"
    holdings.failed(UploadFailed(state(4), "not in memory any more", gone=True))
    assert holdings.ordered(orders[4]) == [], "the leader has not heard of it yet"
    assert UploadState(TERM, state(2), durable(1)) in holdings.ordered(orders[2])
    assert holdings.says("job", TERM, 0, 1.0) == [], "no answer yet, and none to the order before"
    assert holdings.ordered(orders[2]) == []


def test_where_members_bring_the_copies_of_all_whatever_the_leader_says_last_counts() -> None:
    """Another's copy of the newer state may be damaged, and a leader whose agent died may share the work out anew."""
    holdings = Holdings(HoldingsMemory())
    for step, slots in ((4, (0,)), (2, (0,)), (2, (0, 1)), (4, (0,))):
        wanted = Upload("job", TERM, state(step), durable(1), slots)
        assert UploadState(TERM, state(step), durable(1), slots) in holdings.ordered(wanted)
        assert holdings.ordered(wanted) == [], "said again"


def test_a_last_checkpoint_takes_the_place_of_one_that_no_slot_has_finished() -> None:
    """It is wanted once: states after it wait for their turn."""
    uploads = Uploads(every=1000, last=None)
    order(uploads, 10)
    uploads.asked = 15
    assert not uploads.wants(state(15), durable(5), 0.0, 1.0)
    assert uploads.wants(state(17), durable(5), 0.0, 1.0)
    uploads.uploaded(done(0, 10), 2, 1.0)
    assert not uploads.wants(state(17), durable(5), 0.0, 1.0)
    uploads.drop()
    order(uploads, 17)
    assert not uploads.wants(state(19), durable(5), 0.0, 1.0)
    uploads.drop()
    assert not uploads.wants(state(21), durable(17), 0.0, 1.0)


def test_automatic_interval_is_young_and_dalys() -> None:
    """sqrt(2 x cost x MTBF), with the prior alone, and with faults that were seen."""
    found = cadence(blocked=0.5, upload=100.0, faults=0, observed=0.0, gpus=50_000)
    assert found.cost == pytest.approx(0.5 + 0.02 * 100)
    assert found.mtbf == pytest.approx(PRIOR_GPU_SECONDS / 50_000) == pytest.approx(3600)
    assert found.interval == pytest.approx(math.sqrt(2 * 2.5 * 3600))
    seen = cadence(blocked=0.5, upload=100.0, faults=9, observed=6400.0, gpus=50_000)
    assert seen.mtbf == pytest.approx(1000)
    assert seen.interval == pytest.approx(100.0), "never shorter than an upload takes"


def test_automatic_interval_stays_within_bounds() -> None:
    """Cheap checkpoints are not taken all the time, and one is due within the hour on the steadiest machine."""
    assert cadence(blocked=0.0, upload=0.0, faults=0, observed=0.0, gpus=8).interval == SHORTEST_SECONDS
    assert cadence(blocked=5.0, upload=60.0, faults=0, observed=0.0, gpus=1).interval == LONGEST_SECONDS


def test_automatic_interval_counts_from_the_last_order() -> None:
    """The first state is due at once: it shows what a checkpoint costs."""
    uploads = Uploads(every=None, last=None)
    assert uploads.wants(state(2), None, 60.0, 5.0)
    order(uploads, 2, now=5.0)
    uploads.drop()
    assert not uploads.wants(state(50), durable(2), 60.0, 64.0)
    assert uploads.wants(state(52), durable(2), 60.0, 65.0)
