"""Samples out of documents: every token is a target once, documents stay whole, and masks end where documents do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lockstep_trainer.batch import IGNORE
from lockstep_trainer.data.batches import evaluation_batches, make_batch
from lockstep_trainer.data.packing import (
    Concatenated,
    Packed,
    Samples,
    Windows,
    _best_fit,
    _cut,
    read_pieces,
    samples_in,
    write_pieces,
)
from lockstep_trainer.data.tokens import Extents, LocalShard, ShardWriter, TokenStream

END = 0


def write_stream(path: Path, lengths: list[int]) -> TokenStream:
    """Documents of these lengths, their end included; the other tokens are 1, 2, 3 …, all different."""
    number = 1
    with ShardWriter(path, 2, "0" * 64) as writer:
        for length in lengths:
            writer.add([*range(number, number + length - 1), END])
            number += length - 1
    shard = LocalShard(path, 2)
    return TokenStream([shard], Extents.whole([len(shard.ids)]))


def packed(folder: Path, lengths: list[int], sequence_length: int) -> Packed:
    stream = write_stream(folder / "x.tokens", lengths)
    write_pieces(np.array(lengths), sequence_length, folder / "x.pieces")
    return Packed(stream, sequence_length, read_pieces(folder / "x.pieces"), END)


def targets_of(samples: Samples, *, document_mask: bool) -> list[int]:
    batch = make_batch(samples.windows(np.arange(len(samples))), end=END, document_mask=document_mask)
    return batch.targets[batch.targets != IGNORE].tolist()


def test_samples_overlap_by_one_token(tmp_path: Path) -> None:
    samples = Concatenated(write_stream(tmp_path / "x.tokens", [40]), 16)
    assert len(samples) == 2
    assert [samples_in(tokens, 16) for tokens in (0, 1, 16, 17, 32, 33)] == [0, 0, 0, 1, 1, 2]
    assert samples.windows(np.array([1, 0])).tokens.tolist() == [list(range(17, 34)), list(range(1, 18))]
    assert targets_of(samples, document_mask=False) == list(range(2, 34))


def test_concatenated_documents_are_masked_apart(tmp_path: Path) -> None:
    samples = Concatenated(write_stream(tmp_path / "x.tokens", [4, 2, 4]), 8)
    batch = make_batch(samples.windows(np.array([0])), end=END, document_mask=True)
    assert batch.documents is not None
    assert batch.positions is not None
    #                                    document: 1 2 3 END, 4 END, 5 6 7
    assert batch.inputs.tolist() == [[1, 2, 3, END, 4, END, 5, 6]]
    assert batch.targets.tolist() == [[2, 3, END, IGNORE, END, IGNORE, 6, 7]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    plain = make_batch(samples.windows(np.array([0])), end=END, document_mask=False)
    assert plain.positions is plain.documents is None
    assert plain.targets.tolist() == [[2, 3, END, 4, END, 5, 6, 7]]


def test_a_sample_that_begins_with_an_end_has_one_document_before_the_next() -> None:
    batch = make_batch(Windows(np.array([[END, 1, END, 2, 3]])), end=END, document_mask=True)
    assert batch.documents is not None
    assert batch.targets.tolist() == [[IGNORE, END, IGNORE, 3]]
    assert batch.documents.tolist() == [[0, 1, 1, 2]]


def test_packed_documents_stay_whole_and_padding_has_no_loss(tmp_path: Path) -> None:
    samples = packed(tmp_path, [3, 6, 5, 3], 8)  # a sample holds 9: 6 + 3, 5 + 3
    windows = samples.windows(np.arange(2))
    assert windows.tokens.tolist() == [[3, 4, 5, 6, 7, END, 1, 2, END], [8, 9, 10, 11, END, 12, 13, END, END]]
    batch = make_batch(windows, end=END, document_mask=True)
    assert batch.documents is not None
    assert batch.positions is not None
    assert batch.targets.tolist() == [
        [4, 5, 6, 7, END, IGNORE, 2, END],
        [9, 10, 11, END, IGNORE, 13, END, IGNORE],
    ]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2]]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), sequence_length=st.integers(8, 16))
def test_each_token_behind_the_first_of_a_document_is_a_target_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    samples = packed(folder, lengths, sequence_length)
    expected: Counter[int] = Counter()
    number = 1
    for length in lengths:
        expected.update([*range(number + 1, number + length - 1), *([END] if length > 1 else [])])
        number += length - 1
    for mask in (True, False):
        assert Counter(targets_of(samples, document_mask=mask)) == expected


def naive_best_fit(lengths: NDArray[np.int64], capacity: int) -> list[int]:
    """Room left in each sample, by the definition, one piece after the other."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80), capacity=st.integers(9, 40))
def test_packing_is_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    sizes = np.array(lengths)
    starts, cut = _cut(np.cumsum(sizes) - sizes, sizes, capacity)
    assert cut.max(initial=0) <= capacity
    pieces = _best_fit(starts, cut, capacity)
    filled = np.diff(np.concatenate([[0], np.cumsum(pieces.lengths)])[np.concatenate([[0], pieces.ends])])
    assert sorted((capacity - filled).tolist()) == naive_best_fit(cut, capacity)
    assert sorted(zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True)) == sorted(
        zip(starts.tolist(), cut.tolist(), strict=True)
    )


def test_little_is_padded_and_few_documents_are_cut() -> None:
    """Lengths as on the web: log-normal, a median of 400 tokens. Concatenation cuts nearly every third of them."""
    lengths = np.random.default_rng(0).lognormal(6, 1.0, 20_000).astype(np.int64) + 2
    capacity = 2049
    pieces = _best_fit(*_cut(np.cumsum(lengths) - lengths, lengths, capacity), capacity)
    padding = 1 - pieces.lengths.sum() / (len(pieces.ends) * capacity)
    assert padding < 0.001
    assert (lengths > capacity).mean() < 0.06


@pytest.mark.parametrize(("ranks", "per_rank"), [(1, 1), (1, 4), (2, 2), (3, 1), (4, 3)])
def test_evaluation_reads_the_same_tokens_at_any_width(tmp_path: Path, ranks: int, per_rank: int) -> None:
    samples = packed(tmp_path, [9, 5, 20, 3, 7, 7, 30, 2], 8)
    at_most = len(samples) - 1
    every: list[int] = []
    counts = set()
    for rank in range(ranks):
        batches = list(
            evaluation_batches(
                samples, at_most=at_most, per_rank=per_rank, rank=rank, ranks=ranks, end=END, document_mask=True
            )
        )
        counts.add(len(batches))
        assert all(batch.inputs.shape == (per_rank, 8) for batch in batches)
        for batch in batches:
            every += batch.targets[batch.targets != IGNORE].tolist()
    alone = list(evaluation_batches(samples, at_most=at_most, per_rank=1, rank=0, ranks=1, end=END, document_mask=True))
    assert len(counts) == 1
    assert sorted(every) == sorted(t for batch in alone for t in batch.targets[batch.targets != IGNORE].tolist())


def test_a_stream_reads_across_pieces_of_shards(tmp_path: Path) -> None:
    for name, length in (("a", 10), ("b", 12)):
        write_stream(tmp_path / f"{name}.tokens", [length])
    shards = [LocalShard(tmp_path / f"{name}.tokens", 2) for name in "ab"]
    extents = Extents(np.array([0, 1, 0]), np.array([2, 0, 8]), np.array([3, 4, 2]))
    stream = TokenStream(shards, extents)
    expected = [3, 4, 5, 1, 2, 3, 4, 9, END]
    assert stream.tokens == 9
    assert stream.read(np.array([0]), np.array([9])).tolist() == expected
    for start in range(9):
        for length in range(10 - start):
            assert stream.read(np.array([start]), np.array([length])).tolist() == expected[start : start + length]
    assert stream.read(np.array([4, 0]), np.array([5, 2])).tolist() == [*expected[4:9], *expected[:2]]
