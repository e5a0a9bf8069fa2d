"""The job's tokenizer: trained on its own text (byte-level BPE, unigram), the bytes themselves, or loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lockstep_api.v1alpha1 import S3Spec, TokenizerTraining
from lockstep_trainer.errors import NotFound, StoreError, UserError
from lockstep_trainer.storage import ObjectStore, open_store

END_OF_TEXT = "<|endoftext|>"
"""Between two documents in the stream of tokens."""
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")  # of published tokenizers


def train_tokenizer(texts: Iterable[str], spec: TokenizerTraining) -> Tokenizer:
    """A tokenizer of ``spec.kind``; END_OF_TEXT and the 256 bytes are among its tokens, so that any text can be
    written. The same texts give the same tokenizer, whatever the number of threads. Not so unigram: its training sums
    in a changing order, and its scores differ from run to run."""
    match spec.kind:
        case "bytes":
            return _bytes_tokenizer()
        case "unigram":
            tokenizer, trainer = Tokenizer(models.Unigram()), _unigram_trainer(spec.vocab_size)
        case _:
            tokenizer, trainer = Tokenizer(models.BPE()), _bpe_trainer(spec.vocab_size)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(uri: str, s3: S3Spec, field: str = "trainer.tokenizer.uri") -> Tokenizer:
    """The tokenizer.json at ``uri``, or in the folder ``uri``; raises UserError, naming ``field``, where there is none
    or it can't be read."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    if not name.endswith(".json"):
        folder, name = f"{folder}/{name}", "tokenizer.json"
    try:
        data, _ = open_store(folder, s3).get(unquote(name))
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    except StoreError as error:
        if error.temporary:
            raise
        raise UserError(f"{field}: {error}") from None
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{field}: {uri} is no tokenizer.json: {error}") from None


def end_of_text(tokenizer: Tokenizer, config: dict[str, object] | None = None, field: str = "trainer.tokenizer") -> int:
    """The id of the token between two texts: the one that ``config`` (tokenizer_config.json) calls eos_token, else one
    of the usual names; raises UserError, naming ``field``, where the tokenizer has none."""
    named = (config or {}).get("eos_token")
    if isinstance(named, dict):  # an AddedToken
        named = named.get("content")
    for name in (*([named] if isinstance(named, str) else []), *_END_NAMES):
        number = tokenizer.token_to_id(name)
        if number is not None:
            return int(number)
    raise UserError(f"{field}: it has no token for the end of a text; add one of {', '.join(_END_NAMES)} to it")


def load_config(uri: str, s3: S3Spec, field: str = "trainer.tokenizer.uri") -> dict[str, object]:
    """The tokenizer_config.json beside a tokenizer.json; empty where there is none. Raises UserError, naming ``field``,
    where it is no JSON."""
    folder = uri.rstrip("/")
    if folder.endswith(".json"):
        folder = folder.rsplit("/", 1)[0]
    store: ObjectStore = open_store(folder, s3)
    try:
        config = json.loads(store.get("tokenizer_config.json")[0])
    except NotFound:
        return {}
    except ValueError as error:
        raise UserError(f"{field}: {folder}/tokenizer_config.json is no JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 over the tokenizer, the same however its file was written."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _bpe_trainer(size: int) -> Any:
    """Byte-level byte-pair encoding."""
    return trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _unigram_trainer(size: int) -> Any:
    """Unigram language model (Kudo 2018), over bytes too: no text is unknown to it."""
    return trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        unk_token=None,
        show_progress=False,
    )


def _bytes_tokenizer() -> Tokenizer:
    """Byte b is token b, the end of text is 256."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where it is printable, else the next one
    from 256 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
