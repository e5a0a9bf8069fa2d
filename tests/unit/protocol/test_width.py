"""An epoch of fewer or more nodes than the last one: who is who, and what of the old width may still be used."""

from __future__ import annotations

from lockstep_api.messages import (
    Abandon,
    Copies,
    Inventory,
    Invite,
    Join,
    Membership,
    Origin,
    Quiesced,
    Rendezvous,
    RestorePoint,
    SlotInfo,
    Start,
    StateId,
    Stop,
    StoredFile,
    Term,
    ToMember,
    Upload,
    Uploaded,
    UploadProblem,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Commit, Effect, Kill, SendMember, SendOperator, UploadState
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.lineage import Elsewhere, Holding, newest_complete, newest_elsewhere
from lockstep_trainer.protocol.member import Identity, Member, MemberMemory

JOB = "job"
NEWER = StateId(30, 1, 1)


def info(slot: int) -> SlotInfo:
    return SlotInfo(slot, f"pod-{slot}", f"uid-{slot}", "boot", f"10.0.0.{slot}:1")


def start(nodes: int, epoch: int = 1, generation: int = 1, restore: RestorePoint | None = None) -> Start:
    term = Term(epoch, generation)
    return Start(JOB, term, nodes, 2, Rendezvous("10.0.0.0", 1, f"{epoch}/{generation}"), restore)


def member() -> Member:
    me = Identity(JOB, "pod-2", "uid-2", "boot")
    return Member(me, MemberMemory(), leaderless_seconds=60.0, now=0.0)


def invite(epoch: int, slot: int, *, spare: bool = False) -> events.Invited:
    return events.Invited(Invite(JOB, epoch, slot, "uid-2", "boot", "10.0.0.0:1", spare))


def test_a_leader_starts_as_many_nodes_as_its_epoch_has_slots() -> None:
    plan = JobPlan(JOB, 3, 1, steps=100, checkpoint_every=10, memory_buddy=False)
    leader = Leader(plan, Membership(JOB, 2, (info(0),), spares=(info(1),)), None, 0.0)
    leader.begin(0.0)
    here = Inventory(JOB, "pod-0", "uid-0", "boot", Term(2, 0), 2, 0, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join(JOB, 2, 0, here)), 0.0)
    leader.handle(events.RestoreChosen(leader.abandoned, None), 0.0)
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), 1.0)
    leader.handle(events.StoreReady("10.0.0.0", 1), 1.0)
    assert leader.running is not None
    assert leader.running.nodes == 1
    assert leader.plan.nodes == 1


def test_copies_of_another_number_of_nodes_are_not_started_from() -> None:
    """Two of three slots' copies look like all of two."""
    copies = (Copies(NEWER, 0, 0, nodes=3), Copies(NEWER, 1, 0, nodes=3))
    members = [info(0), info(1)]
    assert newest_complete(members, {0: Holding(None, copies), 1: Holding(None, ())}, None) is None
    same = (Copies(NEWER, 0, 0, nodes=2), Copies(NEWER, 1, 0, nodes=2))
    assert newest_complete(members, {0: Holding(None, same), 1: Holding(None, ())}, None) is not None


def test_a_member_that_becomes_a_spare_ends_its_workers() -> None:
    """Nobody else would: the new leader listens to spares only."""
    survivor = member()
    survivor.handle(invite(1, 2), 0.0)
    survivor.handle(events.StreamOpened(1), 0.0)
    survivor.handle(events.LeaderSaid(1, start(3)), 0.0)
    effects = survivor.handle(invite(2, -1, spare=True), 5.0)
    assert Kill(Term(1, 1)) in effects
    for rank in (4, 5):
        survivor.handle(events.WorkerEnded(Term(1, 1), rank, -9, 5.1), 5.1)
    assert survivor.workers.running is None


def test_a_new_agent_knows_the_ranks_that_run_although_its_slot_has_changed() -> None:
    survivor = member()
    survivor.handle(invite(1, 2), 0.0)
    survivor.handle(events.StreamOpened(1), 0.0)
    survivor.handle(events.LeaderSaid(1, start(3)), 0.0)
    survivor.handle(invite(2, 0), 5.0)
    assert survivor.slot == 0
    again = Member(survivor.me, survivor.memory(), leaderless_seconds=60.0, now=6.0)
    assert again.workers.live == {4, 5}


def test_what_another_slot_s_ranks_have_uploaded_is_uploaded_again() -> None:
    """The same state, by its name; a folder of it needs every slot's files."""
    survivor = member()
    survivor.handle(invite(1, 2), 0.0)
    survivor.handle(events.StreamOpened(1), 0.0)
    survivor.handle(events.LeaderSaid(1, start(3)), 0.0)
    order = Upload(JOB, Term(1, 1), NEWER, None)
    survivor.handle(events.LeaderSaid(1, order), 1.0)
    survivor.handle(events.StateUploaded(NEWER, (StoredFile("__4_0.distcp", 1, "00"),), None), 2.0)
    for rank in (4, 5):
        survivor.handle(events.WorkerEnded(Term(1, 1), rank, 1, 3.0), 3.0)
    survivor.handle(invite(3, 0), 5.0)
    survivor.handle(events.StreamOpened(3), 5.0)
    survivor.handle(events.LeaderSaid(3, Abandon(JOB, Term(3, 0), "forming")), 5.5)
    restore = RestorePoint(NEWER, "step-30", "sha")
    survivor.handle(events.LeaderSaid(3, start(3, epoch=3, restore=restore)), 6.0)
    effects = survivor.handle(events.LeaderSaid(3, Upload(JOB, Term(3, 1), NEWER, None)), 7.0)
    assert any(isinstance(effect, UploadState) for effect in effects)


def test_a_leader_that_is_told_to_stop_does_not_wait_for_members_that_nobody_replaces() -> None:
    plan = JobPlan(JOB, 2, 1, steps=100, checkpoint_every=10, memory_buddy=False)
    leader = Leader(plan, Membership(JOB, 1, (info(0), info(1))), None, 0.0)
    leader.begin(0.0)
    here = Inventory(JOB, "pod-0", "uid-0", "boot", Term(1, 0), 1, 0, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join(JOB, 1, 0, here)), 0.0)
    leader.handle(events.OperatorConnected(), 0.0)
    leader.handle(events.RestoreChosen(leader.abandoned, None), 0.0)
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0, Origin(Term(1, 0), 0))), 1.0)
    said: list[Effect] = []
    for second in range(2, 40):
        leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), float(second))
        said += leader.handle(events.Tick(), float(second))
    assert leader.finished is None
    said = leader.handle(events.OperatorSaid(Stop(JOB, 1, "no room", seconds=120.0)), 40.0)
    assert leader.finished is not None
    assert leader.finished.outcome == "stopped"
    assert any(isinstance(effect, SendOperator) and effect.message == leader.finished for effect in said)


def of_three(state: StateId, *slots: int) -> Holding:
    """Copies of three nodes' ranks."""
    return Holding(Origin(Term(1, 1), 0), tuple(Copies(state, slot, 0, nodes=3) for slot in slots))


def test_what_survivors_hold_of_all_old_slots_can_be_brought_to_the_store() -> None:
    older = StateId(20, 1, 1)
    members = [info(0), info(1)]
    both = {0: of_three(NEWER, 0, 2), 1: of_three(NEWER, 1, 0)}
    assert newest_elsewhere(members, both, None) == Elsewhere(NEWER, {0: (0, 2), 1: (1,)})
    assert newest_elsewhere(members, {0: of_three(NEWER, 0), 1: of_three(NEWER, 1)}, None) is None
    assert newest_elsewhere(members, both, RestorePoint(NEWER, "step-30", "sha")) is None
    assert newest_elsewhere(members, both, None, [NEWER]) is None
    assert newest_elsewhere([info(0)], {0: of_three(older, 0, 1, 2)}, None) == Elsewhere(older, {0: (0, 1, 2)})


def shrunk_leader(holdings: dict[int, Holding]) -> tuple[Leader, list[Effect]]:
    """A leader of two where three have trained, before its first generation."""
    plan = JobPlan(JOB, 3, 1, steps=100, checkpoint_every=10)
    leader = Leader(plan, Membership(JOB, 2, (info(0), info(1))), None, 0.0)
    effects = leader.begin(0.0)
    for slot, held in holdings.items():
        here = Inventory(JOB, f"pod-{slot}", f"uid-{slot}", "boot", Term(2, 0), None, slot, None, 0, None, 1, 1)
        leader.handle(events.MemberConnected(slot, Join(JOB, 2, slot, here)), 0.0)
        quiesced = Quiesced(JOB, leader.abandoned, slot, held.origin, held.copies)
        effects += leader.handle(events.MemberSaid(slot, quiesced), 1.0)
    effects += leader.handle(events.StoreReady("10.0.0.0", 1), 1.0)
    effects += leader.handle(events.RestoreChosen(leader.abandoned, None), 1.0)
    return leader, effects


def said(effects: list[Effect], kind: type[ToMember]) -> dict[int, ToMember]:
    """Connection, here the slot → message of that kind."""
    return {
        effect.connection: effect.message
        for effect in effects
        if isinstance(effect, SendMember) and isinstance(effect.message, kind)
    }


def test_fewer_nodes_begin_from_what_memory_alone_has_once_it_is_in_the_store() -> None:
    leader, effects = shrunk_leader({0: of_three(NEWER, 0, 2), 1: of_three(NEWER, 1, 0)})
    assert {slot: order.slots for slot, order in said(effects, Upload).items()} == {0: (0, 2), 1: (1,)}  # type: ignore[union-attr]
    assert leader.running is None

    files = {slot: StoredFile(f"__{slot}_0.distcp", 1, "00") for slot in range(3)}
    # What they had brought as members of the three, said again to the new leader, is not what it has asked for.
    for slot in (0, 1):
        before = Uploaded(JOB, leader.term, slot, NEWER, (files[slot],), "{}")
        effects = leader.handle(events.MemberSaid(slot, before), 1.5)
        assert not any(isinstance(effect, Commit) for effect in effects)
    for slots, own in (((1,), (files[1],)), ((0, 2), (files[0], files[2]))):
        header = '{"layout": {}}' if 0 in slots else None
        message = Uploaded(JOB, leader.term, slots[0], NEWER, own, header, slots)
        effects = leader.handle(events.MemberSaid(slots[0], message), 2.0)
    (commit,) = [effect for effect in effects if isinstance(effect, Commit)]
    assert sorted(file.name for file in commit.files) == sorted(file.name for file in files.values())
    assert commit.header == '{"layout": {}}'
    assert leader.running is None

    point = RestorePoint(NEWER, "step-30", "sha")
    effects = leader.handle(events.CommitDone(leader.term, point, "s3://x/step-30", 0.1, 3, ()), 3.0)
    assert leader.running is not None
    assert (leader.running.restore, leader.running.memory, leader.running.nodes) == (point, None, 2)


def test_a_copy_that_turns_out_damaged_is_not_waited_for() -> None:
    leader, _ = shrunk_leader({0: of_three(NEWER, 0, 2), 1: of_three(NEWER, 1, 0)})
    gone = UploadProblem(JOB, leader.term, 1, NEWER, "its bytes differ", gone=True)
    leader.handle(events.MemberSaid(1, gone), 2.0)
    assert leader.running is not None
    assert leader.running.restore is None
