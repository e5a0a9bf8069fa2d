"""Batches out of samples: targets, positions and documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from lockstep_trainer.batch import IGNORE, Batch
from lockstep_trainer.data.order import Draws
from lockstep_trainer.data.packing import Samples, Windows


def make_batch(windows: Windows, *, end: int, document_mask: bool) -> Batch:
    """The batch of these samples.

    A target is the next token. There is no loss on padding, nor on the first token of a piece that ``bestFit`` put
    behind another. With ``document_mask`` a document's last word predicts its end, and its end predicts nothing: the
    first token of the next document can't be known from it. Positions begin anew with each document, and with each
    sample; padding is a document of its own.
    """
    tokens = windows.tokens
    targets = tokens[:, 1:].copy()
    fresh = windows.fresh
    if fresh is None and document_mask:
        fresh = np.zeros(tokens.shape, np.bool_)
        fresh[:, 1:] = tokens[:, :-1] == end
    if fresh is not None:
        targets[fresh[:, 1:]] = IGNORE
    if windows.padding is not None:
        targets[windows.padding[:, 1:]] = IGNORE
    inputs = torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]))
    if not document_mask:
        return Batch(inputs, torch.from_numpy(targets))
    assert fresh is not None
    begins = fresh[:, :-1].copy()
    begins[:, 0] = False  # the first document of a sample has number 0
    places = np.arange(begins.shape[1])
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    documents = np.cumsum(begins, axis=1, dtype=np.int64)
    return Batch(inputs, torch.from_numpy(targets), torch.from_numpy(positions), torch.from_numpy(documents))


def read_windows(sources: Sequence[Samples], draws: Draws) -> Windows:
    """The drawn samples of several sources, in the order of the draws."""
    used: list[int] = np.unique(draws.source).tolist()
    if len(used) == 1:
        return sources[used[0]].windows(draws.sample)
    parts = {source: sources[source].windows(draws.sample[draws.source == source]) for source in used}
    whole = any(part.fresh is not None for part in parts.values())
    shape = (len(draws), next(iter(parts.values())).tokens.shape[1])
    tokens = np.empty(shape, np.int64)
    fresh, padding = (np.zeros(shape, np.bool_) if whole else None for _ in range(2))
    for source, part in parts.items():
        here = draws.source == source
        tokens[here] = part.tokens
        if fresh is not None and padding is not None:
            assert part.fresh is not None
            assert part.padding is not None
            fresh[here], padding[here] = part.fresh, part.padding
    return Windows(tokens, fresh, padding)


def evaluation_ids(samples: int, at_most: int) -> NDArray[np.int64]:
    """The held-out samples that are read, the same each time: spread evenly over all ``samples``."""
    if samples <= at_most:
        return np.arange(samples)
    return np.arange(at_most) * samples // at_most


def evaluation_batches(
    samples: Samples, *, at_most: int, per_rank: int, rank: int, ranks: int, end: int, document_mask: bool
) -> Iterator[Batch]:
    """Batches of ``per_rank`` samples that together read the same held-out samples at any data-parallel width.

    Forward passes are collective: all ranks get as many batches, of the same shape. A rank that has run out of samples
    gets one again, without targets.
    """
    ids = evaluation_ids(len(samples), at_most)
    for start in range(0, len(ids), per_rank * ranks):
        own = ids[start : start + per_rank * ranks][rank::ranks]
        read = np.concatenate([own, np.full(per_rank - len(own), ids[0])])
        batch = make_batch(samples.windows(read), end=end, document_mask=document_mask)
        targets = batch.targets.clone()
        targets[len(own) :] = IGNORE
        yield replace(batch, targets=targets)
