"""A byte flipped on purpose: where it is said to be, nowhere else, and the checksum that guards it does not fit any
more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lockstep_api.messages import RestorePoint, StateId
from lockstep_trainer.agent import spoil
from lockstep_trainer.agent.spoil import NothingToSpoilError, spoil_memory, spoil_store
from lockstep_trainer.storage import open_store

STATE = StateId(8, 1, 1)
FILES = {"__0_0.distcp": b"a" * 40, "__1_0.distcp": b"b" * 30, "__1_1.distcp": b"c" * 20, "__10_0.distcp": b"d" * 10}


def chain_of(folder: Path) -> Any:
    """What spoil_store asks of a chain, over a real folder."""
    store = open_store(f"file://{folder}")
    for name, data in FILES.items():
        store.put(f"step-8-e1-g1/{name}", data)
    files = tuple(SimpleNamespace(name=name, size=len(data)) for name, data in FILES.items())
    manifest = SimpleNamespace(folder="step-8-e1-g1", files=files)
    point = RestorePoint(STATE, "step-8-e1-g1/manifest.json", "0" * 64)
    return SimpleNamespace(store=store, newest=lambda: point, manifest=lambda _: manifest)


def test_in_the_store_it_is_the_ranks_smallest_file(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    assert spoil_store(chain, 1) == "a byte of step-8-e1-g1/__1_1.distcp is flipped in the store"
    now = {name: chain.store.get(f"step-8-e1-g1/{name}")[0] for name in FILES}
    assert {name for name in FILES if now[name] != FILES[name]} == {"__1_1.distcp"}
    assert sum(a != b for a, b in zip(now["__1_1.distcp"], FILES["__1_1.distcp"], strict=True)) == 1


def test_what_is_not_there_or_too_large_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(tmp_path)
    with pytest.raises(NothingToSpoilError, match="no data of rank 7"):
        spoil_store(chain, 7)
    monkeypatch.setattr(spoil, "LARGEST_OBJECT", 15)
    with pytest.raises(NothingToSpoilError, match=r"__1_1\.distcp of step-8-e1-g1 has 20 bytes"):
        spoil_store(chain, 1)
    chain.newest = lambda: None
    with pytest.raises(NothingToSpoilError, match="no checkpoint in its store yet"):
        spoil_store(chain, 1)
    with pytest.raises(NothingToSpoilError, match="no snapshot in this pod's memory yet"):
        spoil_memory(tmp_path / "snapshots", 0)
