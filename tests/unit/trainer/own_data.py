"""A data set of a user's own, as ``data.module`` takes it."""

from __future__ import annotations

import threading
from typing import Any


class Counting:
    """Sample i is i, i + 1, i + 2 …, in the vocabulary."""

    def __init__(self, length: int, vocabulary: int, start: int = 0) -> None:
        self.length, self.vocabulary, self.start = length, vocabulary, start

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> list[int]:
        return [(self.start + index + place) % self.vocabulary for place in range(self.length + 1)]


def counting(spec: Any, tokenizer: Any, sequence_length: int) -> Counting:
    """The data set."""
    del spec
    return Counting(sequence_length, tokenizer.get_vocab_size())


class Watched(Counting):
    """It knows which threads ask."""

    def __init__(self, length: int, vocabulary: int) -> None:
        super().__init__(length, vocabulary)
        self.threads: set[int] = set()

    def __getitem__(self, index: int) -> list[int]:
        self.threads.add(threading.get_ident())
        return super().__getitem__(index)


def watched(spec: Any, tokenizer: Any, sequence_length: int) -> Watched:
    """The same data, of which it is known who reads."""
    del spec
    return Watched(sequence_length, tokenizer.get_vocab_size())


def short(spec: Any, tokenizer: Any, sequence_length: int) -> Counting:
    """Samples that lack a token."""
    del spec
    return Counting(sequence_length - 1, tokenizer.get_vocab_size())


def beyond(spec: Any, tokenizer: Any, sequence_length: int) -> Counting:
    """Tokens that the vocabulary has not."""
    del spec
    return Counting(sequence_length, 10**6, start=250)


def nothing(spec: Any, tokenizer: Any, sequence_length: int) -> int:
    """No data set."""
    del spec, tokenizer
    return sequence_length
