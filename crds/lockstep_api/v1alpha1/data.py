"""What a model is trained on: tokenizer, sources, mix and packing."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from lockstep_api.v1alpha1.base import Model, ModuleName, Uri, cel


class TokenizerTraining(Model):
    """A tokenizer trained on the job's own data, the same in every pod."""

    kind: str = Field(default="bpe", pattern="^(bpe|unigram|bytes)$")
    """Algorithm: bpe (byte-level byte-pair encoding), unigram, or bytes (no training: a token is a byte)."""
    vocab_size: int = Field(default=32768, ge=260, le=1_000_000)
    """Number of tokens, the 256 bytes and the special tokens included; bytes has 257 whatever it says."""


class TokenizerSpec(Model):
    """Where the tokenizer comes from: exactly one of uri, train."""

    model_config = cel(("has(self.uri) != has(self.train)", "set exactly one of tokenizer.uri and tokenizer.train"))

    uri: Uri | None = None
    """A tokenizer.json in Hugging Face's format."""
    train: TokenizerTraining | None = None
    """Train one on the job's data."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.uri is None) == (self.train is None):
            raise ValueError("set exactly one of tokenizer.uri and tokenizer.train")
        return self


class DataSource(Model):
    """Documents of one kind."""

    name: str = Field(
        default="data",
        min_length=1,
        max_length=63,
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$",
        examples=["web", "code-2024.1"],
    )
    """Name in weights, metrics and reports; distinct among the sources."""
    uri: Uri
    """Files to read; ** and * are wildcards, for example file:///data/**/*.txt. {stdlib} stands for the folder of
    the Python standard library, a text that every machine has."""
    format: str = Field(default="auto", pattern="^(auto|text|jsonl|parquet|tokens)$")
    """What a file holds: text (one document), jsonl or parquet (a document per row), tokens (ids written by
    `lockstep data prepare`). auto goes by the file's ending. Text and jsonl may be compressed, as .gz or .zst."""
    field: str = Field(default="text", min_length=1, max_length=253)
    """Field or column with the text, in jsonl and parquet."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the samples that come from this source, relative to the other weights. Without weights each source has
    its share of the tokens. Set it for all sources or for none."""
    exclude: list[Annotated[str, StringConstraints(max_length=256)]] = Field(default_factory=list, max_length=64)
    """Patterns of paths to leave out."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Stop after so many bytes of files as they are stored, compressed or not (whole files, in sorted order)."""


class DataStage(Model):
    """A change of the mix on the way (curriculum)."""

    from_step: int = Field(ge=1)
    """First step of the stage."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1, max_length=64)
    """Weight of each source by name; a source that is left out has 0."""


_SAME_NAME = "give each source a name of its own: metrics and weights go by it"
_WEIGHTS = "give every source in data.sources a weight, or none"
_STAGES_ORDER = "fromStep of data.stages must rise from stage to stage"
_STAGES_NAMES = "the weights of data.stages must name sources of data.sources"
_STAGES_EMPTY = "each of data.stages needs a source with a weight above 0"
_OWN_DATA = "data.module has its own samples: leave weights, stages and packing out"


class DataSpec(Model):
    """What the model is trained on."""

    model_config = cel(
        ("self.sources.all(s, self.sources.exists_one(t, t.name == s.name))", _SAME_NAME),
        ("self.sources.all(s, has(s.weight)) || self.sources.all(s, !has(s.weight))", _WEIGHTS),
        (
            "!has(self.stages) || (self.stages.map(g, g.fromStep).isSorted() && "
            "self.stages.all(g, self.stages.exists_one(h, h.fromStep == g.fromStep)))",
            _STAGES_ORDER,
        ),
        (
            "!has(self.stages) || self.stages.all(g, g.weights.all(n, self.sources.exists(s, s.name == n)))",
            _STAGES_NAMES,
        ),
        ("!has(self.stages) || self.stages.all(g, g.weights.exists(n, g.weights[n] > 0.0))", _STAGES_EMPTY),
        (
            "!has(self.module) || (self.packing == 'concatenate' && self.sources.all(s, !has(s.weight)) && "
            "(!has(self.stages) || size(self.stages) == 0))",
            _OWN_DATA,
        ),
    )

    sources: list[DataSource] = Field(min_length=1, max_length=64)
    """Sources."""
    sequence_length: int = Field(default=2048, ge=8, le=1_048_576)
    """Tokens per sample."""
    holdout: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the documents, chosen by a hash, that are kept out of training and used to evaluate."""
    packing: str = Field(default="concatenate", pattern="^(concatenate|bestFit)$")
    """How documents fill samples: concatenate puts them end to end and cuts at the sample's length; bestFit cuts only
    documents that are longer than a sample, and pads what is left."""
    document_mask: bool = False
    """True: a token sees its own document only, and positions begin anew with each."""
    stages: list[DataStage] = Field(default_factory=list, max_length=32)
    """Changes of the mix, by step, ascending. Sources without weights begin with their share of the samples."""
    on_change: str = Field(default="Refuse", pattern="^(Refuse|Accept)$")
    """What is done when the data is not what the checkpoint was trained on: Refuse ends the job with a sentence, Accept
    goes on with the new data at the same global sample count. A checkpoint of another job may have had other data: it
    is only said, in status.progress.otherData."""
    module: ModuleName | None = None
    """Your own data set, as package.module:function; sources are given to it."""

    @model_validator(mode="after")
    def _mix_is_whole(self) -> Self:
        names = [source.name for source in self.sources]
        weighted = [source.weight is not None for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(_SAME_NAME)
        if any(weighted) and not all(weighted):
            raise ValueError(_WEIGHTS)
        steps = [stage.from_step for stage in self.stages]
        if sorted(set(steps)) != steps:
            raise ValueError(_STAGES_ORDER)
        if any(set(stage.weights) - set(names) for stage in self.stages):
            raise ValueError(_STAGES_NAMES)
        if not all(any(stage.weights.values()) for stage in self.stages):
            raise ValueError(_STAGES_EMPTY)
        if self.module and (self.packing != "concatenate" or any(weighted) or self.stages):
            raise ValueError(_OWN_DATA)
        return self
