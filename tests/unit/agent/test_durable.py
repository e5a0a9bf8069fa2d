"""The leader's hand on the store: what it tells of a commit, and where its journal goes on."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lockstep_api.messages import StateId, StoredFile, Term
from lockstep_trainer import storage
from lockstep_trainer.agent.durable import DurableStore
from lockstep_trainer.agent.settings import Job
from lockstep_trainer.errors import StoreError
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Commit
from lockstep_trainer.storage.checksum import crc64nvme
from samplerstates import sampler_state

ONE = Term(1, 1)
STATE = StateId(10, 1, 1)
FILES = tuple(StoredFile(name, 4, crc64nvme(b"data")) for name in ("__0_0.distcp", "ranges-r0.json"))
CHECKS = ("loss and gradient norm are finite",)
PREFIX = "default/small/uid"


def job(tmp_path: Path) -> Job:
    return Job("small", "default", "uid", {"checkpoint": {"uri": f"file://{tmp_path}/store"}})


def header(state: StateId) -> str:
    return json.dumps(
        {
            "state": asdict(state),
            "layout": {"world_size": 1},
            "sampler": sampler_state(state.step).model_dump(mode="json"),
            "versions": {},
            "verified": CHECKS,
            "written_at": 0.0,
            "seconds": 0.0,
        }
    )


def upload(tmp_path: Path) -> None:
    """What the listing names is there."""
    for file in FILES:
        own_store(tmp_path).put(f"step-10-e1-g1/{file.name}", b"data")


def own_store(tmp_path: Path) -> storage.ObjectStore:
    return storage.open_store(f"file://{tmp_path}/store/{PREFIX}")


async def told(said: asyncio.Queue[events.Event], kind: type[Any]) -> Any:
    """The next event, which must be of this kind."""
    event = await said.get()
    assert isinstance(event, kind), event
    return event


def test_a_commit_says_where_it_is_and_what_its_state_passed(tmp_path: Path) -> None:
    async def run() -> None:
        said: asyncio.Queue[events.Event] = asyncio.Queue()
        durable = DurableStore(job(tmp_path), tmp_path, said.put_nowait)
        durable.choose(ONE)
        assert (await told(said, events.RestoreChosen)).restore is None
        upload(tmp_path)
        durable.commit(Commit(ONE, STATE, None, header(STATE), FILES))
        done = await told(said, events.CommitDone)
        assert done.restore.state == STATE
        assert done.uri == f"file://{tmp_path}/store/{PREFIX}/step-10-e1-g1/manifest.json"
        assert (done.size, done.verified) == (8, CHECKS)
        durable.close()

    asyncio.run(run())


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_what_the_store_does_not_hold_is_not_committed(tmp_path: Path, damage: str) -> None:
    """The pods do not share the folder: each finds its own files in it."""
    key = "step-10-e1-g1/__0_0.distcp"
    problem = f"{own_store(tmp_path).uri}/{key} "
    problem += "is not there, .* a file system that all pods share" if damage == "missing" else "has 3 bytes, and 4"

    async def run() -> None:
        said: asyncio.Queue[events.Event] = asyncio.Queue()
        durable = DurableStore(job(tmp_path), tmp_path, said.put_nowait)
        durable.choose(ONE)
        await told(said, events.RestoreChosen)
        upload(tmp_path)
        own_store(tmp_path).delete(key)
        if damage == "short":
            own_store(tmp_path).put(key, b"dat")
        order = Commit(ONE, STATE, None, header(STATE), FILES)
        durable.commit(order)
        failed = await told(said, events.CommitFailed)
        assert re.search(problem, failed.problem)
        assert not failed.superseded
        upload(tmp_path)
        durable.commit(order)
        assert (await told(said, events.CommitDone)).restore.state == STATE
        durable.close()

    asyncio.run(run())


def test_a_file_that_a_listing_does_not_show_yet_is_looked_for_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system that keeps a folder's listing for some seconds."""
    real = storage.open_store

    async def run() -> None:
        said: asyncio.Queue[events.Event] = asyncio.Queue()
        durable = DurableStore(job(tmp_path), tmp_path, said.put_nowait)
        durable.choose(ONE)
        await told(said, events.RestoreChosen)
        durable.commit(Commit(ONE, STATE, None, header(STATE), FILES))
        assert (await told(said, events.CommitDone)).restore.state == STATE
        durable.close()

    upload(tmp_path)
    monkeypatch.setattr(storage, "open_store", lambda *of: _Late(real(*of), [], lambda _: None))
    asyncio.run(run())


def held_up(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Whoever opens the store waits there: (somebody has begun, let all go on)."""
    begun, go_on = threading.Event(), threading.Event()
    real = storage.open_store

    def slowly(*of: Any) -> storage.ObjectStore:
        begun.set()
        assert go_on.wait(20)
        return real(*of)

    monkeypatch.setattr(storage, "open_store", slowly)
    return begun, go_on


def test_a_question_that_was_called_off_is_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core takes any answer for that to its last question of the term: the simulation relies on it too."""
    begun, go_on = held_up(monkeypatch)

    async def run() -> None:
        said: asyncio.Queue[events.Event] = asyncio.Queue()
        durable = DurableStore(job(tmp_path), tmp_path, said.put_nowait)
        durable.choose(ONE)
        await asyncio.to_thread(begun.wait, 20)
        later = Term(1, 2)
        durable.choose(later)
        go_on.set()
        assert (await told(said, events.RestoreChosen)).term == later
        await durable._call(lambda: None)  # behind all that was asked of the thread
        assert said.empty()
        durable.close()

    asyncio.run(run())


class _Counted:
    """A store that notes what it is asked for; ``after`` is called behind each put that worked."""

    def __init__(self, store: storage.ObjectStore, asked: list[str], after: Callable[[str], None]) -> None:
        self._store, self._asked, self._after = store, asked, after

    def below(self, prefix: str) -> _Counted:
        return _Counted(self._store.below(prefix), self._asked, self._after)

    def put(self, key: str, data: bytes, **how: Any) -> str:
        self._asked.append(f"put {key}")
        etag = self._store.put(key, data, **how)
        self._after(key)
        return etag

    def list(self, prefix: str = "", **how: Any) -> tuple[storage.Entry, ...]:
        self._asked.append(f"list {prefix}")
        return self._store.list(prefix, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class _Late(_Counted):
    """A store whose listings show nothing yet."""

    def below(self, prefix: str) -> _Late:
        return _Late(self._store.below(prefix), self._asked, self._after)

    def list(self, prefix: str = "", **how: Any) -> tuple[storage.Entry, ...]:
        return ()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stores are asked for, in order."""
    found: list[str] = []
    real = storage.open_store
    monkeypatch.setattr(storage, "open_store", lambda *of: _Counted(real(*of), found, lambda _: None))
    return found


def note(number: int, term: Term = ONE) -> dict[str, Any]:
    return {"kind": "note", "number": number, "epoch": term.epoch, "generation": term.generation}


async def written(durable: DurableStore, *lines: dict[str, Any]) -> bool:
    for line in lines:
        durable.journal(line)
    return await durable.flush()


def journal(tmp_path: Path) -> dict[str, list[int]]:
    """File → the numbers of its lines."""
    files = sorted((tmp_path / "store" / PREFIX / "journal").iterdir())
    return {file.name: [json.loads(line)["number"] for line in file.read_text().splitlines()] for file in files}


def test_a_new_agents_journal_goes_on_behind_the_earlier_ones(tmp_path: Path, asked: list[str]) -> None:
    async def run() -> None:
        first, second = (DurableStore(job(tmp_path), tmp_path, lambda _: None) for _ in range(2))
        for number in range(12):
            assert await written(first, note(number))
        del asked[:]
        assert await written(second, note(12))
        assert await written(second, note(13))
        assert asked == ["list journal/e1-g1-", "put journal/e1-g1-13.jsonl", "put journal/e1-g1-14.jsonl"]
        # The first one still lives: its number is taken, which the store says.
        assert await written(first, note(14))
        for durable in (first, second):
            durable.close()

    asyncio.run(run())
    assert journal(tmp_path) == {f"e1-g1-{number + 1}.jsonl": [number] for number in range(15)}


def test_lines_whose_answer_was_lost_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.open_store
    lost = ["journal/e1-g1-1.jsonl", "journal/e1-g1-2.jsonl"]

    def after(key: str) -> None:
        if key in lost:
            lost.remove(key)
            raise StoreError("no answer", temporary=True)

    monkeypatch.setattr(storage, "open_store", lambda *of: _Counted(real(*of), [], after))

    async def run() -> None:
        durable = DurableStore(job(tmp_path), tmp_path, lambda _: None)
        assert not await written(durable, note(0), note(1))
        assert not await written(durable, note(2))  # the first two are there; then again no answer
        assert await written(durable)
        assert await written(durable, note(3))
        durable.close()

    asyncio.run(run())
    assert journal(tmp_path) == {"e1-g1-1.jsonl": [0, 1], "e1-g1-2.jsonl": [2], "e1-g1-3.jsonl": [3]}


def test_lines_that_come_while_a_full_backlog_is_written_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep_trainer.agent.durable._LONGEST_BACKLOG", 4)
    begun, go_on = held_up(monkeypatch)

    async def run() -> None:
        durable = DurableStore(job(tmp_path), tmp_path, lambda _: None)
        for number in range(6):  # the store is away: the oldest two go
            durable.journal(note(number))
        flushing = asyncio.create_task(durable.flush())
        await asyncio.to_thread(begun.wait, 20)
        for number in range(6, 9):
            durable.journal(note(number))
        go_on.set()
        assert await flushing
        assert await written(durable, note(9))
        durable.close()

    asyncio.run(run())
    assert journal(tmp_path) == {"e1-g1-1.jsonl": [2, 3, 4, 5], "e1-g1-2.jsonl": [6, 7, 8, 9]}
