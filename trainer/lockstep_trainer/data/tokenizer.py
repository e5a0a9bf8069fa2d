"""The job's tokenizer: byte-level BPE, trained on its own text or loaded from a tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lockstep_api.v1alpha1 import S3Spec, TokenizerTraining
from lockstep_trainer.errors import StoreError, UserError
from lockstep_trainer.storage import open_store

END_OF_TEXT = "<|endoftext|>"
"""Between two files in the stream of tokens."""
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # what published tokenizers call it


def train_tokenizer(texts: Iterable[str], spec: TokenizerTraining) -> Tokenizer:
    """Byte-level BPE with ``spec.vocab_size`` tokens, END_OF_TEXT and the 256 bytes included. The same texts give the
    same tokenizer, whatever the number of threads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(uri: str, s3: S3Spec) -> Tokenizer:
    """The tokenizer.json at ``uri``; raises UserError where there is none or it can't be read."""
    root, name = uri.rsplit("/", 1)
    if not urlsplit(root).scheme:
        raise UserError(f"trainer.tokenizer.uri: {uri} is no URI of a file")
    try:
        data, _ = open_store(root, s3).get(name)
    except StoreError as error:
        if error.temporary:
            raise
        raise UserError(f"trainer.tokenizer.uri: {error}") from None
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"trainer.tokenizer.uri: {uri} is no tokenizer.json: {error}") from None


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token between two texts; raises UserError where the tokenizer has none."""
    for name in _END_NAMES:
        number = tokenizer.token_to_id(name)
        if number is not None:
            return int(number)
    raise UserError(
        f"trainer.tokenizer: it has no token for the end of a text; add one of {', '.join(_END_NAMES)} to it"
    )
