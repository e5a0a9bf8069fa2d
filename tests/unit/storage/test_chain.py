"""The chain of checkpoints: what is on it, who may add to it, and what a reader does when a part is damaged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep_api.messages import Cut, RestorePoint, StateId, StoredFile, Term
from lockstep_trainer.checkpoint.chain import Chain, resolve
from lockstep_trainer.checkpoint.garbage import collect_garbage
from lockstep_trainer.checkpoint.manifest import FileEntry, Layout, Listing
from lockstep_trainer.checkpoint.retention import Keep
from lockstep_trainer.checkpoint.upload import listing_of
from lockstep_trainer.errors import CheckpointError, Corrupt, NotFenced, StoreError, Superseded, UserError
from lockstep_trainer.storage import ObjectStore, open_store
from samplerstates import sampler_state

ONE = Term(1, 1)


def listing(step: int, term: Term = ONE, parent: RestorePoint | None = None) -> Listing:
    return Listing(
        state=StateId(step, term.epoch, term.generation),
        parent=parent,
        files=(FileEntry(name=".metadata", size=1, crc64nvme="0" * 16),),
        layout=Layout(world_size=4, replicate=1),
        sampler=sampler_state(step),
        versions={"torch": "2"},
        verified=(),
        written_at=1.0,
        seconds=0.5,
    )


def chain_of(store: ObjectStore, steps: int) -> tuple[Chain, list[RestorePoint]]:
    """A chain with checkpoints at steps 10, 20 …, all of term 1/1."""
    chain = Chain(store, "ns/job/uid")
    chain.fence(ONE, "leader")
    points: list[RestorePoint] = []
    for number in range(1, steps + 1):
        chain.store.put(f"step-{number * 10}-e1-g1/.metadata", b"x")
        points.append(chain.commit(listing(number * 10, parent=points[-1] if points else None), ONE, "leader"))
    return chain, points


def test_a_folder_that_lacks_a_ranks_files_gets_no_listing() -> None:
    header = json.dumps(listing(10).model_dump(mode="json", exclude={"files", "parent"}))
    files = [StoredFile(f"ranges-r{rank}.json", 8, "0" * 16) for rank in range(4)]
    assert len(listing_of(header, None, files).files) == 4
    with pytest.raises(Corrupt, match="step-10-e1-g1 lacks the files of 2 ranks, the first is rank 1"):
        listing_of(header, None, [files[0], files[3]])


def test_a_manifest_names_costs_only_where_the_pipeline_was_split_by_them(store: ObjectStore) -> None:
    """A version that does not know the field takes a manifest that has it for damaged."""
    chain, points = chain_of(store, 1)
    assert "costs" not in json.loads(chain.store.get(points[0].manifest)[0])
    assert "costs" not in listing(10).model_dump(mode="json"), "what a snapshot's header has of it"
    measured = listing(20, parent=points[0]).model_copy(update={"costs": (1.0, 2.0)})
    point = chain.commit(measured, ONE, "leader")
    assert [chain.manifest(each).costs for each in (points[0], point)] == [None, (1.0, 2.0)]


def test_a_manifest_with_a_field_that_says_nothing_is_read(store: ObjectStore) -> None:
    """As some versions wrote it: its checksum is that of the bytes that are there."""
    chain, (point,) = chain_of(store, 1)
    data = json.dumps({**json.loads(chain.store.get(point.manifest)[0]), "costs": None}).encode()
    chain.store.put(point.manifest, data)
    found = chain.manifest(replace(point, sha256=hashlib.sha256(data).hexdigest()))
    assert found.state == point.state


def test_a_new_job_has_no_checkpoint_and_can_be_fenced(store: ObjectStore) -> None:
    chain = Chain(store)
    assert chain.newest() is None
    assert chain.fence(ONE, "a") is None
    assert chain.newest() is None


def test_commits_follow_each_other(store: ObjectStore) -> None:
    chain, points = chain_of(store, 3)
    assert chain.newest() == points[2]
    assert [point for point, _ in chain.lineage(chain.latest())] == points[::-1]
    assert chain.manifest(points[2]).parent == points[1]


def test_committing_again_changes_nothing(store: ObjectStore) -> None:
    """A leader whose answer was lost, or that was restarted, commits the same listing again."""
    chain, points = chain_of(store, 2)
    before = chain.latest()
    assert Chain(chain.store).commit(listing(20, parent=points[0]), ONE, "successor") == points[1]
    assert chain.latest() == before


def test_an_epoch_must_be_fenced_before_it_commits(store: ObjectStore) -> None:
    chain = Chain(store)
    with pytest.raises(NotFenced):
        chain.commit(listing(10), ONE, "a")
    chain.fence(ONE, "a")
    with pytest.raises(NotFenced):
        chain.commit(listing(10, Term(2, 1)), Term(2, 1), "a")


def test_a_fence_stops_the_older_term_for_good(store: ObjectStore) -> None:
    chain, points = chain_of(store, 1)
    assert Chain(chain.store).fence(Term(2, 1), "b") == points[0]
    with pytest.raises(Superseded):
        chain.commit(listing(20, parent=points[0]), ONE, "leader")
    with pytest.raises(Superseded):
        chain.fence(ONE, "leader")
    assert chain.newest() == points[0]


def test_a_later_generation_of_the_epoch_goes_on_without_another_fence(store: ObjectStore) -> None:
    chain, points = chain_of(store, 1)
    point = chain.commit(listing(20, Term(1, 2), points[0]), Term(1, 2), "leader")
    assert chain.newest() == point
    with pytest.raises(Superseded):  # a late message of the abandoned generation
        chain.commit(listing(20, ONE, points[0]), ONE, "leader")


def test_a_state_that_does_not_descend_from_the_chain_is_refused(store: ObjectStore) -> None:
    chain, points = chain_of(store, 1)
    stranger = RestorePoint(StateId(5, 1, 1), "step-5-e1-g1/manifest.json", "1" * 64)
    with pytest.raises(CheckpointError, match="not committed"):
        chain.commit(listing(20, parent=stranger), ONE, "leader")
    for parent in (None, stranger):
        with pytest.raises(CheckpointError, match="not committed"):
            chain.commit(listing(20, Term(1, 2), parent), Term(1, 2), "leader")
    with pytest.raises(CheckpointError, match="was written by a newer term"):
        chain.commit(listing(20, Term(1, 3), points[0]), Term(1, 2), "leader")


def test_an_upload_that_outlives_its_generation_is_committed_by_the_next_one(store: ObjectStore) -> None:
    chain, points = chain_of(store, 1)
    chain.fence(Term(2, 1), "b")
    late = chain.commit(listing(20, ONE, points[0]), Term(2, 1), "b")
    assert chain.newest() == late
    newest = chain.commit(listing(30, Term(2, 1), late), Term(2, 1), "b")
    for older in (listing(25, Term(2, 1), late), listing(40, ONE, late), listing(15, ONE, points[0])):
        with pytest.raises(CheckpointError, match="which is durable"):
            chain.commit(older, Term(2, 1), "b")
    assert chain.newest() == newest


def test_a_state_saved_before_its_predecessor_was_committed_takes_its_place(store: ObjectStore) -> None:
    """The worker looked for a parent too early: its samples begin at an older state, so the chain does too."""
    chain, points = chain_of(store, 2)
    late = chain.commit(listing(30, parent=points[0]), ONE, "leader")
    assert [point for point, _ in chain.lineage(chain.latest())] == [late, points[0]]
    later = chain.commit(listing(40, parent=None), ONE, "leader")
    assert [point for point, _ in chain.lineage(chain.latest())] == [later]


def test_a_state_that_was_restored_from_an_ancestor_leaves_the_damaged_one_behind(store: ObjectStore) -> None:
    chain, points = chain_of(store, 3)
    again = chain.commit(listing(30, Term(1, 2), points[1]), Term(1, 2), "leader")
    assert [point for point, _ in chain.lineage(chain.latest())] == [again, points[1], points[0]]


def damage(store: ObjectStore, key: str, how: str) -> None:
    data, _ = store.get(key)
    store.delete(key)
    if how == "truncated":
        store.put(key, data[: len(data) // 2])
    elif how == "bit flipped":
        store.put(key, bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "missing"])
def test_a_damaged_manifest_is_reported_and_its_parent_taken(store: ObjectStore, how: str) -> None:
    chain, points = chain_of(store, 3)
    for point in points[1:]:
        damage(chain.store, point.manifest, how)
    assert chain.newest() == points[0]
    assert len(chain.problems) == 2
    assert "step-30-e1-g1" in chain.problems[0]
    # The next epoch goes back to it, and goes on from there.
    assert chain.fence(Term(2, 1), "b") == points[0]
    assert chain.newest() == points[0]
    point = chain.commit(listing(20, Term(2, 1), points[0]), Term(2, 1), "b")
    assert [each for each, _ in chain.lineage(chain.latest())] == [point, points[0]]


def test_the_state_before_is_found_past_manifests_that_cannot_be_read(store: ObjectStore) -> None:
    """Data that is damaged below a manifest that is damaged too: whoever restores must get past both."""
    chain, points = chain_of(store, 4)
    damage(chain.store, points[2].manifest, "truncated")
    assert chain.older(points[3]) == points[2]
    assert chain.older(points[2]) == points[1]
    assert chain.older(points[0]) is None
    assert chain.older(RestorePoint(StateId(7, 1, 1), "step-7-e1-g1/manifest.json", "0" * 64)) is None


def test_where_nothing_is_whole_a_sentence_says_so(store: ObjectStore) -> None:
    chain, points = chain_of(store, 2)
    for point in points:
        damage(chain.store, point.manifest, "bit flipped")
    with pytest.raises(Corrupt, match=r"no checkpoint can be read .*resumeFrom"):
        chain.fence(Term(2, 1), "b")


def test_a_lineage_that_bites_its_tail_ends(store: ObjectStore) -> None:
    chain = Chain(store)
    chain.fence(ONE, "a")
    ghost = RestorePoint(StateId(10, 1, 1), "step-10-e1-g1/manifest.json", "2" * 64)
    chain.store.put(ghost.manifest, b"{}")
    latest = chain.latest()
    assert latest.pointer is not None
    looped = latest.pointer.model_copy(update={"point": ghost, "ancestors": (ghost, ghost)})
    chain.store.put("latest", looped.to_bytes(), if_match=latest.etag)
    assert len(list(chain.lineage(chain.latest()))) == 1


class _Moody:
    """A store whose puts to ``latest`` lose their answer, after they took effect or before."""

    def __init__(self, store: ObjectStore, fates: list[str]) -> None:
        self._store, self._fates = store, fates

    def put(self, key: str, data: bytes, *, only_if_absent: bool = False, if_match: str | None = None) -> str:
        fate = self._fates.pop(0) if key == "latest" and self._fates else "fine"
        if fate != "before":
            etag = self._store.put(key, data, only_if_absent=only_if_absent, if_match=if_match)
        if fate != "fine":
            raise StoreError("no answer", temporary=True)
        return etag

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


@pytest.mark.parametrize("fates", [["after"], ["before"], ["before", "after"], ["before", "before", "after"]])
def test_lost_answers_do_not_confuse_a_commit(store: ObjectStore, fates: list[str]) -> None:
    chain, points = chain_of(store, 1)
    sequence = chain.latest().pointer
    waits: list[float] = []
    moody = Chain(_Moody(chain.store, list(fates)), sleep=waits.append)  # type: ignore[arg-type]
    point = moody.commit(listing(20, parent=points[0]), ONE, "leader")
    pointer = chain.latest().pointer
    assert pointer is not None
    assert sequence is not None
    assert pointer.point == point
    assert pointer.sequence == sequence.sequence + 1
    assert len(waits) == fates.count("before")


def test_an_outage_is_temporary_and_the_commit_can_be_repeated(store: ObjectStore) -> None:
    chain, points = chain_of(store, 1)
    moody = Chain(_Moody(chain.store, ["before"] * 50), sleep=lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="can't be swapped") as caught:
        moody.commit(listing(20, parent=points[0]), ONE, "leader")
    assert caught.value.temporary
    assert chain.newest() == points[0]
    assert chain.commit(listing(20, parent=points[0]), ONE, "leader").state.step == 20


def test_a_job_resumes_from_a_manifest_of_another(tmp_path: Path) -> None:
    first, points = chain_of(open_store(f"file://{tmp_path}/first"), 2)
    uri = f"{first.store.uri}/{points[1].manifest}"
    origin = resolve(uri)
    assert origin.state == points[1].state
    second = Chain(open_store(f"file://{tmp_path}/second"), resume_from=uri)
    assert second.fence(ONE, "a") == origin
    own = second.commit(listing(30, parent=origin), ONE, "a")
    assert [point for point, _ in second.lineage(second.latest())] == [own, origin]
    assert [point for point, _ in second.lineage(second.latest(), foreign=False)] == [own]
    collect_garbage(second, Keep(last=1), now=1e12)
    assert first.newest() == points[1]
    with pytest.raises(UserError, match="is no manifest"):
        resolve(f"file://{tmp_path}/first")


def test_a_job_with_checkpoints_of_its_own_needs_no_longer_what_it_began_from(tmp_path: Path) -> None:
    first, points = chain_of(open_store(f"file://{tmp_path}/first"), 1)
    uri = f"{first.store.uri}/{points[0].manifest}"

    def agent(job: str) -> Chain:
        return Chain(open_store(f"file://{tmp_path}/{job}"), resume_from=uri)

    second = agent("second")
    own = second.commit(listing(30, parent=second.fence(ONE, "a")), ONE, "a")
    first.store.delete(points[0].manifest)
    assert agent("second").fence(Term(2, 0), "b") == own
    with pytest.raises(UserError, match=rf"^checkpoint\.resumeFrom: {uri} does not exist"):
        agent("third").fence(ONE, "a")


def test_a_manifest_that_can_not_be_resumed_from_is_the_fields_mistake(tmp_path: Path) -> None:
    other, points = chain_of(open_store(f"file://{tmp_path}/other"), 2)
    uri = f"{other.store.uri}/{points[1].manifest}"
    other.store.put(points[1].manifest, b"<html>not found</html>")
    with pytest.raises(
        UserError, match=rf"^checkpoint\.resumeFrom: {uri} can't be read .* verify --all {other.store.uri}` "
    ):
        resolve(uri)
    other.store.delete(points[1].manifest)
    with pytest.raises(UserError, match=rf"^checkpoint\.resumeFrom: {uri} does not exist; .* ls {other.store.uri}` "):
        resolve(uri)


def test_a_cut_moves_latest_behind_what_it_excludes(store: ObjectStore) -> None:
    chain, points = chain_of(store, 3)
    cut = Cut(ONE, 25, "wrong numbers")
    assert chain.fence(Term(1, 2), "a", cut) == points[1]
    assert chain.newest() == points[1]
    chain.store.put("step-30-e1-g3/.metadata", b"x")
    again = chain.commit(listing(30, Term(1, 3), points[1]), Term(1, 3), "a")
    assert [point for point, _ in chain.lineage(chain.latest())] == [again, points[1], points[0]]
    assert chain.fence(Term(1, 3), "a", cut) == again, "a later generation made it"


def test_a_cut_behind_all_states_goes_back_to_where_the_job_began(store: ObjectStore) -> None:
    chain, _ = chain_of(store, 2)
    assert chain.fence(Term(1, 2), "a", Cut(ONE, 5, "wrong numbers")) is None
    fresh = chain.commit(listing(10, Term(1, 2)), Term(1, 2), "a")
    assert chain.newest() == fresh


def test_what_came_behind_an_ancestor_leaves_the_chain(store: ObjectStore) -> None:
    """An epoch that began while the store was away goes back to what it descends from."""
    chain, points = chain_of(store, 3)
    assert chain.fence(Term(2, 0), "b", at=points[1]) == points[1]
    chain.store.put("step-30-e2-g1/.metadata", b"x")
    after = chain.commit(listing(30, Term(2, 1), points[1]), Term(2, 1), "b")
    assert [point for point, _ in chain.lineage(chain.latest())] == [after, points[1], points[0]]


def test_a_chain_that_does_not_lead_to_an_ancestor_stays_where_it_is(store: ObjectStore) -> None:
    chain, points = chain_of(store, 3)
    elsewhere = replace(points[1], sha256="another")
    assert chain.fence(Term(2, 0), "b", at=elsewhere) == points[2]
