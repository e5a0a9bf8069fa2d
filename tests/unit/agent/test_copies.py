"""Copies of snapshots between two agents, over real connections: whole and verified or not there at all, whether the
agents carry them themselves or their couriers do."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from lockstep_api.messages import Copies as Held
from lockstep_api.messages import MemoryPoint, Rendezvous, Start, StateId, Term
from lockstep_trainer.agent.copies import Copies
from lockstep_trainer.agent.copyroutes import CopyRoutes
from lockstep_trainer.agent.snapshots import Snapshots
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.checkpoint.plan import Item, Plan, PlannedFile
from lockstep_trainer.checkpoint.snapshots import Reading, Root, Snapshot, held, lock, rank_folder, ranks_in, reading
from lockstep_trainer.protocol.events import Event, SnapshotsHeld, StateCopied, StateStaged
from lockstep_trainer.storage.checksum import crc64nvme

SIZE = 300_000


@pytest.fixture(autouse=True, params=["agents", "couriers"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who carries it."""
    monkeypatch.setattr("lockstep_trainer.agent.copies.LARGE", SIZE + 1 if request.param == "agents" else SIZE)
    return str(request.param)


def state_id(step: int, generation: int = 1) -> StateId:
    return StateId(step, 1, generation)


def stage(root: Path, rank: int, step: int, *, number: int = 0, size: int = SIZE) -> bytes:
    """A snapshot as a worker leaves it; returns its bytes."""
    folder = rank_folder(root, rank)
    folder.mkdir(parents=True, exist_ok=True)
    items = (
        Item("model.a", 0, 0, 200_000, 64, 199_000, "uint8", (199_000,), (0,)),
        Item("model.b", None, 200_000, size - 200_000, 200_000, size - 200_000, "uint8", (size - 200_000,), (0,)),
    )
    plan = Plan(rank, 2, {}, (PlannedFile(f"__{rank}_0.distcp", 0, 200_000),), items, size, metadata=rank == 0)
    data = os.urandom(size)
    (folder / f"buffer-{number}").write_bytes(data)
    (folder / f"plan-{plan.key}.json").write_text(plan.text)
    if plan.metadata:
        (folder / f"metadata-{plan.key}").write_bytes(b"metadata")
    (folder / f"samples-{number}.jsonl").write_text(f'{{"step": {step}}}\n')
    checksums = tuple(crc64nvme(data[item.offset : item.offset + item.length]) for item in items)
    snapshot = Snapshot(
        state_id(step), plan.key, checksums, {}, Root(Term(1, 1), None), 0, f"samples-r{rank}.jsonl", 1.0, 0.1, 0.2
    )
    (folder / f"buffer-{number}.json").write_text(json.dumps(snapshot.to_json()))
    return data


class Pod:
    """One agent's snapshots and its port."""

    def __init__(self, run_dir: Path) -> None:
        self.told: list[Event] = []
        self.snapshots = Snapshots(run_dir, 2, self.told.append)
        run_dir.mkdir(exist_ok=True)
        (run_dir / "token").write_text("token")
        trust = Trust(run_dir, "uid", use_tls=False)
        self.copies = Copies(self.snapshots, 2, trust, self.told.append)
        self.routes = CopyRoutes(self.snapshots, 2, trust, "127.0.0.1")
        app = web.Application()
        app.add_routes(self.routes.routes())
        self.server = TestServer(app)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def tells(self, event: Event) -> None:
        async with asyncio.timeout(20):
            while event not in self.told:
                await asyncio.sleep(0.005)


def with_pods(tmp_path: Path, body: Callable[[Pod, Pod], Awaitable[None]]) -> None:
    async def run() -> None:
        one, two = Pod(tmp_path / "one"), Pod(tmp_path / "two")
        async with ClientSession() as session, one.server, two.server:
            one.copies.session = two.copies.session = session
            await body(one, two)
            for pod in (one, two):
                await pod.copies.close()
                await pod.routes.close()

    asyncio.run(run())


def states(root: Path, rank: int) -> set[int]:
    return {snapshot.state.step for snapshot in held(rank_folder(root, rank)).values()}


def test_a_copy_at_the_buddy_is_the_same_and_comes_back(tmp_path: Path) -> None:
    async def body(one: Pod, two: Pod) -> None:
        data = {rank: stage(one.snapshots.root, rank, 5) for rank in (0, 1)}
        one.copies.copy(state_id(5), two.address, None, 0)
        await one.tells(StateCopied(state_id(5)))
        await two.tells(SnapshotsHeld((Held(state_id(5), 0, 0),)))  # its agent may look after the other has heard
        for rank in (0, 1):
            with reading(rank_folder(two.snapshots.buddies, rank), state_id(5)) as copy:
                assert bytes(copy.data) == data[rank]
                assert copy.samples.read_text() == '{"step": 5}\n'
                assert not copy.plan.metadata or copy.metadata.read_bytes() == b"metadata"
        # The slot moves to a pod that has nothing, and fetches it from the buddy.
        three = Pod(tmp_path / "three")
        three.copies.session = one.copies.session
        start = Start(
            "uid", Term(1, 2), 2, 2, Rendezvous("h", 1, "1/2"), None,
            memory=MemoryPoint(state_id(5), (two.address, "")),
        )  # fmt: skip
        assert three.copies.fetch(start, 1) is None, "that slot has its own"
        fetching = three.copies.fetch(start, 0)
        assert fetching is not None
        await fetching
        for rank in (0, 1):
            with reading(rank_folder(three.snapshots.root, rank), state_id(5)) as copy:
                assert bytes(copy.data) == data[rank]
        await three.copies.close()

    with_pods(tmp_path, body)


def test_a_snapshot_that_its_writer_still_holds_is_copied_once_it_lets_go(tmp_path: Path) -> None:
    """The snapshot is seen before its lock is gone: given up here, nothing would ever be kept again."""

    async def body(one: Pod, two: Pod) -> None:
        for rank in (0, 1):
            stage(one.snapshots.root, rank, 5)
        descriptor = os.open(rank_folder(one.snapshots.root, 0) / "buffer-0", os.O_RDWR)
        assert lock(descriptor, shared=False)
        tries = asyncio.Event()

        def busy(folder: Path, state: StateId) -> AbstractContextManager[Reading]:
            tries.set()
            return reading(folder, state)

        with patch("lockstep_trainer.agent.copies.reading", busy):
            one.copies.copy(state_id(5), two.address, None, 0)
            async with asyncio.timeout(20):
                await tries.wait()
            os.close(descriptor)
            await one.tells(StateCopied(state_id(5)))
        assert states(two.snapshots.buddies, 0) == {5}

    with_pods(tmp_path, body)


def test_the_kept_copy_stays_while_the_next_one_comes(tmp_path: Path) -> None:
    async def body(one: Pod, two: Pod) -> None:
        kept = None
        for number, step in enumerate((1, 2, 3)):
            for rank in (0, 1):
                stage(one.snapshots.root, rank, step, number=number)
            one.copies.copy(state_id(step), two.address, kept, 0)
            await one.tells(StateCopied(state_id(step)))
            kept = state_id(1)
        assert states(two.snapshots.buddies, 0) == {1, 3}
        # Both must stay: nothing is overwritten, and it goes on trying until one may go.
        two.snapshots.keep(state_id(3))
        for rank in (0, 1):
            stage(one.snapshots.root, rank, 4, number=0)
        one.copies.copy(state_id(4), two.address, state_id(1), 0)
        answer = await one.copies.session.put(  # type: ignore[union-attr]
            f"http://{two.address}/v1/snapshots/0/9-1-1", params={"keep": "1-1-1"}, data=b"{}\n"
        )
        assert answer.status == 400
        assert states(two.snapshots.buddies, 0) == {1, 3}
        one.copies.copy(state_id(4), two.address, state_id(3), 0)
        await one.tells(StateCopied(state_id(4)))
        assert states(two.snapshots.buddies, 0) == {3, 4}

    with_pods(tmp_path, body)


def test_an_older_state_takes_no_newer_one_s_place(tmp_path: Path) -> None:
    """An agent that was cut off brings what it still has to bring, to whom it believes to be its buddy."""

    async def body(one: Pod, two: Pod) -> None:
        for number, step in enumerate((2, 3)):
            for rank in (0, 1):
                stage(one.snapshots.root, rank, step, number=number)
            one.copies.copy(state_id(step), two.address, None, 0)
            await one.tells(StateCopied(state_id(step)))
        stage(one.snapshots.root, 0, 1, number=2)
        url = f"http://{one.address}/v1/snapshots/0/1-1-1"
        async with one.copies.session.get(url) as answer:  # type: ignore[union-attr]
            old = await answer.read()
        async with one.copies.session.put(  # type: ignore[union-attr]
            f"http://{two.address}/v1/snapshots/0/1-1-1", data=old
        ) as answer:
            assert answer.status == 409
        assert states(two.snapshots.buddies, 0) == {2, 3}

    with_pods(tmp_path, body)


def test_what_is_damaged_here_is_removed_and_not_tried_for_ever(tmp_path: Path) -> None:
    """Else the slot stays at a state that no buddy takes, and nothing is kept any more."""

    async def body(one: Pod, two: Pod) -> None:
        for rank in (0, 1):
            stage(one.snapshots.root, rank, 5)
            stage(one.snapshots.root, rank, 6, number=1)
        one.snapshots.look()
        with (rank_folder(one.snapshots.root, 1) / "buffer-0").open("r+b") as file:
            file.seek(150_000)
            file.write(b"another")
        one.copies.copy(state_id(5), two.address, None, 0)
        await one.tells(SnapshotsHeld((Held(state_id(6), 0, 0),)))
        assert StateCopied(state_id(5)) not in one.told
        assert states(one.snapshots.root, 1) == {6}
        # A plan that is gone is damage too; a snapshot that is right stays.
        for plan in rank_folder(one.snapshots.root, 0).glob("plan-*.json"):
            plan.write_text("{}")
        one.copies.copy(state_id(6), two.address, None, 0)
        await one.tells(SnapshotsHeld(()))
        assert states(one.snapshots.root, 0) == {5}
        assert states(one.snapshots.root, 1) == {6}

    with_pods(tmp_path, body)


def test_what_arrives_damaged_is_not_there(tmp_path: Path) -> None:
    async def body(one: Pod, two: Pod) -> None:
        stage(one.snapshots.root, 0, 5)
        with (rank_folder(one.snapshots.root, 0) / "buffer-0").open("r+b") as file:
            file.seek(150_000)
            file.write(b"another")
        url = f"http://{one.address}/v1/snapshots/0/5-1-1"
        async with one.copies.session.get(url) as answer:  # type: ignore[union-attr]
            whole = await answer.read()
        for sent, message in ((whole, "model.a differs from its checksum"), (whole[:-1], "cut off")):
            async with one.copies.session.put(  # type: ignore[union-attr]
                f"http://{two.address}/v1/snapshots/0/5-1-1", data=sent
            ) as answer:
                assert answer.status == 400
                assert message in await answer.text()
            assert states(two.snapshots.buddies, 0) == set()

    with_pods(tmp_path, body)


def test_staged_is_told_once_all_ranks_have_it_and_again_by_the_next_agent(tmp_path: Path) -> None:
    told: list[Event] = []
    snapshots = Snapshots(tmp_path, 2, told.append)
    snapshots.look()
    assert told == [SnapshotsHeld(())]
    stage(snapshots.root, 0, 5)
    snapshots.look()
    assert told == [SnapshotsHeld(())]
    stage(snapshots.root, 1, 5)
    snapshots.look()
    staged = StateStaged(Term(1, 1), state_id(5), 2 * SIZE, 0.1)
    assert told[1:] == [staged, SnapshotsHeld((Held(state_id(5), 0, 0),))]
    snapshots.look()
    assert len(told) == 3
    again: list[Event] = []
    Snapshots(tmp_path, 2, again.append).look()
    assert again == told[1:]


def test_what_is_kept_elsewhere_by_now_gives_its_memory_back(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, 1, lambda _: None)
    stage(snapshots.root, 0, 5)
    for rank in (1, 2):
        stage(snapshots.buddies, rank, 4)
    descriptor = os.open(rank_folder(snapshots.buddies, 2) / "buffer-0", os.O_RDWR)
    assert lock(descriptor, shared=True)
    snapshots.keep(state_id(5))
    assert states(snapshots.root, 0) == {5}
    assert not rank_folder(snapshots.buddies, 1).exists()
    assert states(snapshots.buddies, 2) == {4}, "somebody reads it"
    os.close(descriptor)


def test_a_start_from_the_store_gives_the_memory_of_other_ranks_back_and_the_agent_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 0.06 s for a gigabyte. The workers that start do wait."""
    going, remove = threading.Event(), shutil.rmtree

    def slow(folder: Path, *, ignore_errors: bool) -> None:
        going.wait(20)
        remove(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", slow)

    async def main() -> None:
        snapshots = Snapshots(tmp_path, 1, lambda _: None)
        for root, rank in ((snapshots.root, 0), (snapshots.root, 1), (snapshots.buddies, 1)):
            stage(root, rank, 5)
        snapshots.leave_only(range(1))
        assert (ranks_in(snapshots.root), ranks_in(snapshots.buddies)) == ([0], [])
        stage(snapshots.buddies, 1, 6)  # a copy that comes meanwhile
        waits = asyncio.create_task(snapshots.removed())
        await asyncio.sleep(0)
        assert not waits.done()
        going.set()
        await waits
        assert sorted(os.listdir(snapshots.root)) == ["buddies", "r0"]
        assert states(snapshots.buddies, 1) == {6}

    asyncio.run(main())


def test_what_an_agent_has_not_come_to_remove_the_next_one_removes(tmp_path: Path) -> None:
    stage(tmp_path / "snapshots" / "gone-r1-17", 1, 5)
    snapshots = Snapshots(tmp_path, 1, lambda _: None)
    asyncio.run(snapshots.removed())
    assert os.listdir(snapshots.root) == []


def test_a_start_drops_what_is_beyond_it_kept_or_not(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, 1, lambda _: None)
    stage(snapshots.root, 0, 5)
    stage(snapshots.buddies, 1, 5)
    snapshots.keep(state_id(5))
    snapshots.pin(state_id(5))
    snapshots.drop(Term(1, 2), 4)
    assert states(snapshots.root, 0) == states(snapshots.buddies, 1) == set()
    assert snapshots.kept is None
