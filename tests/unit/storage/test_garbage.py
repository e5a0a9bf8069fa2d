"""Retention and garbage: what must stay stays, whatever is damaged, and what nobody needs goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep_api.messages import Cut, RestorePoint, StateId, Term
from lockstep_trainer.checkpoint import ancestors
from lockstep_trainer.checkpoint.chain import Chain
from lockstep_trainer.checkpoint.garbage import collect_garbage
from lockstep_trainer.checkpoint.manifest import FileEntry, Layout, Listing
from lockstep_trainer.checkpoint.retention import Folder, Keep, Member, Store, disposable, kept
from lockstep_trainer.errors import Conflict, StoreError, Superseded
from lockstep_trainer.storage import ObjectStore, open_store
from lockstep_trainer.storage.checksum import crc64nvme
from lockstep_trainer.storage.folder import FolderStore
from samplerstates import sampler_state

ONE = Term(1, 1)
NEVER = 1e12  # a time at which every grace period is over
DATA = b"weights"


def commit(chain: Chain, step: int, term: Term = ONE) -> RestorePoint:
    """The state behind ``step``, as a child of the newest one."""
    state = StateId(step, term.epoch, term.generation)
    listing = Listing(
        state=state,
        parent=chain.newest(),
        files=(FileEntry(name="__0_0.distcp", size=len(DATA), crc64nvme=crc64nvme(DATA)),),
        layout=Layout(world_size=1),
        sampler=sampler_state(step),
        versions={},
        verified=(),
        written_at=0.0,
        seconds=0.0,
    )
    chain.store.put(f"{listing.folder}/__0_0.distcp", DATA)
    return chain.commit(listing, term, "leader")


def chain_of(store: ObjectStore, *steps: int) -> Chain:
    chain = Chain(store, "ns/job/uid")
    chain.fence(ONE, "leader")
    for step in steps:
        commit(chain, step)
    return chain


def folders(chain: Chain) -> set[str]:
    return {entry.key.split("/")[0] for entry in chain.store.list("step-")}


def steps(chain: Chain) -> list[int]:
    """Of the states that a reader finds, newest first."""
    return [point.state.step for point, _ in chain.lineage(chain.latest())]


# --- decisions ------------------------------------------------------------------------------------------------------

members = st.lists(
    st.tuples(st.integers(1, 60), st.booleans(), st.booleans()), min_size=1, max_size=12, unique_by=lambda m: m[0]
).map(
    lambda rows: [
        Member(StateId(step, 1, 1), readable, readable and whole)
        for step, readable, whole in sorted(rows, reverse=True)
    ]
)
keeps = st.builds(Keep, last=st.integers(1, 5), every=st.none() | st.integers(1, 20))
others = st.lists(st.builds(StateId, st.integers(0, 70), st.integers(0, 2), st.integers(0, 2)), max_size=8, unique=True)


def gone_of(chain: Sequence[Member], off: Sequence[StateId], keep: Keep, fence: Term) -> set[StateId]:
    everything = {*(member.state for member in chain), *off}
    listed = [Folder(str(state), state, 0.0) for state in everything]
    return {folder.state for folder in disposable(listed, Store(chain, fence, NEVER), keep)}


@given(members, others, keeps)
def test_the_newest_whole_ones_never_go(chain: list[Member], off: list[StateId], keep: Keep) -> None:
    gone = gone_of(chain, off, keep, Term(2, 0))
    whole = [member.state for member in chain if member.whole]
    assert not gone & set(whole[: keep.last])
    if len(whole) < keep.last:
        assert not gone & {member.state for member in chain}
    elif all(member.whole for member in chain) and keep.every is None:
        assert {member.state for member in chain[keep.last :]} <= gone


@given(members, others, keeps, st.builds(Term, st.integers(0, 2), st.integers(0, 2)))
def test_what_may_still_come_onto_the_chain_stays(
    chain: list[Member], off: list[StateId], keep: Keep, fence: Term
) -> None:
    on_chain = {member.state for member in chain}
    for state in gone_of(chain, off, keep, fence) - on_chain:
        assert Term(state.epoch, state.generation) < fence
        newest = chain[0].state
        assert (state.epoch, state.generation, state.step) < (newest.epoch, newest.generation, newest.step)
        assert all(member.readable for member in chain)


@given(members, st.integers(1, 3), st.integers(1, 20))
def test_each_multiple_keeps_one_for_good(chain: list[Member], last: int, every: int) -> None:
    """Whatever is removed on the way, the states that stay are those that the whole history would have kept."""
    keep = Keep(last, every)
    history = [Member(member.state, True, True) for member in chain]
    seen: list[Member] = []
    for member in reversed(history):
        seen = [member, *seen]
        stay = kept(seen, keep)
        seen = [each for each in seen if each.state in stay]
    ascending = [member.state.step for member in reversed(history)]
    first = {step // every: step for step in reversed(ascending) if step >= every}
    assert {member.state.step for member in seen} == set(first.values()) | set(ascending[-last:])


def test_the_newest_verified_state_stays_beside_the_window() -> None:
    chain = [Member(StateId(step, 1, 1), True, step != 20) for step in (50, 40, 30, 20, 10)]
    assert {state.step for state in kept(chain, Keep(last=2))} == {50, 40}
    assert {state.step for state in kept(chain, Keep(last=2, verified=45))} == {50, 40}
    assert {state.step for state in kept(chain, Keep(last=2, verified=25))} == {50, 40, 10}, "20 is not whole"
    assert {state.step for state in kept(chain, Keep(last=2, verified=5))} == {50, 40}


def test_a_rollback_finds_the_verified_state_behind_the_gap(store: ObjectStore) -> None:
    chain = chain_of(store, 10, 20, 30, 40, 50)
    collect_garbage(chain, Keep(last=2, verified=25), now=NEVER)
    assert steps(chain) == [50, 40, 20]
    target = chain.fence(Term(1, 2), "leader", Cut(ONE, 25, "wrong numbers"))
    assert target is not None
    assert target.state.step == 20


# --- the store ------------------------------------------------------------------------------------------------------


def test_the_newest_stay_and_what_is_over_goes(store: ObjectStore) -> None:
    chain = chain_of(store, 10, 20, 30, 40)
    chain.fence(Term(1, 2), "leader")
    for name in ("step-7-e0-g9", "step-90-e0-g9", "step-35-e1-g1"):
        chain.store.put(f"{name}/.metadata", b"no commit takes it any more")
    chain.store.put("step-50-e1-g1/.metadata", b"an upload that has outlived its term: this one may commit it")
    chain.store.put("step-35-e1-g2/.metadata", b"of the fence's own term")
    later = max(entry.modified for entry in chain.store.list()) + 1000
    removed = collect_garbage(chain, Keep(last=2), now=later)
    assert removed.folders == ("step-7-e0-g9", "step-10-e1-g1", "step-20-e1-g1", "step-35-e1-g1", "step-90-e0-g9")
    assert steps(chain) == [40, 30]
    assert folders(chain) == {"step-30-e1-g1", "step-35-e1-g2", "step-40-e1-g1", "step-50-e1-g1"}


def test_uploads_that_nobody_finishes_are_given_up(tmp_path: Path) -> None:
    chain = chain_of(open_store(f"file://{tmp_path}"), 10, 20)
    chain.fence(Term(1, 2), "leader")
    root = tmp_path / "ns/job/uid"
    left = {
        "step-5-e0-g1": True,
        "step-10-e1-g1": True,
        "step-30-e1-g1": False,
        "step-15-e1-g2": False,
        "journal": True,
    }
    for name in left:
        (root / name).mkdir(exist_ok=True)
        (root / name / ".put-0123").write_bytes(b"part")
    assert collect_garbage(chain, Keep()).uploads == 0  # all of them are younger than the grace period
    assert collect_garbage(chain, Keep(), now=NEVER).uploads == 3
    assert {name: not (root / name / ".put-0123").exists() for name in left} == left


def test_what_was_touched_lately_stays(store: ObjectStore) -> None:
    chain = chain_of(store, 10)
    chain.store.put("step-7-e0-g9/.metadata", b"perhaps somebody is at work on it")
    assert collect_garbage(chain, Keep()).folders == ()


@pytest.mark.parametrize("harm", ["manifest flipped", "manifest gone", "file gone", "file shorter"])
def test_only_whole_checkpoints_count(store: ObjectStore, harm: str) -> None:
    """With keep 1 and a damaged newest one, its parent is the last whole one: it stays."""
    chain = chain_of(store, 10, 20, 30)
    key = f"step-30-e1-g1/{'manifest.json' if 'manifest' in harm else '__0_0.distcp'}"
    data = chain.store.get(key)[0]
    chain.store.delete(key)
    if harm == "manifest flipped":
        chain.store.put(key, data[:-3] + b"]" + data[-2:])
    elif harm == "file shorter":
        chain.store.put(key, data[:-1])
    assert collect_garbage(chain, Keep(last=1), now=NEVER).folders == ("step-10-e1-g1",)
    assert "step-20-e1-g1" in folders(chain)
    assert 20 in steps(chain)


def test_the_chain_leads_to_what_is_kept_for_good(store: ObjectStore) -> None:
    chain = chain_of(store)
    for step in range(10, 130, 10):
        commit(chain, step)
        collect_garbage(chain, Keep(last=2, every=40), now=NEVER)
    assert steps(chain) == [120, 110, 80, 40]
    assert {state.step for state in ancestors.marked(chain.store)} == {40, 80}
    for step in (110, 120):  # both newest are lost: the job goes on from the one that was kept
        chain.store.delete(f"step-{step}-e1-g1/manifest.json")
    point = chain.fence(Term(2, 1), "b")
    assert point
    assert point.state.step == 80
    commit(chain, 90, Term(2, 1))
    assert steps(chain) == [90, 80, 40]


def test_a_rollback_leaves_kept_ones_behind(store: ObjectStore) -> None:
    """Steps 80 and 120 were kept for good; then the job went back to 40. They are not on the chain any more."""
    chain = chain_of(store)
    for step in range(10, 130, 10):
        commit(chain, step)
        collect_garbage(chain, Keep(last=2, every=40), now=NEVER)
    for step in (80, 110, 120):
        chain.store.delete(f"step-{step}-e1-g1/manifest.json")
    two = Term(2, 1)
    chain.fence(two, "b")
    for step in range(50, 140, 10):
        commit(chain, step, two)
    collect_garbage(chain, Keep(last=2, every=40), term=two, now=NEVER)
    assert steps(chain) == [130, 120, 80, 40]
    assert folders(chain) == {"step-130-e2-g1", "step-120-e2-g1", "step-80-e2-g1", "step-40-e1-g1"}
    assert {(state.step, state.epoch) for state in ancestors.marked(chain.store)} == {(80, 2), (40, 1)}


class _Failing:
    """A store that fails at the given write or removal, once."""

    def __init__(self, store: ObjectStore, at: int) -> None:
        self._store, self._left = store, at

    def put(self, key: str, data: bytes, **how: object) -> str:
        self._count()
        return self._store.put(key, data, **how)  # type: ignore[arg-type]

    def delete(self, key: str) -> None:
        self._count()
        self._store.delete(key)

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise StoreError("no answer", temporary=True)

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def test_a_removal_that_is_cut_off_is_finished_by_the_next(tmp_path: Path) -> None:
    """Wherever it ends, the chain leads to all that is kept."""
    for at in range(1, 30):
        chain = chain_of(open_store(f"file://{tmp_path}/{at}"), *range(10, 90, 10))
        failing = Chain(_Failing(chain.store, at))  # type: ignore[arg-type]
        try:
            collect_garbage(failing, Keep(last=1, every=30), now=NEVER)
        except StoreError:
            assert {80, 60, 30} <= set(steps(chain)), at
            collect_garbage(chain, Keep(last=1, every=30), now=NEVER)
            assert steps(chain) == [80, 60, 30], at
            assert {"step-80-e1-g1", "step-60-e1-g1", "step-30-e1-g1"} <= folders(chain), at
            assert len(folders(chain)) <= 4, at
            chain.fence(Term(1, 2), "leader")  # what was half removed is dead now
            collect_garbage(chain, Keep(last=1, every=30), now=NEVER)
            assert len(folders(chain)) == 3, at
        else:
            assert at == 13  # two marks, and two files in each of five folders: each was cut off once
            return
    pytest.fail("it never came to its end")


def test_an_older_leader_removes_nothing(store: ObjectStore) -> None:
    chain = chain_of(store, 10, 20)
    Chain(chain.store).fence(Term(2, 1), "b")
    with pytest.raises(Superseded):
        collect_garbage(chain, Keep(last=1), term=ONE, now=NEVER)
    assert steps(chain) == [20, 10]


def test_a_job_without_a_checkpoint_has_no_garbage(store: ObjectStore) -> None:
    chain = Chain(store)
    chain.store.put("step-7-e0-g9/.metadata", b"nobody knows")
    assert collect_garbage(chain, Keep(), now=NEVER).folders == ()
    chain.fence(ONE, "a")
    assert collect_garbage(chain, Keep(), now=NEVER).folders == ()


def pointers(tmp_path: Path) -> list[int]:
    """The versions of ``latest`` in the folder."""
    return sorted(int(path.name.rpartition(".")[2]) for path in (tmp_path / "ns/job/uid").glob("latest.*"))


def test_what_latest_was_goes_once_it_is_old(tmp_path: Path) -> None:
    """In a folder each swap leaves a file; S3 keeps none."""
    chain = chain_of(open_store(f"file://{tmp_path}"), 10, 20, 30, 40)
    day = 24 * 3600
    now = max(entry.modified for entry in chain.store.list())
    for number, age in ((1, 3 * day), (2, 2 * day), (3, day + 10), (4, 10), (5, 5)):
        os.utime(tmp_path / f"ns/job/uid/latest.{number}", (now - age, now - age))
    assert collect_garbage(chain, Keep(), now=now).pointers == 2  # 3 was the newest until ten seconds ago
    assert pointers(tmp_path) == [3, 4, 5]
    assert collect_garbage(chain, Keep(), now=NEVER).pointers == 1
    assert pointers(tmp_path) == [4, 5]
    assert steps(chain) == [40, 30, 20]
    commit(chain, 50)
    assert steps(chain)[0] == 50
    assert pointers(tmp_path) == [4, 5, 6]


def test_a_writer_that_slept_meanwhile_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look and its link others go on and clear away: its number is free, and it must see that it is old."""
    store = open_store(f"file://{tmp_path}")
    chain = chain_of(store, 10)
    two = Term(2, 1)
    write = FolderStore._write

    def slow(self: FolderStore, path: Path, data: bytes, **how: Any) -> None:
        monkeypatch.setattr(FolderStore, "_write", write)
        assert path.name == "latest.3"
        chain.fence(two, "b")
        for step in (20, 30, 40):
            commit(chain, step, two)
        collect_garbage(chain, Keep(), now=NEVER)
        assert pointers(tmp_path) == [5, 6]
        write(self, path, data, **how)

    monkeypatch.setattr(FolderStore, "_write", slow)
    asleep = Chain(store, "ns/job/uid")
    with pytest.raises(Superseded):
        asleep.fence(ONE, "leader")
    assert pointers(tmp_path) == [3, 5, 6]
    assert steps(chain) == [40, 30, 20]
    assert collect_garbage(chain, Keep(), now=NEVER).pointers == 1  # what it left


def test_a_put_whose_number_was_free_for_that_reason_is_a_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    etag = store.put("latest", b"1", only_if_absent=True)
    write = FolderStore._write

    def slow(self: FolderStore, path: Path, data: bytes, **how: Any) -> None:
        monkeypatch.setattr(FolderStore, "_write", write)
        own = etag
        for number in (2, 3, 4):
            own = store.put("latest", str(number).encode(), if_match=own)
        assert store.forget("latest", NEVER) == 2
        write(self, path, data, **how)

    monkeypatch.setattr(FolderStore, "_write", slow)
    with pytest.raises(Conflict, match="version 4 is there already, besides 2"):
        store.put("latest", b"of the one that slept", if_match=etag)
    assert store.get("latest") == (b"4", "4")
