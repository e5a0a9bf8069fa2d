"""Plans of snapshots: who writes what, where it lies, what stands around the numbers; and how often they are taken."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep_trainer.checkpoint.pace import FIRST, SHORTEST, STALL_SHARE, Pace, interval
from lockstep_trainer.checkpoint.plan import ALIGNMENT, Archive, Item, Plan, PlannedFile, pack, spread
from lockstep_trainer.checkpoint.planning import make_frame
from lockstep_trainer.errors import Corrupt


@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.just(0)), max_size=20), min_size=1, max_size=6))
def test_every_piece_is_written_once_by_a_rank_that_has_it(held: list[list[tuple[int, int]]]) -> None:
    ranks = [[(identity, 1 + identity * 7) for identity in dict.fromkeys(number for number, _ in own)] for own in held]
    chosen = spread(ranks)
    written = [ranks[rank][number][0] for rank, numbers in enumerate(chosen) for number in numbers]
    assert sorted(written) == sorted({identity for own in ranks for identity, _ in own})


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 8))
def test_what_all_have_is_spread_evenly_by_bytes(sizes: list[int], ranks: int) -> None:
    chosen = spread([list(enumerate(sizes)) for _ in range(ranks)])
    loads = [sum(sizes[number] for number in numbers) for numbers in chosen]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes)


def test_what_one_rank_has_alone_counts_before_the_rest_is_spread() -> None:
    shared = [("a", 50), ("b", 50)]
    chosen = spread([[*shared, ("own", 100)], shared])
    assert chosen == [[2], [0, 1]]


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(100, 900))
def test_files_hold_their_pieces_without_overlap(sizes: list[int], file_bytes: int) -> None:
    archives = [Archive(size, 0, size) for size in sizes]
    files, places = pack(3, range(len(sizes)), archives, file_bytes)
    assert [place.piece for place in places] == list(range(len(sizes)))
    end = 0
    for place in places:
        file = files[place.file]
        assert place.offset >= end
        assert place.offset % ALIGNMENT == 0
        assert file.offset <= place.offset
        end = place.offset + sizes[place.piece]
        assert end <= file.offset + file.size
    assert [file.name for file in files] == [f"__3_{number}.distcp" for number in range(len(files))]
    assert all(file.size >= file_bytes for file in files[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (5, 70)])
def test_numbers_put_into_a_frame_are_what_torch_loads(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    numbers = (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape).to(dtype)
    frame = make_frame(dtype, shape)
    archive = frame.archive(numbers.numel() * numbers.element_size())
    assert archive.data % ALIGNMENT == 0
    saved = frame.head + bytes(numbers.flatten().view(torch.uint8).tolist() if numbers.numel() else b"") + frame.tail
    assert len(saved) == archive.length
    loaded = torch.load(io.BytesIO(saved), weights_only=True)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, numbers)


def plan(**change: Any) -> Plan:
    fields = {
        "rank": 1,
        "world_size": 2,
        "layout": {"shard": 2},
        "files": (PlannedFile("__1_0.distcp", 0, 100),),
        "items": (Item("model.w", 0, 0, 100, 64, 8, "float32", (2,), (0,)),),
        "size": 100,
        "metadata": False,
    }
    return Plan(**{**fields, **change})


def test_a_plan_is_named_by_what_is_in_it() -> None:
    text = plan().text
    assert Plan.from_json(text, "here") == plan()
    assert Plan.from_json(text, "here").key == plan().key
    assert plan(size=101).key != plan().key
    with pytest.raises(Corrupt, match="here is no plan"):
        Plan.from_json(text.replace('"size"', '"sise"'), "here")


# --- how often --------------------------------------------------------------------------------------------------------


@given(st.floats(1e-4, 10), st.floats(1e-3, 100))
def test_the_interval_is_the_smallest_that_is_cheap_enough(cost: float, step: float) -> None:
    every = interval(cost, step)
    if every < 10_000:
        assert cost <= STALL_SHARE * step * every * (1 + 1e-9)
        assert step * every * (1 + 1e-9) >= SHORTEST
    assert every == 1 or max(cost / STALL_SHARE, SHORTEST) > (every - 1) * step * (1 - 1e-9)


def test_snapshots_are_due_at_multiples_behind_the_last_step_and_when_asked_for() -> None:
    pace = Pace(last=25, durable=10, memory=4)
    due = []
    for step in range(1, 26):
        if pace.due(step):
            due.append(step)
            pace.took(step)
    assert due == [4, 8, 10, 12, 16, 20, 24, 25]
    pace.took(5)
    assert not pace.due(6)
    pace.asked = True
    assert pace.due(6)
    pace.took(6)
    assert not pace.due(7)


def test_one_that_was_left_out_stays_due() -> None:
    pace = Pace(last=100, durable=10, memory=None)
    assert [step for step in range(8, 14) if pace.due(step)] == [10, 11, 12, 13]
    assert pace.chosen == FIRST
    pace.took(13)
    assert [step for step in range(14, 21) if pace.due(step)] == [20]
