"""A data set of the user's own: ``data.module``.

``package.module:function`` is called as ``function(spec, tokenizer, sequence_length)`` with the job's ``DataSpec`` and
its ``tokenizers.Tokenizer``, and returns an object with

- ``__len__() -> int``: number of samples,
- ``__getitem__(i) -> ids``: ``sequence_length`` + 1 token ids of sample i, as a sequence, an array or a tensor; the
  same for the same i, whenever and in whichever process it is asked,
- ``fingerprint() -> str``, if it has one: changes when the data does. Without it, length and a few samples stand for
  it.

Lockstep shuffles the indices and deals them to the ranks. From the first step on one thread asks for all samples, those
of evaluations, too; it is not the one that called the function. The last ``holdout`` of the samples are only evaluated.
``data.sources`` are the object's to read, and what a tokenizer is trained on; packing and weights do not apply.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lockstep_api.v1alpha1 import DataSpec
from lockstep_trainer.data.packing import Windows
from lockstep_trainer.errors import UserError
from lockstep_trainer.modules import call, load_callable

MODULE = "module"
"""Name of the source that an own data set is."""


@dataclass(frozen=True, slots=True)
class ModuleParts:
    """An own data set, divided."""

    train: ModuleSamples
    holdout: ModuleSamples
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ModuleSamples:
    """Samples ``first`` … ``first + count − 1`` of a user's object."""

    data: Any
    name: str  # of data.module, for messages
    sequence_length: int
    vocabulary: int
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def windows(self, ids: NDArray[np.int64]) -> Windows:
        """These samples; raises UserError where one is not what the contract says."""
        tokens = np.empty((len(ids), self.sequence_length + 1), np.int64)
        for row, number in enumerate(ids.tolist()):
            sample = np.asarray(self.data[self.first + number])
            if sample.shape != tokens.shape[1:] or sample.dtype.kind not in "iu":
                raise UserError(
                    f"trainer.data.module: sample {self.first + number} of {self.name} has shape {sample.shape} and "
                    f"type {sample.dtype}; it must be sequenceLength + 1 = {self.sequence_length + 1} whole numbers"
                )
            tokens[row] = sample
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise UserError(
                f"trainer.data.module: {self.name} gave token {wrong}, and the vocabulary has {self.vocabulary}"
            )
        return Windows(tokens)

    def close(self) -> None:
        """Nothing to end."""


def open_module(spec: DataSpec, tokenizer: Tokenizer, vocabulary: int) -> ModuleParts:
    """The user's data set; raises UserError where it can't be imported, or is not what the contract says."""
    assert spec.module is not None
    function = load_callable(spec.module, "trainer.data.module")
    data = call(function, "trainer.data.module", spec, tokenizer, spec.sequence_length)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise UserError(
            f"trainer.data.module: {spec.module} returned a {type(data).__name__}; it must have __len__ and __getitem__"
        )
    total = len(data)
    held = round(total * spec.holdout)

    def part(first: int, count: int) -> ModuleSamples:
        return ModuleSamples(data, spec.module or "", spec.sequence_length, vocabulary, first, count)

    return ModuleParts(part(0, total - held), part(total - held, held), _fingerprint(data, spec, part(0, total)))


def _fingerprint(data: Any, spec: DataSpec, samples: ModuleSamples) -> str:
    digest = hashlib.sha256(f"{spec.module} {spec.holdout} {len(samples)}".encode())
    if hasattr(data, "fingerprint"):
        digest.update(str(data.fingerprint()).encode())
    elif len(samples):
        few = np.unique(np.linspace(0, len(samples) - 1, 8).astype(np.int64))
        digest.update(samples.windows(few).tokens.tobytes())
    return digest.hexdigest()
