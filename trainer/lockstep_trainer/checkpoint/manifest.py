"""What a checkpoint consists of, and the pointer to the newest one.

A **listing** is what the agents say they have uploaded; the leader puts the same facts beside the files as
``manifest.json`` and then swaps ``latest`` to it. Each document carries a version; what can't be read is Corrupt, never
guessed at.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from lockstep_api.messages import RestorePoint, StateId, Term
from lockstep_trainer.errors import Corrupt

MANIFEST = "manifest.json"
METADATA = ".metadata"
RANGES = "ranges-r"
"""What the names of files of ranges begin with."""
LATEST = "latest"
ANCESTORS = 8
"""Older states that ``latest`` names besides the newest: a manifest that can't be read can't name its parent."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Crc64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
"""CRC64NVME: what S3 checks end to end, and what those of parts combine to."""


class Document(BaseModel):
    """Base of the documents in the store: frozen, unknown fields refused, JSON with sorted keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        """The document's one byte form: its checksum is taken over this."""
        return self.model_dump_json(indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read it back; raises Corrupt, naming ``where`` it was found and what is wrong."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "its start"
            raise Corrupt(f"{where} can't be read at {place}: {first['msg']}") from None


class FileEntry(Document):
    """One file of a step folder."""

    name: str = Field(min_length=1, pattern=r"^[^/]+$")
    size: int = Field(ge=0)
    crc64nvme: Crc64


class Ranges(Document):
    """``ranges-r<rank>.json``: the pieces of a rank's files that a reader may ask for by themselves, one tensor shard
    each. They stand beside the files, so that the manifest does not grow with the number of tensors."""

    version: Literal[1] = 1
    files: dict[str, tuple[tuple[int, int, Crc64], ...]]  # name → (offset, length, checksum) of each, by offset


def ranges_file(rank: int) -> str:
    """The name of a rank's ranges."""
    return f"{RANGES}{rank}.json"


def ranges_of(name: str) -> str:
    """The file that has the ranges of the data file ``name``: ``__3_0.distcp`` is rank 3's."""
    return ranges_file(int(name.removeprefix("__").split("_", 1)[0]))


class Layout(Document):
    """How the GPUs were used by those who wrote it. Any other layout can load it."""

    world_size: int = Field(ge=1)
    replicate: int = Field(default=1, ge=1)
    shard: int = Field(default=1, ge=1)
    context: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)
    data_width: int = Field(default=1, ge=1)  # ranks that read different samples: one samples file each


class SourceState(Document):
    """One source of data, as the order of samples sees it."""

    name: str = Field(min_length=1)
    samples: int = Field(ge=0)  # training samples in one pass
    data: Sha256  # fingerprint of its tokens


class StageState(Document):
    """A mix of sources, from a global sample index on to the next stage."""

    first: int = Field(ge=0)
    weights: tuple[float, ...]  # of each source


class BatchState(Document):
    """Samples per step, from a step on to the next of these."""

    step: int = Field(ge=1)
    first: int = Field(ge=0)  # global index of the step's first sample
    samples: int = Field(ge=1)


class SamplerState(Document):
    """Where the order of samples stands: all that is needed to derive it again, from the first sample to the last."""

    seed: int
    steps: int = Field(ge=0)  # optimizer steps done
    drawn: int = Field(ge=0)  # samples that they consumed: the next global index
    sources: tuple[SourceState, ...] = Field(min_length=1)
    stages: tuple[StageState, ...] = ()  # none: the sources are shuffled together
    batches: tuple[BatchState, ...] = Field(min_length=1)
    data: Sha256  # fingerprint of tokenizer, tokens and packing

    def behind(self, step: int) -> SamplerState:
        """The state of the same run behind another step."""
        piece = [each for each in self.batches if each.step <= step + 1][-1]
        drawn = piece.first + (step + 1 - piece.step) * piece.samples
        return self.model_copy(update={"steps": step, "drawn": drawn})

    def changes(self, before: SamplerState) -> str:
        """What differs from the state ``before``, in words; empty where the order is the same.

        Steps done do not count.
        """
        found = []
        old, new = ({source.name: source for source in state.sources} for state in (before, self))
        found += [f"source {name} is gone" for name in old.keys() - new.keys()]
        found += [f"source {name} is new" for name in new.keys() - old.keys()]
        for name in old.keys() & new.keys():
            if old[name] != new[name]:
                found.append(f"source {name} had {old[name].samples} samples, and has {new[name].samples} now")
                if old[name].samples == new[name].samples:
                    found[-1] = f"source {name} has other tokens"
        if not found and [each.name for each in self.sources] != [each.name for each in before.sources]:
            found.append("the sources stand in another order")
        if self.data != before.data and not found:
            found.append("the tokenizer or the packing is another")
        if self.seed != before.seed:
            found.append(f"the seed was {before.seed}, and is {self.seed} now")
        if self.stages != before.stages:
            found.append("the weights or stages of the mix are others")
        if self.batches != before.batches:
            found.append("the number of samples per step is another")
        return "; ".join(sorted(found))


class Listing(Document):
    """A step folder that is whole, as its writers saw it."""

    version: Literal[2] = 2
    state: StateId
    parent: RestorePoint | None  # the state that it descends from; its samples files begin there
    files: tuple[FileEntry, ...]
    layout: Layout
    sampler: SamplerState
    versions: dict[str, str]  # of lockstep, torch, python
    verified: tuple[str, ...]  # checks that this state passed before it was written
    written_at: float  # Unix seconds
    seconds: float  # that training stood still for it
    model: dict[str, bool | int | float | str] | None = None
    """Fields of the architecture (``DecoderConfig``); None for a model of the user's own, and in older manifests."""
    agreed: int | None = None
    """The last step up to this state whose replay gave the same bits on all ranks; None where there was none. A state
    that is not beyond such a step is verified by it."""
    costs: tuple[float, ...] | None = Field(default=None, exclude_if=lambda costs: costs is None)
    """Of embedding, each layer and head (``Costs``), where they were measured and the pipeline was split by them. Where
    it is None it is not written: versions that do not know the field read what has no need of it."""

    @model_validator(mode="after")
    def _files_are_distinct(self) -> Self:
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError("a file is listed twice")
        return self

    @property
    def folder(self) -> str:
        """The step folder's key below the job's prefix."""
        return step_folder(self.state)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def file(self, name: str) -> FileEntry:
        """The entry of one file; raises Corrupt where it is not listed."""
        for file in self.files:
            if file.name == name:
                return file
        raise Corrupt(f"{self.folder} has no file {name} in its manifest")


class Manifest(Listing):
    """A committed step folder: ``manifest.json``, written last."""

    def point(self) -> RestorePoint:
        """Names this manifest, with its checksum."""
        return RestorePoint(
            state=self.state,
            manifest=f"{self.folder}/{MANIFEST}",
            sha256=hashlib.sha256(self.to_bytes()).hexdigest(),
        )


class Pointer(Document):
    """``latest``: the newest state of the job, and the term that may move it."""

    version: Literal[1] = 1
    sequence: int = Field(ge=1)  # counts the swaps
    epoch: int = Field(ge=0)
    generation: int = Field(ge=0)
    nonce: str = Field(min_length=1)
    point: RestorePoint | None  # None: fenced before the first checkpoint
    ancestors: tuple[RestorePoint, ...] = Field(default=(), max_length=ANCESTORS)  # newest first

    @property
    def term(self) -> Term:
        """Who wrote it."""
        return Term(self.epoch, self.generation)


def step_folder(state: StateId) -> str:
    """The key of a state's folder: ``step-40-e3-g1``."""
    return f"step-{state.step}-e{state.epoch}-g{state.generation}"


def parse_step_folder(name: str) -> StateId | None:
    """The state that a folder's name speaks of; None for any other name."""
    parts = name.split("-")
    if len(parts) != 4 or parts[0] != "step" or parts[2][:1] != "e" or parts[3][:1] != "g":
        return None
    numbers = (parts[1], parts[2][1:], parts[3][1:])
    if not all(number.isascii() and number.isdigit() for number in numbers):
        return None
    return StateId(*map(int, numbers))
