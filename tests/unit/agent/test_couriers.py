"""Couriers: who may meet one, and what becomes of a snapshot when one can't be reached, dies or is called off."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from localrun.victims import children_running
from lockstep_api.messages import StateId
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_trainer.agent.courier import Errand
from lockstep_trainer.agent.couriers import CourierError, Couriers
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.checkpoint.snapshots import COPIES, NoSnapshotError, is_busy, rank_folder
from lockstep_trainer.errors import Corrupt
from lockstep_trainer.protocol.events import StateCopied
from unit.agent.test_copies import SIZE, Pod, stage, state_id, states, with_pods

MODULE = "lockstep_trainer.agent.courier"
HOST = "127.0.0.1"


def trust(folder: Path, uid: str = "uid", key: bytes = b"a master key of this operator") -> Trust:
    folder.mkdir()
    for name, content in Credentials(MasterKeys(key)).secret(uid).items():
        (folder / name).write_bytes(content)
    return Trust(folder, uid, use_tls=True)


async def meet(giver: Couriers, taker: Couriers, source: Path, target: Path, state: StateId) -> None:
    """The giver listens, the taker calls; raises the taker's error."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    giving = asyncio.create_task(giver.carry(Errand(True, str(source), state, bind=HOST), port.set_result))
    try:
        errand = Errand(False, str(target), state, call=f"{HOST}:{await port}", buffers=COPIES)
        await taker.carry(errand)
    finally:
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def within_bounds() -> None:
        async with asyncio.timeout(60):
            await body()

    asyncio.run(within_bounds())


def test_only_couriers_of_the_same_job_meet(tmp_path: Path) -> None:
    data = stage(tmp_path, 0, 5)
    source = rank_folder(tmp_path, 0)
    ours, same = trust(tmp_path / "ours"), trust(tmp_path / "same")
    others = [
        trust(tmp_path / "job", uid="another"),
        trust(tmp_path / "operator", key=b"another operator's master key"),
    ]
    (tmp_path / "same" / "token").write_text("an older one")
    others.append(Trust(tmp_path / "same", "uid", use_tls=True))

    async def body() -> None:
        giver = Couriers(ours, 1)
        taker = Couriers(same, 1)
        for other in others:
            stranger = Couriers(other, 1)
            with pytest.raises((CourierError, Corrupt)):
                await meet(giver, stranger, source, tmp_path / "stranger", state_id(5))
            await stranger.close()
        assert not list(tmp_path.glob("stranger/buffer-*"))
        await taker.close()
        taker = Couriers(trust(tmp_path / "again"), 1)
        await meet(giver, taker, source, tmp_path / "target", state_id(5))
        assert (tmp_path / "target" / "buffer-0").read_bytes() == data
        with pytest.raises((CourierError, Corrupt)):
            await meet(giver, taker, source, tmp_path / "target", state_id(6))
        await giver.close()
        await taker.close()

    run(body)


def test_a_courier_that_is_called_off_lets_go_of_its_buffer(tmp_path: Path) -> None:
    stage(tmp_path, 0, 5, size=8_000_000)  # more than the kernel takes for a reader that reads nothing
    folder = rank_folder(tmp_path, 0)
    plain = Trust(_token(tmp_path), "uid", use_tls=False)

    async def body() -> None:
        couriers, others = Couriers(plain, 1), set(children_running(os.getpid(), MODULE))
        with closing(socket.create_server((HOST, 0))) as silent:
            errand = Errand(True, str(folder), state_id(5), call=f"{HOST}:{silent.getsockname()[1]}")
            task = asyncio.create_task(couriers.carry(errand))
            while not is_busy(folder):
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert not is_busy(folder)
            assert set(children_running(os.getpid(), MODULE)) <= others
        with pytest.raises(NoSnapshotError):  # and the next one has another
            await _to_nobody(couriers, folder, state_id(6))
        await couriers.close()

    run(body)


async def _to_nobody(couriers: Couriers, folder: Path, state: StateId) -> None:
    with closing(socket.create_server((HOST, 0))) as listening:
        await couriers.carry(Errand(True, str(folder), state, call=f"{HOST}:{listening.getsockname()[1]}"))


def _token(folder: Path) -> Path:
    (folder / "token").write_text("token")
    return folder


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """All snapshots are worth couriers."""
    monkeypatch.setattr("lockstep_trainer.agent.copies.LARGE", 1)


@pytest.mark.usefixtures("large")
def test_a_courier_that_dies_is_made_good(tmp_path: Path) -> None:
    async def body(one: Pod, two: Pod) -> None:
        for step in (5, 6):
            for rank in (0, 1):
                stage(one.snapshots.root, rank, step, number=step - 5)
            one.copies.copy(state_id(step), two.address, None, 0)
            await one.tells(StateCopied(state_id(step)))
            couriers = children_running(os.getpid(), MODULE)
            assert len(couriers) >= 2
            for pid in couriers:
                os.kill(pid, signal.SIGKILL)
        assert states(two.snapshots.buddies, 0) == states(two.snapshots.buddies, 1) == {5, 6}

    with_pods(tmp_path, body)


@pytest.mark.usefixtures("large")
def test_where_couriers_do_not_reach_each_other_the_agents_carry_it(tmp_path: Path) -> None:
    async def body(one: Pod, two: Pod) -> None:
        two.routes._bind = "127.0.0.2"  # as behind a rule that lets nothing but the agents' port through
        data = {rank: stage(one.snapshots.root, rank, 5) for rank in (0, 1)}
        one.copies.copy(state_id(5), two.address, None, 0)
        await one.tells(StateCopied(state_id(5)))
        assert states(two.snapshots.buddies, 0) == states(two.snapshots.buddies, 1) == {5}
        assert len(data[0]) == SIZE

    with_pods(tmp_path, body)
