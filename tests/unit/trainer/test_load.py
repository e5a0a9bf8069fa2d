"""Restores at other layouts: exact, each byte asked of the store once, in bounded memory; failures are everybody's."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from composed import Case, build
from counted import CountedStore, read_twice, reads
from forked import run_ranks
from lockstep_api.messages import StateId
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.checkpoint.load import load
from lockstep_trainer.checkpoint.manifest import FileEntry, Manifest, Ranges
from lockstep_trainer.checkpoint.manifest import Layout as WrittenLayout
from lockstep_trainer.checkpoint.pieces import named
from lockstep_trainer.checkpoint.state import training_state
from lockstep_trainer.errors import Corrupt, StoreError, UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.storage import ObjectStore, open_store
from samplerstates import sampler_state
from stored import store_from_ranks

FOLDER = "step-1-e1-g1"
MIB = 1024**2
MIXTURE = DecoderConfig(
    dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=32, vocab_size=40, experts=8, experts_per_token=2, expert_dim=12,
    shared_expert_dim=20,
)  # fmt: skip

WRITTEN = Layout(shard=2, tensor=2, expert=2)
READ = {
    "the same": WRITTEN,
    "one rank": Layout(),
    "more ranks, uneven shards": Layout(shard=3, tensor=2),
    "pipeline": Layout(pipeline=2),
    "replicas": Layout(replicate=2),
    "other experts": Layout(shard=4, expert=4),
}


def manifest(files: tuple[FileEntry, ...]) -> Manifest:
    return Manifest(
        state=StateId(1, 1, 1),
        parent=None,
        files=files,
        layout=WrittenLayout(world_size=4),
        sampler=sampler_state(1),
        versions={},
        verified=(),
        written_at=0.0,
        seconds=0.0,
    )


def filled(layout: Layout, config: DecoderConfig = MIXTURE) -> dict[str, Any]:
    """A state at a layout, whose every number is a function of its global place alone."""
    engine = build(Case(layout, config))
    parameters = list(engine.named_parameters())
    optimizer = build_optimizer(parameters, OptimizerSpec())
    with torch.no_grad():
        for _, value in parameters:
            own = optimizer.state[value]
            own["exp_avg"].copy_(value * 3 + 1)
            own["exp_avg_sq"].copy_(value * value)
            own["step"].fill_(7)
    return training_state(engine.state(), parameters, optimizer)


def local(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.to_local() if isinstance(t, DTensor) else t for name, t in named(state)}


def emptied(state: dict[str, Any]) -> dict[str, Tensor]:
    """What the state's local tensors were, before they are overwritten."""
    kept = {name: tensor.detach().clone() for name, tensor in local(state).items()}
    with torch.no_grad():
        for tensor in local(state).values():
            tensor.fill_(0 if tensor.dtype == torch.bool else 99)
    return kept


def assert_filled(state: dict[str, Any], kept: dict[str, Tensor]) -> None:
    found = local(state)
    assert found.keys() == kept.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, kept[name]), name


def save(store: ObjectStore, ranks: int, make: Callable[[], dict[str, Any]]) -> Manifest:
    """A step folder of what ``make`` returns on each of ``ranks`` ranks."""
    return manifest(store_from_ranks(ranks, lambda _: make(), store))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[ObjectStore, Manifest]:
    """A folder written at ``WRITTEN``. Tests that damage it make a copy."""
    root = tmp_path_factory.mktemp("saved")
    store = open_store(f"file://{root}/store")
    return store, save(store, WRITTEN.world_size, lambda: filled(WRITTEN))


def size(listed: Manifest) -> int:
    """Bytes of the data files."""
    return sum(file.size for file in listed.files if file.name.endswith(".distcp"))


def pieces(store: ObjectStore, listed: Manifest) -> int:
    """Bytes of the pieces in them."""
    names = [f"{FOLDER}/{file.name}" for file in listed.files if file.name.startswith("ranges-")]
    found = [Ranges.from_bytes(store.get(name)[0], name) for name in names]
    return sum(length for each in found for ranges in each.files.values() for _, length, _ in ranges)


@pytest.mark.parametrize("layout", READ.values(), ids=READ.keys())
def test_any_layout_reads_exactly_what_was_saved(
    saved: tuple[ObjectStore, Manifest], tmp_path: Path, layout: Layout
) -> None:
    store, listed = saved
    log = tmp_path / "reads"

    def body(rank: int) -> None:
        state = filled(layout)
        kept = emptied(state)
        # A window far smaller than the state: many rounds.
        load(state, CountedStore(store, log, rank), FOLDER, listed, group=None, window=64 * 1024)
        assert_filled(state, kept)

    run_ranks(layout.world_size, body)
    assert not read_twice(log)
    data = [read for read in reads(log) if read[1].endswith(".distcp")]
    # All of it, and of the zeros between the pieces at most those that lie in the middle of a read.
    assert pieces(store, listed) <= sum(length for *_, length in data) <= size(listed)
    assert {rank for rank, *_ in data} == set(range(layout.world_size)), "all ranks read"


def test_a_pipeline_part_alone_reads_no_other_part(saved: tuple[ObjectStore, Manifest], tmp_path: Path) -> None:
    """What nobody needs is not read: here only the model is wanted, and no optimizer."""
    store, listed = saved
    log = tmp_path / "reads"

    def body(rank: int) -> None:
        state = {"model": filled(Layout(shard=2))["model"]}
        kept = emptied(state)
        load(state, CountedStore(store, log, rank), FOLDER, listed, group=None)
        assert_filled(state, kept)

    run_ranks(2, body)
    data = sum(length for _, key, _, length in reads(log) if key.endswith(".distcp"))
    assert 0 < data < size(listed) / 2


def plain(value: float) -> dict[str, Any]:
    """A state that all ranks have; they share the writing of it, so that each has a file."""
    return {"model": {f"t{number}": torch.full((100, 3), value * (number + 1)) for number in range(12)}}


def flipped(data: bytes, _: bytes) -> bytes:
    middle = len(data) // 2  # of the data files: within the second of three pieces
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "a bit": flipped,
    "cut off": lambda data, _: data[: len(data) // 2],
    "empty": lambda data, _: b"",
    "swapped": lambda _, other: other,
    "missing": lambda data, _: None,
}
VICTIMS = {".metadata": "ranges-r2.json", "ranges-r2.json": "ranges-r1.json", "__2_0.distcp": "__1_0.distcp"}


def copied(store: ObjectStore, root: Path) -> ObjectStore:
    copy = open_store(f"file://{root}")
    for entry in store.list():
        copy.put(entry.key, store.get(entry.key)[0])
    return copy


def test_damage_is_corrupt_on_all_ranks_and_named(tmp_path: Path) -> None:
    """One after the other in the same group, which is then as good as before: the parent is loaded next."""
    store = open_store(f"file://{tmp_path}/store")
    listed = save(store, 4, lambda: plain(1.0))
    damaged = []
    for victim, other in VICTIMS.items():
        for how, damage in DAMAGE.items():
            copy = copied(store, tmp_path / f"{victim} {how}")
            key = f"{FOLDER}/{victim}"
            found = damage(copy.get(key)[0], copy.get(f"{FOLDER}/{other}")[0])
            copy.delete(key)
            if found is not None:
                copy.put(key, found)
            damaged.append((victim, copy))

    def body(rank: int) -> None:
        state = plain(0.0)
        for victim, copy in damaged:
            with pytest.raises(Corrupt, match=re.escape(victim)):
                load(state, copy, FOLDER, listed, group=None, window=4096)
        load(state, store, FOLDER, listed, group=None, window=4096)
        assert_filled(state, local(plain(1.0)))

    run_ranks(3, body)


def test_a_store_that_fails_one_rank_fails_all(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    listed = save(store, 4, lambda: plain(1.0))
    bad = copied(store, tmp_path / "bad")
    bad.delete(f"{FOLDER}/__0_0.distcp")

    def body(rank: int) -> None:
        for failing in (".metadata", "ranges-r1.json", "__3_0.distcp"):
            one = CountedStore(store, tmp_path / "reads", rank, failing)
            with pytest.raises(StoreError, match="away") as raised:
                load(plain(0.0), one, FOLDER, listed, group=None)
            assert raised.value.temporary
        # Trying again does not mend what is corrupt: it outweighs what may pass, whoever meets it.
        one = CountedStore(bad, tmp_path / "reads", rank, "__3_0.distcp")
        with pytest.raises(Corrupt, match=r"__0_0\.distcp is missing"):
            load(plain(0.0), one, FOLDER, listed, group=None)

    run_ranks(3, body)


def test_a_state_that_differs_is_a_sentence_on_all_ranks(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    state: dict[str, Any] = {"model": {"a.weight": torch.ones(5, 3)}, "optimizer": {"state": {"a.weight": {}}}}
    state["optimizer"]["state"]["a.weight"] = {"exp_avg": torch.ones(5, 3)}
    state["model"]["embedding.weight"] = torch.ones(7, 3)
    listed = save(store, 1, lambda: state)

    half = torch.ones(5, 3, dtype=torch.bfloat16)
    momentum = {"a.weight": {"momentum_buffer": torch.ones(5, 3)}}
    differing: list[tuple[dict[str, Any], list[str]]] = [
        ({"model": {"b": torch.ones(2)}}, ["no model.b,", "[2]", "set trainer.model back", "start a new job"]),
        ({"model": {"a.weight": torch.ones(6, 3)}}, ["model.a.weight with shape [5, 3]", "[6, 3]", "trainer.model"]),
        ({"model": {"a.weight": half}}, ["model.a.weight [5, 3] in float32", "in bfloat16", "trainer.model"]),
        (
            {"optimizer": {"state": momentum}},
            ["no optimizer.state.a.weight.momentum_buffer", "set trainer.recipe.optimizer back"],
        ),
        ({"model": {"a.weight": 3}}, ["model.a.weight", "int", "tensors only"]),
        ({"model": {"embedding.weight": torch.ones(8, 3)}}, ["[7, 3]", "set trainer.tokenizer, whose tokens", "model"]),
        ({"model": {"embedding.weight": torch.ones(7, 4)}}, ["[7, 4]", "set trainer.model back"]),
    ]

    def body(rank: int) -> None:
        for own, parts in differing:
            with pytest.raises(UserError) as raised:
                load(own if rank else state, store, FOLDER, listed, group=None)  # one rank alone is enough
            for part in parts:
                assert part in str(raised.value)

    run_ranks(2, body)


def test_tensors_that_the_state_lacks_are_only_said(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    listed = save(store, 1, lambda: {"model": {"a": torch.ones(5), "b": torch.ones(1)}})
    log = tmp_path / "log"

    def body(rank: int) -> None:
        logging.basicConfig(filename=log, force=True)
        state = {"model": {"a": torch.zeros(5)}}
        load(state, store, FOLDER, listed, group=None)
        assert torch.equal(state["model"]["a"], torch.ones(5))

    run_ranks(1, body)
    assert "has 1 tensors that this job's state lacks, such as model.b" in log.read_text()


ROWS = 12 * MIB // 4 // 64


@pytest.mark.parametrize("ranks", [1, 3])
def test_memory_stays_within_the_window(tmp_path: Path, ranks: int) -> None:
    """A state of 8 × 12 MiB, needed by all ranks, in a window of 32 MiB: the highest resident size while it loads."""
    store = open_store(f"file://{tmp_path}/store")
    window = 32 * MIB

    def state(value: float) -> dict[str, Any]:
        return {"model": {f"t{number}": torch.full((ROWS, 64), value) for number in range(8)}}

    listed = save(store, 1, lambda: state(1.0))

    def body(rank: int) -> None:
        target = state(0.0)  # touched: resident before
        load({"model": {"t0": target["model"]["t0"]}}, store, FOLDER, listed, group=None)  # what loads once: modules
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = resident("VmHWM")
        load(target, store, FOLDER, listed, group=None, window=window)
        grown = resident("VmHWM") - before
        assert all(bool((tensor == 1).all()) for tensor in target["model"].values())
        assert grown < window + 8 * MIB, f"{grown / MIB:.0f} MiB"

    run_ranks(ranks, body)


def resident(field: str) -> int:
    """Bytes of this process, by the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)
