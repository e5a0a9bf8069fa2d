"""Snapshots in memory: locks between writers and readers, what a death leaves, what a restore accepts.

Real files, real locks, real processes; two of them are ranks that plan together.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as dcp_load

from forked import run_ranks, start_all, wait_all
from lockstep_api.messages import RestorePoint, StateId, Term
from lockstep_trainer.agent.spoil import spoil_memory
from lockstep_trainer.checkpoint.buffers import check_room, in_memory
from lockstep_trainer.checkpoint.planning import Planned, plan_snapshots
from lockstep_trainer.checkpoint.recall import recall
from lockstep_trainer.checkpoint.samplelog import SampleLog
from lockstep_trainer.checkpoint.snapshots import (
    BUFFERS,
    UPLOADING,
    NoSnapshotError,
    Root,
    SnapshotBusyError,
    drop_beyond,
    held,
    lock,
    rank_folder,
    read_state,
    reading,
    real_parent,
    sample_lines,
    write_state,
)
from lockstep_trainer.checkpoint.stage import Facts, Stage
from lockstep_trainer.checkpoint.upload import upload_rank
from lockstep_trainer.errors import Corrupt, TrainerError, UserError
from lockstep_trainer.storage import open_store
from unit.storage.test_dcp import full, leaves, trained, zeroed

CPU = torch.device("cpu")


def state_id(step: int, generation: int = 1) -> StateId:
    return StateId(step, 1, generation)


def facts(step: int, *, log: str = "", samples: str | None = None) -> Facts:
    return Facts(state_id(step), {"state": {"step": step}}, Root(Term(1, 1), None), 0, samples, log)


def never(_: StateId) -> bool:
    return False


def one_rank(folder: Path, body: Callable[[dict[str, torch.Tensor], Planned, Stage], None]) -> None:
    """Runs ``body`` with the state of a rank, its plan and its stage, in a process of its own."""

    def run(rank: int) -> None:
        state = {"model": {"w": torch.arange(1000, dtype=torch.float32), "bias": torch.ones(3)}}
        planned = plan_snapshots(state, {"shard": 1}, rank=rank, group=None)
        changes = lambda name: name == "model.bias"  # noqa: E731
        body(state["model"], planned, Stage(rank_folder(folder, rank), planned, CPU, changes=changes))

    run_ranks(1, run)


def take(stage: Stage, state: dict[str, torch.Tensor], step: int, is_protected: Callable[[StateId], bool]) -> bool:
    if not stage.reserve(is_protected):
        return False
    stage.begin(stage.planned.sources({"model": state}), facts(step))
    stage.finish()
    return True


def test_a_reader_can_wait_for_the_writer(tmp_path: Path) -> None:
    """A snapshot is seen before its writer has let go of it: whoever reads it then must not call it gone."""

    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        folder = stage.buffers.folder
        assert take(stage, state, 1, never)
        descriptor = os.open(folder / "buffer-0", os.O_RDWR)
        assert lock(descriptor, shared=False)
        with pytest.raises(SnapshotBusyError), reading(folder, state_id(1)):
            pass
        timer = threading.Timer(0.05, os.close, [descriptor])
        timer.start()
        with reading(folder, state_id(1), wait=True) as held:
            assert held.snapshot.state == state_id(1)
        timer.join()

    one_rank(tmp_path, body)


def test_memory_is_made_beside_the_first_steps(tmp_path: Path) -> None:
    """Buffers that may be overwritten are mapped ahead; what another generation may still go on from is not touched."""

    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        folder = stage.buffers.folder
        assert take(stage, state, 1, never)
        later = Stage(folder, planned, CPU)
        later.prepare(lambda held: held == state_id(1))
        assert later.reserve(lambda held: held == state_id(1))
        later.release()
        sizes = [(folder / f"buffer-{number}").stat().st_size for number in range(BUFFERS)]
        assert sizes == [planned.plan.size] * BUFFERS
        assert {snapshot.state for snapshot in held(folder).values()} == {state_id(1)}
        recall(folder, planned, state_id(1), planned.sources({"model": state}))

    one_rank(tmp_path, body)


def test_a_volume_that_is_too_small_is_said_when_a_snapshot_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        monkeypatch.setattr(os, "posix_fallocate", full)
        stage.prepare(never)
        with pytest.raises(UserError, match=r"checkpoint\.memory: no room for a buffer"):
            stage.reserve(never)

    one_rank(tmp_path, body)


def test_memory_is_told_from_a_disk(tmp_path: Path) -> None:
    assert in_memory(Path("/dev/shm"))
    assert not in_memory(Path(__file__).parent)


def test_the_oldest_that_may_go_is_overwritten_and_nothing_else(tmp_path: Path) -> None:
    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        folder = stage.buffers.folder
        for step in (1, 2, 3):
            state["w"].fill_(step)
            assert take(stage, state, step, never)
        protected = {state_id(1), state_id(2)}
        with reading(folder, state_id(3)):
            assert not take(stage, state, 4, protected.__contains__), "one is read, two must stay"
        assert take(stage, state, 4, protected.__contains__)
        assert {snapshot.state for snapshot in held(folder).values()} == {*protected, state_id(4)}
        with reading(folder, state_id(1)):
            assert take(stage, state, 5, {state_id(4)}.__contains__)
            found = recall(folder, planned, state_id(1), planned.sources({"model": state}))
            assert found[0].state == state_id(1)
        assert bool((state["w"] == 1).all())
        with pytest.raises(NoSnapshotError):
            recall(folder, planned, state_id(2), planned.sources({"model": state}))

    one_rank(tmp_path, body)


def test_what_is_being_uploaded_is_overwritten_only_where_nothing_else_is_free(tmp_path: Path) -> None:
    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        for step in (1, 2, 3):
            assert take(stage, state, step, never)
        write_state(tmp_path / UPLOADING, state_id(1))
        assert take(stage, state, 4, {state_id(3)}.__contains__)
        assert states(stage) == {1, 3, 4}
        assert take(stage, state, 5, {state_id(3), state_id(4)}.__contains__)
        assert states(stage) == {3, 4, 5}

    def states(stage: Stage) -> set[int]:
        return {snapshot.state.step for snapshot in held(stage.buffers.folder).values()}

    one_rank(tmp_path, body)


def test_what_forward_passes_change_is_what_it_was_at_the_boundary(tmp_path: Path) -> None:
    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        assert stage.reserve(never)
        stage.begin(planned.sources({"model": state}), facts(1))
        state["bias"].fill_(7)  # a forward pass
        stage.wait()
        state["w"].fill_(7)  # the optimizer
        stage.finish()
        recall(stage.buffers.folder, planned, state_id(1), planned.sources({"model": state}))
        assert state["bias"].tolist() == [1, 1, 1]
        assert torch.equal(state["w"], torch.arange(1000, dtype=torch.float32))

    one_rank(tmp_path, body)


def test_a_tensor_that_has_changed_its_shape_is_refused(tmp_path: Path) -> None:
    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        assert stage.reserve(never)
        state["w"] = torch.zeros(1001)
        with pytest.raises(TrainerError, match=r"model\.w is .*1001.* and was .*1000"):
            stage.begin(planned.sources({"model": state}), facts(1))
        state["w"] = torch.zeros(1000)
        assert take(stage, state, 1, never), "the buffer was given back"

    one_rank(tmp_path, body)


def test_a_death_in_the_middle_of_a_copy_leaves_no_snapshot_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer held a whole snapshot before; the writer dies when half of the next one is copied."""
    copying = tmp_path / "copying"

    def halt(*_: Any) -> None:
        copying.touch()
        signal.pause()

    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        for step in (1, 2, 3):
            assert take(stage, state, step, never)
        (pid,) = start_all([lambda: die(state, planned)])
        while not copying.exists():
            time.sleep(0.001)
        folder = stage.buffers.folder
        assert {snapshot.state.step for snapshot in held(folder).values()} == {2, 3}, "its JSON went first"
        assert not stage.reserve({state_id(2), state_id(3)}.__contains__), "the writer holds the third"
        os.kill(pid, signal.SIGKILL)
        wait_all([pid])
        assert {snapshot.state.step for snapshot in held(folder).values()} == {2, 3}
        assert take(stage, state, 5, {state_id(2), state_id(3)}.__contains__)

    def die(state: dict[str, torch.Tensor], planned: Planned) -> None:
        writer = Stage(rank_folder(tmp_path, 0), planned, CPU)
        monkeypatch.setattr("lockstep_trainer.checkpoint.stage.crc64nvme", halt)
        assert take(writer, state, 4, never)

    one_rank(tmp_path, body)


@pytest.mark.parametrize("where", ["numbers", "frame", "last"])
def test_a_wrong_byte_is_refused_before_it_is_copied(tmp_path: Path, where: str) -> None:
    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        assert take(stage, state, 1, never)
        item = planned.plan.items[0]
        offset = {"numbers": item.data + 5, "frame": item.offset + 9, "last": item.offset + item.length - 1}[where]
        with (stage.buffers.folder / "buffer-0").open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 16]))
        state["w"].fill_(7)
        with pytest.raises(Corrupt, match=f"{item.name} differs"):
            recall(stage.buffers.folder, planned, state_id(1), planned.sources({"model": state}))
        assert bool((state["w"] == 7).all())
        store = open_store(f"file://{tmp_path}/store")
        with pytest.raises(Corrupt):
            upload_rank(stage.buffers.folder, state_id(1), None, store)

    one_rank(tmp_path, body)


def test_a_byte_that_is_flipped_on_purpose_is_refused_in_the_newest_snapshot_alone(tmp_path: Path) -> None:
    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        assert take(stage, state, 1, never)
        assert take(stage, state, 2, lambda one: one == state_id(1))
        assert spoil_memory(tmp_path, 0) == "a byte of model.w is flipped in its snapshot of step 2 in memory"
        with pytest.raises(Corrupt, match=r"model\.w differs"):
            recall(stage.buffers.folder, planned, state_id(2), planned.sources({"model": state}))
        recall(stage.buffers.folder, planned, state_id(1), planned.sources({"model": state}))

    one_rank(tmp_path, body)


def test_another_layout_does_not_take_it(tmp_path: Path) -> None:
    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        assert take(stage, state, 1, never)
        other = plan_snapshots({"model": {**state}}, {"shard": 2}, rank=0, group=None)
        with pytest.raises(Corrupt, match="another layout"):
            recall(stage.buffers.folder, other, state_id(1), other.sources({"model": state}))

    one_rank(tmp_path, body)


def test_uploads_of_two_ranks_are_a_folder_that_torch_opens(tmp_path: Path) -> None:
    """Sharded parameters, and scalars that both have: each is in the store once."""
    store = open_store(f"file://{tmp_path}/store")

    def body(rank: int) -> None:
        state = trained(2)
        planned = plan_snapshots(state, {"shard": 2}, rank=rank, group=None)
        stage = Stage(rank_folder(tmp_path, rank), planned, CPU)
        assert stage.reserve(never)
        log = '{"step": 3, "rank": 0}\n{"step": 4, "rank": 0}\n'
        stage.begin(planned.sources(state), facts(4, log=log, samples=f"samples-r{rank}.jsonl"))
        stage.finish()
        parent = RestorePoint(state_id(3), "step-3-e1-g1/manifest.json", "0" * 64)
        done = upload_rank(rank_folder(tmp_path, rank), state_id(4), parent, store)
        assert (done.header is not None) == (rank == 0)
        assert upload_rank(rank_folder(tmp_path, rank), state_id(4), parent, store) == done, "again: all is there"
        for file in done.files:
            assert len(store.get(f"step-4-e1-g1/{file.name}")[0]) == file.size
        assert store.get(f"step-4-e1-g1/samples-r{rank}.jsonl")[0] == b'{"step": 4, "rank": 0}\n'
        names = [item.name for item in planned.plan.items if item.file is not None]
        found: list[Any] = [None, None]
        dist.all_gather_object(found, names)
        wanted = full(state)
        if rank == 0:
            steps = [name for own in found for name in own if name.endswith(".step")]
            assert len(steps) == len(set(steps)) == 3
            assert all(any(name.endswith(".step") for name in own) for own in found), "spread over both"
            read = zeroed(trained(0))
            dcp_load(read, storage_reader=FileSystemReader(tmp_path / "store/step-4-e1-g1"), no_dist=True)
            assert full(read).keys() == wanted.keys()
            assert all(torch.equal(value, wanted[name]) for name, value in full(read).items())
        with torch.no_grad():
            for _, tensor in leaves(state):
                tensor.zero_()
        recall(rank_folder(tmp_path, rank), planned, state_id(4), planned.sources(state))
        assert all(torch.equal(value, wanted[name]) for name, value in full(state).items()), "own memory suffices"

    run_ranks(2, body)


# --- what is on which lineage -----------------------------------------------------------------------------------------


def test_what_the_ranks_really_restored_decides_on_the_parent() -> None:
    durable = RestorePoint(state_id(40), "step-40-e1-g1/manifest.json", "0" * 64)
    older = RestorePoint(state_id(20), "step-20-e1-g1/manifest.json", "0" * 64)
    foreign = RestorePoint(StateId(7, 9, 9), "s3://b/step-7-e9-g9/manifest.json", "0" * 64)
    assert real_parent(durable, Root(Term(1, 1), None)) == durable
    assert real_parent(durable, Root(Term(1, 2), older)) == older, "step 40 was corrupt, and passed over"
    assert real_parent(None, Root(Term(1, 1), None)) is None
    assert real_parent(foreign, Root(Term(1, 1), foreign)) == foreign


def test_the_sample_log_goes_back_to_the_newest_durable_ancestor(tmp_path: Path) -> None:
    path = tmp_path / "durable.json"

    def steps(log: SampleLog) -> list[int]:
        return [int(line[len('{"step": ') : -1]) for line in log.text().splitlines()]

    log = SampleLog(path, Term(1, 2))
    log.restored(20)
    for step in range(21, 26):
        log.add(step, f'{{"step": {step}}}')
    write_state(path, StateId(24, 1, 1))  # what this generation has passed over
    assert steps(log) == [21, 22, 23, 24, 25]
    write_state(path, StateId(22, 1, 2))
    assert steps(log) == [23, 24, 25]
    assert log.since == 22
    again = SampleLog(path, Term(1, 3))
    again.recalled(25, log.since, log.text(), Term(1, 2))
    write_state(path, StateId(24, 1, 1))
    assert steps(again) == [23, 24, 25]
    write_state(path, StateId(24, 1, 2))
    assert steps(again) == [25]
    assert sample_lines(again.text(), 25) == ""


def test_a_start_forgets_what_is_beyond_it(tmp_path: Path) -> None:
    def body(state: dict[str, torch.Tensor], planned: Planned, stage: Stage) -> None:
        for step in (1, 2, 3):
            assert take(stage, state, step, never)
        drop_beyond(tmp_path, Term(1, 1), 1)
        assert len(held(stage.buffers.folder)) == 3, "of the same term"
        drop_beyond(tmp_path, Term(1, 2), 2)
        assert {snapshot.state.step for snapshot in held(stage.buffers.folder).values()} == {1, 2}

    one_rank(tmp_path, body)


def test_what_does_not_fit_is_refused_with_numbers_and_ways_out(tmp_path: Path) -> None:
    gib = 1024**3
    check_room(tmp_path, [1000, 1000], buddy=True, limit=10_000)
    with pytest.raises(
        UserError, match=r"checkpoint\.memory\.limit: .*need 10\.00 GiB of a pod: 5 buffers of 1\.00 GiB"
    ):
        check_room(tmp_path, [gib, gib], buddy=True, limit=10 * gib - 1)
    check_room(tmp_path, [1000], buddy=False, limit=3000)
    with pytest.raises(UserError, match="the run volume has"):
        check_room(tmp_path, [1024 * gib], buddy=False, limit=None)


def test_states_are_told_through_small_files(tmp_path: Path) -> None:
    path = tmp_path / "snapshots" / "kept.json"
    assert read_state(path) is None
    write_state(path, state_id(5))
    assert read_state(path) == state_id(5)
    write_state(path, None)
    assert read_state(path) is None
