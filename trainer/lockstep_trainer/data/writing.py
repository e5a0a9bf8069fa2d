"""Text into token shards in a folder or a bucket, once for all jobs that train on it: ``lockstep data prepare``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from lockstep_trainer.data.documents import batches_of, documents, format_of
from lockstep_trainer.data.progress import Progress
from lockstep_trainer.data.sources import SourceFile
from lockstep_trainer.data.tokenizer import tokenizer_hash
from lockstep_trainer.data.tokens import ShardWriter, width_for
from lockstep_trainer.errors import UserError
from lockstep_trainer.storage import ObjectStore


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    shards: int
    documents: int
    tokens: int


def texts(files: Sequence[SourceFile], at_most: int) -> Iterator[str]:
    """The files' text to train a tokenizer on, ``at_most`` characters of it."""
    left = at_most
    for file in files:
        for document in documents(file):
            if left <= 0:
                return
            left -= len(document.text)
            yield document.text


def write_shards(
    files: Sequence[SourceFile], tokenizer: Tokenizer, end: int, to: ObjectStore, *, shard_tokens: int
) -> Written:
    """Write the documents of ``files`` as shards of about ``shard_tokens`` each, tokenizer.json beside them.

    Each shard goes to the store when it is full, its .json last: one that is cut off is refused by whoever reads it.
    Raises UserError where a file holds no text, or the store has shards already.
    """
    if any(entry.key.endswith(".tokens") for entry in to.list(readable=True)):
        raise UserError(f"{to.uri} has token shards already; choose an empty folder")
    if any(format_of(file) == "tokens" for file in files):
        raise UserError("what is prepared must be text, JSONL or Parquet, and these are token shards")
    to.put("tokenizer.json", tokenizer.to_str(pretty=True).encode())
    name, width = tokenizer_hash(tokenizer), width_for(tokenizer.get_vocab_size())
    progress = Progress()
    encoded = (
        [*encoding.ids, end]
        for batch in batches_of(document for file in files for document in documents(file))
        for encoding in tokenizer.encode_batch_fast([each.text for each in batch], add_special_tokens=False)
    )
    shards = written = tokens = 0
    waiting = next(encoded, None)
    while waiting is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"shard-{shards:05d}.tokens"
            with ShardWriter(path, width, name) as writer:
                while waiting is not None and writer.tokens < shard_tokens:
                    writer.add(waiting)
                    progress.documents(path.name, 1, tokens + writer.tokens)
                    waiting = next(encoded, None)
            for ending in ("", ".lengths", ".json"):
                to.put(f"{path.name}{ending}", Path(f"{path}{ending}").read_bytes())
            shards, written, tokens = shards + 1, written + writer.documents, tokens + writer.tokens
    return Written(shards, written, tokens)
