"""Step folders: torch opens them unaided, they load at another layout, and no wrong byte is handed over."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from forked import run_ranks
from lockstep_api.messages import StateId
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.checkpoint.manifest import FileEntry, Layout, Manifest, Ranges, ranges_of
from lockstep_trainer.checkpoint.metadata import load_metadata
from lockstep_trainer.checkpoint.plan import pack
from lockstep_trainer.checkpoint.state import load_state, training_state
from lockstep_trainer.errors import Corrupt
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.storage import ObjectStore, open_store
from lockstep_trainer.storage.checksum import crc64nvme
from samplerstates import sampler_state
from stored import store_from_ranks, store_state

FOLDER = "step-1-e1-g1"


def manifest(files: tuple[FileEntry, ...]) -> Manifest:
    return Manifest(
        state=StateId(1, 1, 1),
        parent=None,
        files=files,
        layout=Layout(world_size=2, replicate=1),
        sampler=sampler_state(1),
        versions={},
        verified=(),
        written_at=0.0,
        seconds=0.0,
    )


def trained(ranks: int) -> dict[str, Any]:
    """The state of a small model after a step; sharded where there are ranks. 5 rows do not divide evenly by 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7, bias=False))
    if ranks:
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model.named_parameters(), OptimizerSpec(lr=0.1))
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    return training_state(dict(model.named_parameters()), model.named_parameters(), optimizer)


def zeroed(state: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        for _, tensor in leaves(state):
            tensor.zero_()
    return state


def leaves(state: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        return [(name, state)]
    return [leaf for key in state for leaf in leaves(state[key], f"{name}.{key}")]


def full(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in leaves(state)}


def assert_as_saved(state: dict[str, Any], tmp_path: Path) -> None:
    found, wanted = full(state), torch.load(tmp_path / "expected")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def saved(tmp_path: Path) -> tuple[ObjectStore, Manifest]:
    """A step folder that two ranks have written."""
    store = open_store(f"file://{tmp_path}/store")
    listing = tmp_path / "files"

    def save(rank: int) -> None:
        state = trained(2)
        whole = full(state)
        if rank == 0:
            torch.save(whole, tmp_path / "expected")
        files = store_state(state, store, samples=f'{{"step": 1, "rank": {rank}}}\n')
        if rank == 0:
            listing.write_bytes(pickle.dumps(files))

    run_ranks(2, save)
    return store, manifest(pickle.loads(listing.read_bytes()))


def test_the_manifest_lists_every_file_with_what_is_in_it(saved: tuple[ObjectStore, Manifest]) -> None:
    store, listed = saved
    assert sorted(file.name for file in listed.files) == [
        entry.key.removeprefix(f"{FOLDER}/") for entry in store.list()
    ]
    of_a_rank = ("samples-r{}.jsonl", "__{}_0.distcp", "ranges-r{}.json")
    of_ranks = {name.format(rank) for rank in range(2) for name in of_a_rank}
    assert {file.name for file in listed.files} == {".metadata", *of_ranks}
    for file in listed.files:
        data = store.get(f"{FOLDER}/{file.name}")[0]
        assert (len(data), crc64nvme(data)) == (file.size, file.crc64nvme)
        if file.name.endswith(".distcp"):
            ranges, end = Ranges.from_bytes(store.get(f"{FOLDER}/{ranges_of(file.name)}")[0], ""), 0
            for offset, length, checksum in ranges.files[file.name]:
                assert data[end:offset] == bytes(offset - end)
                end = offset + length
                assert crc64nvme(data[offset:end]) == checksum
            assert end == file.size


def test_it_loads_at_the_same_and_at_another_layout(saved: tuple[ObjectStore, Manifest], tmp_path: Path) -> None:
    store, listed = saved

    def load(rank: int, ranks: int) -> None:
        state = zeroed(trained(ranks))
        load_state(state, store, FOLDER, listed, group=None)
        assert_as_saved(state, tmp_path)

    for ranks in (2, 1, 3):
        run_ranks(ranks, lambda rank, ranks=ranks: load(rank, ranks))  # type: ignore[misc]


def test_torch_opens_the_folder_unaided(saved: tuple[ObjectStore, Manifest], tmp_path: Path) -> None:
    store, _ = saved
    state = zeroed(trained(0))
    dcp.load(state, storage_reader=FileSystemReader(f"{store.uri.removeprefix('file://')}/{FOLDER}"), no_dist=True)
    assert_as_saved(state, tmp_path)


@pytest.mark.parametrize("how", ["bit flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp", "ranges-r0.json"])
def test_damage_is_found_by_all_ranks_and_named(saved: tuple[ObjectStore, Manifest], name: str, how: str) -> None:
    store, listed = saved
    data, _ = store.get(f"{FOLDER}/{name}")
    store.delete(f"{FOLDER}/{name}")
    middle = len(data) // 2
    if how == "bit flipped":
        store.put(f"{FOLDER}/{name}", data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
    elif how == "truncated":
        store.put(f"{FOLDER}/{name}", data[:-1])

    def load(rank: int) -> None:
        with pytest.raises(Corrupt, match=name):
            load_state(trained(2), store, FOLDER, listed, group=None)
        dist.barrier()  # they are still together

    run_ranks(2, load)


def test_what_the_manifest_does_not_name_is_not_read(saved: tuple[ObjectStore, Manifest]) -> None:
    """A folder whose bytes are whole but whose manifest lacks a range: nothing vouches for it."""
    store, listed = saved
    key = f"{FOLDER}/ranges-r1.json"
    ranges = Ranges.from_bytes(store.get(key)[0], key)
    fewer = Ranges(files={name: pieces[1:] for name, pieces in ranges.files.items()}).to_bytes()
    store.put(key, fewer)
    entry = FileEntry(name="ranges-r1.json", size=len(fewer), crc64nvme=crc64nvme(fewer))
    files = tuple(entry if file.name == entry.name else file for file in listed.files)

    def load(rank: int) -> None:
        with pytest.raises(Corrupt, match=r"not in ranges-r1\.json"):
            load_state(trained(2), store, FOLDER, manifest(files), group=None)

    run_ranks(2, load)


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def test_metadata_cannot_run_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Corrupt, match=r"builtins\.print, which does not belong there"):
        load_metadata(pickle.dumps(_Hostile()), ".metadata")
    assert "this ran" not in capsys.readouterr().out
    with pytest.raises(Corrupt, match="not the metadata of a checkpoint"):
        load_metadata(pickle.dumps(set()), ".metadata")


def test_large_states_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep_trainer.checkpoint.planning.pack", partial(pack, file_bytes=4000))
    store = open_store(f"file://{tmp_path}")
    state = {f"t{number}": torch.full((500,), float(number)) for number in range(6)}
    files = store_from_ranks(1, lambda _: state, store)
    data = [file for file in files if file.name.endswith(".distcp")]
    assert len(data) > 1
    assert all(file.size < 8000 for file in data)
    again = {name: torch.zeros(500) for name in state}
    dcp.load(again, storage_reader=FileSystemReader(tmp_path / FOLDER), no_dist=True)
    assert all(torch.equal(again[name], state[name]) for name in state)
