"""Sources whose data is token shards already: used where they lie, local or in a store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from lockstep_trainer.data.corpus import ShardPlace, SourceMeta
from lockstep_trainer.data.documents import held_out
from lockstep_trainer.data.sources import SourceFile
from lockstep_trainer.data.tokens import ShardMeta, read_meta
from lockstep_trainer.errors import NotFound, UserError


def use_shards(
    folder: Path, number: int, name: str, files: Sequence[SourceFile], share: float, *, tokenizer: str
) -> SourceMeta:
    """Divide the documents of the shards into training and held-out ones, and write down where they are.

    Raises UserError where a shard lacks its files, is cut off, or was made with another tokenizer.
    """
    shards = [file for file in files if file.path.endswith(".tokens")]
    if not shards:
        raise UserError(f"trainer.data.sources: {name} has format tokens, and no file that ends in .tokens")
    metas = [_meta(file, tokenizer) for file in shards]
    if len({meta.width for meta in metas}) > 1:
        raise UserError(f"trainer.data.sources: the shards of {name} have ids of different widths; prepare them again")
    counts = []
    for part in ("train", "holdout"):
        pieces: list[NDArray[np.int64]] = []
        with (folder / f"{number}-{part}.tokens.lengths").open("wb") as lengths:
            for which, (file, meta) in enumerate(zip(shards, metas, strict=True)):
                documents = _lengths(file, meta)
                kept = _kept(file, meta, share, held=part == "holdout")
                lengths.write(documents[kept].astype("<u4").tobytes())
                pieces.append(_extents(which, documents, kept))
        extents = np.concatenate(pieces, axis=1)
        np.save(folder / f"{number}-{part}.extents.npy", extents)
        counts.append(int(extents[2].sum()))
    digest = hashlib.sha256(f"{share}".encode() + "".join(meta.sha256 for meta in metas).encode()).hexdigest()
    places = tuple(_place(file, meta) for file, meta in zip(shards, metas, strict=True))
    return SourceMeta(name, counts[0], counts[1], metas[0].width, digest, places)


def _meta(file: SourceFile, tokenizer: str) -> ShardMeta:
    where = f"{file.uri}.json"
    try:
        meta = read_meta(file.root.get(f"{file.path}.json")[0], where)
    except NotFound:
        raise UserError(
            f"trainer.data.sources: {file.uri} has no .json beside it; write shards with `lockstep data prepare`"
        ) from None
    if file.size != meta.tokens * meta.width:
        raise UserError(
            f"trainer.data.sources: {file.uri} has {file.size} bytes and not the {meta.tokens * meta.width} that "
            f"{where} says; bring it back"
        )
    if meta.tokenizer != tokenizer:
        raise UserError(
            f"trainer.data.sources: {file.uri} was made with another tokenizer; set trainer.tokenizer.uri to the "
            "tokenizer.json beside the shards"
        )
    return meta


def _lengths(file: SourceFile, meta: ShardMeta) -> NDArray[np.int64]:
    try:
        data, _ = file.root.get(f"{file.path}.lengths")
    except NotFound:
        raise UserError(f"trainer.data.sources: {file.uri} has no .lengths beside it; bring it back") from None
    found = np.frombuffer(data, "<u4").astype(np.int64)
    if len(found) != meta.documents or found.sum() != meta.tokens:
        raise UserError(f"trainer.data.sources: {file.uri}.lengths does not fit its .json; prepare the shard again")
    return found


def _kept(file: SourceFile, meta: ShardMeta, share: float, *, held: bool) -> NDArray[np.bool_]:
    """Which documents of the shard belong to the part."""
    if share in (0.0, 1.0):
        return np.full(meta.documents, held == bool(share))
    places = (held_out(file.source, f"{file.path}#{row}", share) for row in range(1, meta.documents + 1))
    kept: NDArray[np.bool_] = np.fromiter(places, np.bool_, meta.documents) == held
    return kept


def _extents(shard: int, documents: NDArray[np.int64], kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Runs of documents that are kept, as (shard, offset, length) in tokens, shape (3, runs)."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    borders = np.concatenate([[0], np.cumsum(documents)])
    first, behind = borders[changes[::2]], borders[changes[1::2]]
    return np.stack([np.full(len(first), shard), first, behind - first])


def _place(file: SourceFile, meta: ShardMeta) -> ShardPlace:
    parts = urlsplit(file.root.uri)
    if parts.scheme == "file":
        return ShardPlace("", f"{unquote(parts.path)}/{file.path}", meta.tokens)
    return ShardPlace(file.root.uri, file.path, meta.tokens)
