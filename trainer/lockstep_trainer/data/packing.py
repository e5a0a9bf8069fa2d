"""How documents fill samples of a fixed length.

A sample is a window of ``sequence_length`` + 1 tokens: inputs, and one further, targets. ``concatenate`` cuts the
stream into windows that overlap by one token, so that each token is a target once. ``bestFit`` keeps documents whole:
those longer than a window are cut in the same way, and the pieces are packed best-fit-decreasing (Ding et al.: Fewer
Truncations Improve Language Modeling, ICML 2024), in groups of documents so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lockstep_trainer.data.tokens import TokenStream

GROUP = 1 << 18
"""Documents that are packed together. In groups of so many, less than a thousandth of the tokens is padding where
documents are shorter than samples; see the tests for how it was measured."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Samples as tokens; each field is (samples, sequence_length + 1)."""

    tokens: NDArray[np.int64]
    fresh: NDArray[np.bool_] | None = None  # True where a piece begins; None: documents end with the end of text
    padding: NDArray[np.bool_] | None = None


class Samples(Protocol):
    """Numbered samples: the same number gives the same tokens, always."""

    def __len__(self) -> int: ...

    def windows(self, ids: NDArray[np.int64]) -> Windows:
        """These samples."""
        ...

    def close(self) -> None:
        """Let go of threads and files."""
        ...


def samples_in(tokens: int, sequence_length: int) -> int:
    """How many samples a stream of ``tokens`` holds: pieces of ``sequence_length`` + 1 that overlap by one token."""
    return max(0, tokens - 1) // sequence_length


@dataclass(frozen=True, slots=True)
class Concatenated:
    """Documents end to end."""

    stream: TokenStream
    sequence_length: int

    def __len__(self) -> int:
        return samples_in(self.stream.tokens, self.sequence_length)

    def windows(self, ids: NDArray[np.int64]) -> Windows:
        """These samples."""
        length = self.sequence_length
        tokens = self.stream.read(ids * length, np.full(len(ids), length + 1))
        return Windows(tokens.reshape(len(ids), length + 1))

    def close(self) -> None:
        """End reading."""
        self.stream.close()


@dataclass(frozen=True, slots=True)
class Pieces:
    """What lies in which sample: pieces in order, and where each sample's end among them."""

    starts: NDArray[np.int64]  # (pieces,), in the stream
    lengths: NDArray[np.int64]  # (pieces,)
    ends: NDArray[np.int64]  # (samples,)


@dataclass(frozen=True, slots=True)
class Packed:
    """Pieces of documents, packed; what they leave of a sample is padded with ``end``."""

    stream: TokenStream
    sequence_length: int
    pieces: Pieces
    end: int

    def __len__(self) -> int:
        return len(self.pieces.ends)

    def windows(self, ids: NDArray[np.int64]) -> Windows:
        """These samples."""
        width = self.sequence_length + 1
        lasts = self.pieces.ends[ids]
        firsts = np.where(ids > 0, self.pieces.ends[np.maximum(ids, 1) - 1], 0)
        counts = lasts - firsts
        which = _ranges(firsts, counts)
        lengths = np.asarray(self.pieces.lengths[which], np.int64)
        rows = np.repeat(np.arange(len(ids)), counts)
        # Where each piece begins in its row: the lengths before it, less those of the rows before.
        begins = np.cumsum(lengths) - lengths
        filled = np.bincount(rows, weights=lengths, minlength=len(ids)).astype(np.int64)
        begins -= np.repeat(np.cumsum(filled) - filled, counts)
        tokens = np.full((len(ids), width), self.end, np.int64)
        fresh = np.zeros((len(ids), width), np.bool_)
        fresh[rows, begins] = True
        tokens.reshape(-1)[_ranges(rows * width + begins, lengths)] = self.stream.read(
            np.asarray(self.pieces.starts[which], np.int64), lengths
        )
        places = np.arange(width)
        fresh |= places == filled[:, None]
        return Windows(tokens, fresh, places >= filled[:, None])

    def close(self) -> None:
        """End reading."""
        self.stream.close()


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of all ranges, end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    found: NDArray[np.int64] = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return found


# ------------------------------------------------------------------------------------------------------- packing


def write_pieces(lengths: NDArray[np.integer], sequence_length: int, path: Path) -> None:
    """Pack documents of these lengths, in stream order, into files at ``path``, for ``read_pieces``."""
    with (
        Path(f"{path}.starts").open("wb") as starts,
        Path(f"{path}.lengths").open("wb") as sizes,
        Path(f"{path}.ends").open("wb") as ends,
    ):
        packed = 0
        for group in _groups(lengths, sequence_length + 1):
            starts.write(group.starts.astype("<i8").tobytes())
            sizes.write(group.lengths.astype("<i4").tobytes())
            ends.write((group.ends + packed).astype("<i8").tobytes())
            packed += len(group.starts)


def read_pieces(path: Path) -> Pieces:
    """What ``write_pieces`` left, mapped."""

    def mapped(name: str, dtype: str) -> NDArray[np.int64]:
        file = Path(f"{path}.{name}")
        return np.memmap(file, dtype, mode="r") if file.stat().st_size else np.empty(0, np.int64)

    return Pieces(mapped("starts", "<i8"), mapped("lengths", "<i4"), mapped("ends", "<i8"))


def _groups(lengths: NDArray[np.integer], capacity: int) -> Iterator[Pieces]:
    at = 0
    for begin in range(0, len(lengths), GROUP):
        group = np.asarray(lengths[begin : begin + GROUP], np.int64)
        yield _best_fit(*_cut(at + np.cumsum(group) - group, group, capacity), capacity)
        at += int(group.sum())


def _cut(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pieces of at most ``capacity`` tokens that overlap by one; a piece of one token has nothing to predict."""
    counts = np.maximum(0, -(-(lengths - 1) // (capacity - 1)))
    number = _ranges(np.zeros(len(counts), np.int64), counts)
    offset = number * (capacity - 1)
    return np.repeat(starts, counts) + offset, np.minimum(capacity, np.repeat(lengths, counts) - offset)


def _best_fit(starts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> Pieces:
    """Each piece, longest first, goes into the fullest sample that has room for it, or into a new one.

    All pieces of one length are placed together. The fullest sample with room takes as many of them as fit, since with
    each it stays the fullest with room; ``occupied`` has a bit for each amount of room that some sample has.
    """
    if not len(lengths):
        return Pieces(starts, lengths, np.empty(0, np.int64))
    order = np.argsort(-lengths, kind="stable")
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # samples by the room that they have
    occupied, samples = 0, 0
    sample_of = np.empty(len(lengths), np.int64)
    for size, first, last in zip((-sizes).tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(order)], strict=True):
        at = first
        while at < last:
            higher = occupied >> size
            space = size + (higher & -higher).bit_length() - 1 if higher else capacity
            each = space // size
            wanted = -(-(last - at) // each)
            if higher:
                chosen, room[space] = room[space][:wanted], room[space][wanted:]
                if not room[space]:
                    occupied &= ~(1 << space)
            else:
                chosen = list(range(samples, samples + wanted))
                samples += wanted
            placed = min(last - at, each * len(chosen))
            sample_of[order[at : at + placed]] = np.repeat(chosen, each)[:placed]
            at += placed
            partly = placed - each * (len(chosen) - 1)  # pieces in the last of them
            for left, those in ((space - each * size, chosen[:-1]), (space - partly * size, chosen[-1:])):
                if those and left:
                    room[left] += those
                    occupied |= 1 << left
    by_sample = order[np.argsort(sample_of[order], kind="stable")]
    ends = np.cumsum(np.bincount(sample_of, minlength=samples))
    return Pieces(starts[by_sample], lengths[by_sample], ends)
