"""The TrainingJob resource, v1alpha1.

This file is the one truth: the CRD, the chart's copy of it and the reference are generated from it, and operator,
trainer and command-line tool read manifests through it. Field names are camelCase on the wire and snake_case in
Python. A rule that joins several fields stands twice, beside each other: as CEL, for the API server, and as a
validator, for ``lockstep run`` and ``lockstep validate``; a test holds the two together.

A field appears here when something acts on it. Nothing is accepted and ignored: an unknown field is refused.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from lockstep_api import constants


class Model(BaseModel):
    """Base of every part of the resource: frozen, camelCase outside, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    def to_wire(self) -> dict[str, Any]:
        """The JSON form, camelCase, without fields that are null."""
        wire: dict[str, Any] = json.loads(self.model_dump_json(by_alias=True, exclude_none=True))
        return wire


def cel(*rules: tuple[str, str]) -> ConfigDict:
    """CEL rules of a model as (rule, message); a message that starts with ``'`` is a CEL expression itself."""
    return ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {"rule": rule, ("messageExpression" if message.startswith("'") else "message"): message}
                for rule, message in rules
            ]
        }
    )


Uri = Annotated[str, StringConstraints(pattern=r"^(s3|file)://.+", max_length=1024)]

# ------------------------------------------------------------------------------------------------ trainer


ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=253)]
"""``package.module:name``, importable in the trainer's container."""


class ModelSpec(Model):
    """Which model is trained: exactly one of preset, module."""

    model_config = cel(("has(self.preset) != has(self.module)", "set exactly one of model.preset and model.module"))

    preset: str | None = Field(default=None, min_length=1, max_length=63)
    """Name of a built-in architecture, for example llama-debug or llama3-1b."""
    module: ModuleName | None = None
    """Your own model, as package.module:function; the function builds it."""
    overrides: dict[str, int | float | bool | str] = Field(default_factory=dict, max_length=64)
    """Fields of the preset to change, for example {layers: 6}, or arguments of your function. Names are checked when
    the trainer starts."""
    init_from: Uri | None = None
    """Folder with a Hugging Face model (config.json, *.safetensors) whose weights a new job starts from."""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.preset is None) == (self.module is None):
            raise ValueError("set exactly one of model.preset and model.module")
        return self


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
        default="data", min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$"
    )
    """Name in weights, metrics and reports; distinct among the sources."""
    uri: Uri
    """Files to read; ** and * are wildcards, for example file:///data/**/*.txt. {stdlib} stands for the folder of
    the Python standard library, a text that every machine has."""
    format: str = Field(default="auto", pattern="^(auto|text|jsonl|parquet|tokens)$")
    """What a file holds: text (one document), jsonl or parquet (a document per row), tokens (ids written by
    `lockstep data prepare`). auto goes by the file's ending."""
    field: str = Field(default="text", min_length=1, max_length=253)
    """Field or column with the text, in jsonl and parquet."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the samples that come from this source, relative to the other weights. Without weights each source has
    its share of the tokens. Set it for all sources or for none."""
    exclude: list[Annotated[str, StringConstraints(max_length=256)]] = Field(default_factory=list, max_length=64)
    """Patterns of paths to leave out."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Stop after so many bytes of text (whole files, in sorted order)."""


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
    goes on with the new data at the same global sample count."""
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


class OptimizerSpec(Model):
    """AdamW, or Muon for matrices with AdamW for the rest."""

    name: str = Field(default="adamw", pattern="^(adamw|muon)$")
    """Algorithm: adamw or muon."""
    lr: float = Field(default=3e-4, gt=0, le=10)
    """Peak learning rate. Muon's updates are scaled to the size of AdamW's, so that one rate serves both."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of its running square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of muon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay."""
    no_decay: list[Annotated[str, StringConstraints(max_length=253)]] = Field(
        default_factory=lambda: ["*norm*", "*bias", "*embedding*"], max_length=64
    )
    """Patterns of parameter names without weight decay; vectors never have it."""
    module: ModuleName | None = None
    """Your own optimizer, as package.module:function, in place of name."""


class ScheduleSpec(Model):
    """Learning rate over the steps: linear warm-up, then a shape."""

    model_config = cel(
        ("!has(self.decay) || self.name == 'wsd'", "schedule.decay is for wsd only; leave it out, or choose wsd")
    )

    name: str = Field(default="cosine", pattern="^(cosine|linear|constant|wsd)$")
    """Shape after warm-up: cosine or linear down to the last step, constant, or wsd (stays, then falls at the end)."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    decay: int | None = Field(default=None, ge=1)
    """Steps of the fall at the end of wsd; a tenth of all steps without it."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step as a share of the peak."""

    @model_validator(mode="after")
    def _decay_of_wsd(self) -> Self:
        if self.decay is not None and self.name != "wsd":
            raise ValueError("schedule.decay is for wsd only; leave it out, or choose wsd")
        return self


class BatchRampSpec(Model):
    """A batch that grows in equal parts from a smaller one."""

    model_config = cel(
        (
            "self.increments <= self.steps",
            "batchRamp.increments: each part lasts a step or more; lower it, or raise steps",
        )
    )

    start_tokens: int = Field(ge=8)
    """Tokens of the first step. It and each part that is added are multiples of sequenceLength × data-parallel
    width."""
    steps: int = Field(ge=1)
    """Steps with smaller batches; the next one has globalBatchTokens."""
    increments: int = Field(default=8, ge=1, le=1024)
    """In how many parts it grows."""

    @model_validator(mode="after")
    def _steps_for_all_parts(self) -> Self:
        if self.increments > self.steps:
            raise ValueError("batchRamp.increments: each part lasts a step or more; lower it, or raise steps")
        return self


class RecipeSpec(Model):
    """How it is trained."""

    model_config = cel(
        (
            "self.schedule.warmup + (has(self.schedule.decay) ? self.schedule.decay : 0) <= self.steps",
            "recipe.schedule: warmup and decay take more than all steps of the recipe; lower one of them",
        ),
        (
            "!has(self.batchRamp) || self.batchRamp.startTokens < self.globalBatchTokens",
            "recipe.batchRamp.startTokens is no smaller batch than globalBatchTokens; lower it, or leave batchRamp out",
        ),
        (
            "!has(self.batchRamp) || self.batchRamp.steps < self.steps",
            "recipe.batchRamp.steps: the whole batch would never be reached; choose fewer than the recipe's steps",
        ),
    )

    steps: int = Field(ge=1, le=100_000_000)
    """Optimizer steps."""
    global_batch_tokens: int = Field(default=524_288, ge=8)
    """Tokens per step over all GPUs; a multiple of sequenceLength × data-parallel width."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples of one forward pass of a data-parallel rank; gradients are accumulated over the rest. Without it: with
    pipeline 1, else as many as 8,192 tokens hold."""
    batch_ramp: BatchRampSpec | None = None
    """Smaller batches at the start."""
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    """Optimizer."""
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    """Learning-rate schedule."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 turns clipping off."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the square of the log of the softmax's denominator, added to the loss (PaLM: 1e-4)."""
    loss: ModuleName | None = None
    """Your own loss, as package.module:function, in place of cross entropy."""
    precision: str = Field(default="bf16", pattern="^(bf16|fp32|float8)$")
    """Precision of parameters and activations in forward and backward; the optimizer works in fp32. float8 is bf16
    with matrix products in float8, on GPUs that have it."""
    activation_checkpointing: str = Field(default="none", pattern="^(none|selective|full)$")
    """What is recomputed in the backward pass instead of kept: nothing, all but matrix products and attention, or
    whole blocks."""
    compile: bool = False
    """Compile each block."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Seed of weights and of the order of samples."""

    @model_validator(mode="after")
    def _fits_the_steps(self) -> Self:
        if self.schedule.warmup + (self.schedule.decay or 0) > self.steps:
            raise ValueError(
                "recipe.schedule: warmup and decay take more than all steps of the recipe; lower one of them"
            )
        if self.batch_ramp is None:
            return self
        if self.batch_ramp.start_tokens >= self.global_batch_tokens:
            raise ValueError(
                "recipe.batchRamp.startTokens is no smaller batch than globalBatchTokens; lower it, or leave batchRamp "
                "out"
            )
        if self.batch_ramp.steps >= self.steps:
            raise ValueError(
                "recipe.batchRamp.steps: the whole batch would never be reached; choose fewer than the recipe's steps"
            )
        return self


_SAME_EVALUATED = "evaluate.sources need names of their own, other than those of data.sources"
_WEIGHT_EVALUATED = "evaluate.sources have no weight: each is evaluated by itself"


class EvaluateSpec(Model):
    """Loss on held-out documents, in all and per source."""

    model_config = cel(("!has(self.sources) || self.sources.all(s, !has(s.weight))", _WEIGHT_EVALUATED))

    every: int = Field(default=1000, ge=1)
    """Steps between evaluations; the last step is always evaluated."""
    batches: int = Field(default=8, ge=1, le=10_000)
    """Batches of the global size that one evaluation reads of each source; at most all the held-out text."""
    sources: list[DataSource] = Field(default_factory=list, max_length=64)
    """Sources that are only evaluated, besides the held-out part of data.sources."""

    @model_validator(mode="after")
    def _sources_have_no_weight(self) -> Self:
        if any(source.weight is not None for source in self.sources):
            raise ValueError(_WEIGHT_EVALUATED)
        return self


class GenerateSpec(Model):
    """Text written by the model at the end of the run, kept in the run's journal."""

    prompt: str = Field(default="", max_length=4096)
    """Text to go on from."""
    tokens: int = Field(default=128, ge=1, le=4096)
    """Tokens to generate."""
    temperature: float = Field(default=0.8, ge=0, le=10)
    """0 takes the likeliest token each time."""


class CallbackSpec(Model):
    """Something that is told how training goes."""

    module: str = Field(pattern=r"^(tensorboard|wandb|mlflow|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$", max_length=253)
    """A built-in one (tensorboard, wandb, mlflow), or your own class as package.module:name."""
    options: dict[str, int | float | bool | str] = Field(default_factory=dict, max_length=64)
    """Arguments of its constructor."""


class ExportSpec(Model):
    """The trained model for other tools, written after the last step."""

    uri: Uri
    """Folder that it is written into."""
    format: str = Field(default="huggingface", pattern="^huggingface$")
    """huggingface: config.json, tokenizer.json and *.safetensors that `transformers` loads."""


class TrainerSpec(Model):
    """Lockstep's own trainer."""

    model_config = cel(
        (
            "!has(self.evaluate) || !has(self.evaluate.sources) || self.evaluate.sources.all(s, "
            "self.evaluate.sources.exists_one(t, t.name == s.name) && !self.data.sources.exists(t, t.name == s.name))",
            _SAME_EVALUATED,
        )
    )

    model: ModelSpec
    """Architecture."""
    tokenizer: TokenizerSpec = Field(default_factory=lambda: TokenizerSpec(train=TokenizerTraining()))
    """Tokenizer."""
    data: DataSpec
    """Data."""
    recipe: RecipeSpec
    """Recipe."""
    evaluate: EvaluateSpec | None = None
    """Evaluation on held-out documents; needs data.holdout or evaluate.sources."""
    generate: GenerateSpec | None = None
    """Sample of text at the end."""
    callbacks: list[CallbackSpec] = Field(default_factory=list, max_length=16)
    """Trackers, and your own callbacks."""
    export: ExportSpec | None = None
    """Export at the end."""

    @model_validator(mode="after")
    def _evaluated_sources_are_told_apart(self) -> Self:
        evaluated = [source.name for source in self.evaluate.sources] if self.evaluate else []
        if len(set(evaluated)) < len(evaluated) or set(evaluated) & {source.name for source in self.data.sources}:
            raise ValueError(_SAME_EVALUATED)
        return self


# ------------------------------------------------------------------------------------------- parallelism


class ParallelismSpec(Model):
    """How the GPUs are used: replicate × shard × context × tensor × pipeline of them. What the other degrees leave is
    sharded data parallelism (FSDP)."""

    replicate: int = Field(default=1, ge=1, le=1_048_576)
    """Copies of the sharded model (hybrid sharding)."""
    shard: int | None = Field(default=None, ge=1, le=1_048_576)
    """Ranks that share one copy of the weights (FSDP). Without it: what the other degrees leave."""
    tensor: int = Field(default=1, ge=1, le=64)
    """Ranks that share each matrix product, and the sequence between them (tensor and sequence parallel)."""
    pipeline: int = Field(default=1, ge=1, le=1024)
    """Ranks that share the layers."""
    context: int = Field(default=1, ge=1, le=1024)
    """Ranks that share a sequence in attention too (context parallel)."""
    expert: int = Field(default=1, ge=1, le=1_048_576)
    """Ranks that share the experts of a layer; taken from shard × context × tensor, not from the GPUs."""
    schedule: str = Field(
        default="1F1B",
        pattern="^(GPipe|1F1B|Interleaved1F1B|LoopedBFS|InterleavedZeroBubble|ZBVZeroBubble|DualPipeV)$",
    )
    """Order of the pipeline's work: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble or
    DualPipeV."""
    stages_per_rank: int | None = Field(default=None, ge=1, le=64)
    """Pieces of the model on each pipeline rank, with an interleaved schedule; 2 without it."""
    split: str = Field(default="modelled", pattern="^(modelled|measured|count)$")
    """How layers are given to stages: by computed cost, by cost measured at start, or by count."""
    context_method: str = Field(default="allGather", pattern="^(allGather|ulysses)$")
    """How attention crosses ranks: keys and values are gathered (allGather), or heads are exchanged (ulysses)."""


# -------------------------------------------------------------------------------------------- checkpoint


class SecretReference(Model):
    """A Secret in the job's namespace."""

    name: str = Field(min_length=1, max_length=253)
    """Name of the Secret; keys accessKeyId and secretAccessKey."""


class S3Spec(Model):
    """How the object store is reached."""

    endpoint: str | None = Field(default=None, max_length=1024)
    """URL of an S3 server that is not AWS."""
    region: str = Field(default="us-east-1", max_length=63)
    """Region."""
    path_style: bool = False
    """Bucket in the path and not in the host name."""
    secret_ref: SecretReference | None = None
    """Credentials; without it the pod's own identity is used."""


class KeepSpec(Model):
    """Which checkpoints stay. The newest verified one always does."""

    last: int = Field(default=3, ge=1, le=10_000)
    """The newest so many."""


class CheckpointSpec(Model):
    """Durable checkpoints."""

    uri: Uri
    """Bucket and prefix (s3://…), or a folder that all pods share (file://…)."""
    every: int = Field(default=1000, ge=1)
    """Steps between checkpoints; the last step always gets one."""
    keep: KeepSpec = Field(default_factory=KeepSpec)
    """Retention."""
    resume_from: Uri | None = None
    """A manifest.json of another job to start from. Without it a new job starts fresh."""
    s3: S3Spec = Field(default_factory=S3Spec)
    """Object store."""


# -------------------------------------------------------------------------------------------- resilience


class BudgetsSpec(Model):
    """How often each rung of the recovery ladder may be used before a fault goes a rung up, and at last fails the
    job. A budget is full again once a checkpoint newer than the fault is durable."""

    process: int = Field(default=10, ge=0)
    """Restarts of worker processes."""
    pod: int = Field(default=5, ge=0)
    """Replacements of pods."""


class HangSpec(Model):
    """When missing progress counts as a hang."""

    factor: float = Field(default=5.0, ge=1.5)
    """Times the median step."""
    minimum_seconds: float = Field(default=60, ge=1)
    """Never sooner than this."""
    first_step_seconds: float = Field(default=1800, ge=1)
    """Bound for the time from start to the first step: compilation, restore, data."""


class RetryAction(StrEnum):
    """What an exit code means."""

    RESTART = "Restart"
    """Take the ladder, as for any fault."""
    FAIL = "Fail"
    """The user's error: the job fails at once."""


class RetryRule(Model):
    """What is done when a worker exits with one of these codes; the first rule that matches counts."""

    exit_codes: list[Annotated[int, Field(ge=1, le=255)]] = Field(min_length=1, max_length=64)
    """Exit codes."""
    action: RetryAction
    """Action."""


class ResilienceSpec(Model):
    """What is done when something breaks."""

    budgets: BudgetsSpec = Field(default_factory=BudgetsSpec)
    """Budgets per rung."""
    retry: list[RetryRule] = Field(default_factory=list, max_length=32)
    """Rules on exit codes."""
    hang: HangSpec = Field(default_factory=HangSpec)
    """Hang detection."""
    rejoin_grace_seconds: float = Field(default=5, ge=0.1, le=3600)
    """How long a member without a stream may take to come back once steps have stopped."""
    leader_deadline_seconds: float = Field(default=60, ge=1, le=3600)
    """How long the leader may be silent when only one witness says so; with two it is 5 s."""


# -------------------------------------------------------------------------------------------------- spec


class PodTemplate(Model):
    """core/v1 PodTemplateSpec. The container named ``trainer`` runs the agent. The API server checks its fields
    when the first pod is created, and what it refuses is said in the job's condition."""

    model_config = ConfigDict(
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}, extra="allow", frozen=True
    )

    metadata: dict[str, Any] = Field(default_factory=dict)
    """Labels and annotations for the pods."""
    spec: dict[str, Any] = Field(default_factory=dict)
    """core/v1 PodSpec: image, resources, volumes, nodeSelector, tolerations, serviceAccountName and so on."""


_IMMUTABLE = (
    "is immutable: running pods and the checkpoint's state were made for it; "
    "create another job, with checkpoint.resumeFrom"
)


_GPUS = "self.nodes * self.gpusPerNode"
_NAMED = "self.parallelism.replicate * self.parallelism.tensor * self.parallelism.pipeline * self.parallelism.context"
_MODEL_WIDTH = "self.parallelism.tensor * self.parallelism.pipeline * self.parallelism.context"  # GPUs of one sample


def _layout_rules() -> tuple[tuple[str, str], ...]:
    """Rules on the degrees of parallelism and the batch. ``Layout`` in the trainer has those that need the model."""
    unit = f"self.trainer.data.sequenceLength * ({_GPUS} / ({_MODEL_WIDTH}))"
    return (
        (
            f"({_GPUS}) % ({_NAMED}) == 0",
            f"'parallelism: replicate × tensor × pipeline × context = %d does not divide the %d GPUs of this job "
            f"(nodes × gpusPerNode); choose degrees whose product does'.format([{_NAMED}, {_GPUS}])",
        ),
        (
            # By division: the product of all degrees may be too large for an integer.
            f"!has(self.parallelism.shard) || ({_GPUS}) % ({_NAMED}) != 0 || "
            f"self.parallelism.shard == {_GPUS} / ({_NAMED})",
            f"'parallelism.shard: with the other degrees it makes %d GPUs, and this job has %d; leave it out to take "
            f"what is left'.format([self.parallelism.shard * {_NAMED}, {_GPUS}])",
        ),
        (
            f"({_GPUS}) / (self.parallelism.replicate * self.parallelism.pipeline) % self.parallelism.expert == 0",
            f"'parallelism.expert: %d does not divide shard × context × tensor = %d; choose a divisor'"
            f".format([self.parallelism.expert, {_GPUS} / (self.parallelism.replicate * self.parallelism.pipeline)])",
        ),
        (
            "self.gpusPerNode % self.parallelism.tensor == 0 || self.parallelism.tensor % self.gpusPerNode == 0",
            "'parallelism.tensor: %d neither divides gpusPerNode %d nor is a multiple of it: its groups would "
            "straddle nodes'.format([self.parallelism.tensor, self.gpusPerNode])",
        ),
        (
            "!has(self.trainer) || self.trainer.data.sequenceLength % "
            "(self.parallelism.tensor * self.parallelism.context * (self.parallelism.context > 1 ? 2 : 1)) == 0",
            "'trainer.data.sequenceLength: %d is not a multiple of tensor × context (× 2 with context) = %d; choose "
            "one'.format([self.trainer.data.sequenceLength, self.parallelism.tensor * self.parallelism.context * "
            "(self.parallelism.context > 1 ? 2 : 1)])",
        ),
        (
            f"!has(self.trainer) || ({_GPUS}) % ({_NAMED}) != 0 || "
            f"self.trainer.recipe.globalBatchTokens % ({unit}) == 0",
            f"'trainer.recipe.globalBatchTokens: %d is not a multiple of sequenceLength × data-parallel width = %d; "
            f"choose a multiple'.format([self.trainer.recipe.globalBatchTokens, {unit}])",
        ),
        (
            f"!has(self.trainer) || !has(self.trainer.recipe.batchRamp) || ({_GPUS}) % ({_NAMED}) != 0 || "
            f"(self.trainer.recipe.batchRamp.startTokens % ({unit}) == 0 && "
            "(self.trainer.recipe.globalBatchTokens - self.trainer.recipe.batchRamp.startTokens) % "
            f"(self.trainer.recipe.batchRamp.increments * ({unit})) == 0)",
            "'trainer.recipe.batchRamp: startTokens and each of the parts up to globalBatchTokens must be multiples of "
            f"sequenceLength × data-parallel width = %d; change startTokens or increments'.format([{unit}])",
        ),
    )


class TrainingJobSpec(Model):
    """What is to run."""

    model_config = cel(
        ("has(self.trainer) != has(self.command)", "set exactly one of trainer and command"),
        *_layout_rules(),
        (
            "!has(self.trainer) || !has(self.trainer.evaluate) || self.trainer.data.holdout > 0.0 || "
            "(has(self.trainer.evaluate.sources) && size(self.trainer.evaluate.sources) > 0)",
            "trainer.evaluate needs held-out documents; set trainer.data.holdout, for example to 0.05, or "
            "trainer.evaluate.sources",
        ),
        (
            "!has(self.trainer) || has(self.checkpoint)",
            "checkpoint.uri is required with trainer: without it every fault would start from step 0",
        ),
        *(
            (
                f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
                f"{field} {_IMMUTABLE}",
            )
            for field in ("trainer", "command", "parallelism", "checkpoint", "resilience", "template", "managedBy")
        ),
        *((f"self.{field} == oldSelf.{field}", f"{field} {_IMMUTABLE}") for field in ("nodes", "gpusPerNode")),
    )

    nodes: int = Field(ge=1, le=16_384)
    """Slots: pods that train."""
    gpus_per_node: int = Field(ge=1, le=64)
    """GPUs, and worker processes, of each pod."""
    spares: int = Field(default=0, ge=0, le=1024)
    """Warm pods beyond nodes that take a lost member's slot."""
    parallelism: ParallelismSpec = Field(default_factory=ParallelismSpec)
    """Layout of the GPUs."""
    trainer: TrainerSpec | None = None
    """Lockstep's own trainer. Exactly one of trainer and command."""
    command: list[Annotated[str, StringConstraints(max_length=4096)]] | None = Field(
        default=None, min_length=1, max_length=256
    )
    """Any script written for torchrun, one process per GPU, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT and PET_*. Exactly one of trainer and command."""
    checkpoint: CheckpointSpec | None = None
    """Durable checkpoints; required with trainer."""
    resilience: ResilienceSpec = Field(default_factory=ResilienceSpec)
    """Faults."""
    template: PodTemplate = Field(default_factory=PodTemplate)
    """Pod template."""
    suspend: bool = False
    """True deletes the pods and keeps the checkpoints; false goes on from the newest."""
    managed_by: str = Field(default=constants.MANAGED_BY, max_length=63)
    """Which controller serves this job; another value makes this operator leave it alone."""
    active_deadline_seconds: int | None = Field(default=None, ge=1)
    """Fail the job when it has run this long, time in suspension left out."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0)
    """Delete the job so long after its end. Without it the job stays."""

    @model_validator(mode="after")
    def _cross_field(self) -> Self:
        gpus = self.nodes * self.gpus_per_node
        if (self.trainer is None) == (self.command is None):
            raise ValueError("set exactly one of trainer and command")
        self._check_layout(gpus)
        if self.trainer is None:
            return self
        if self.checkpoint is None:
            raise ValueError("checkpoint.uri is required with trainer: without it every fault would start from step 0")
        evaluation = self.trainer.evaluate
        if evaluation and not self.trainer.data.holdout and not evaluation.sources:
            raise ValueError(
                "trainer.evaluate needs held-out documents; set trainer.data.holdout, for example to 0.05, or "
                "trainer.evaluate.sources"
            )
        return self

    def _check_layout(self, gpus: int) -> None:
        layout = self.parallelism
        model_width = layout.tensor * layout.pipeline * layout.context
        named = layout.replicate * model_width
        if gpus % named:
            raise ValueError(
                f"parallelism: replicate × tensor × pipeline × context = {named} does not divide the {gpus} GPUs of "
                "this job (nodes × gpusPerNode); choose degrees whose product does"
            )
        if layout.shard is not None and layout.shard * named != gpus:
            raise ValueError(
                f"parallelism.shard: with the other degrees it makes {layout.shard * named} GPUs, and this job has "
                f"{gpus}; leave it out to take what is left"
            )
        inner = gpus // (layout.replicate * layout.pipeline)
        if inner % layout.expert:
            raise ValueError(
                f"parallelism.expert: {layout.expert} does not divide shard × context × tensor = {inner}; "
                "choose a divisor"
            )
        if self.gpus_per_node % layout.tensor and layout.tensor % self.gpus_per_node:
            raise ValueError(
                f"parallelism.tensor: {layout.tensor} neither divides gpusPerNode {self.gpus_per_node} nor is a "
                "multiple of it: its groups would straddle nodes"
            )
        if self.trainer is None:
            return
        pieces = layout.tensor * layout.context * (2 if layout.context > 1 else 1)
        if self.trainer.data.sequence_length % pieces:
            raise ValueError(
                f"trainer.data.sequenceLength: {self.trainer.data.sequence_length} is not a multiple of tensor × "
                f"context (× 2 with context) = {pieces}; choose one"
            )
        unit = self.trainer.data.sequence_length * (gpus // model_width)
        if self.trainer.recipe.global_batch_tokens % unit:
            raise ValueError(
                f"trainer.recipe.globalBatchTokens: {self.trainer.recipe.global_batch_tokens} is not a multiple of "
                f"sequenceLength × data-parallel width = {unit}; choose a multiple"
            )
        ramp = self.trainer.recipe.batch_ramp
        if ramp is None:
            return
        growth = self.trainer.recipe.global_batch_tokens - ramp.start_tokens
        if ramp.start_tokens % unit or growth % (ramp.increments * unit):
            raise ValueError(
                "trainer.recipe.batchRamp: startTokens and each of the parts up to globalBatchTokens must be multiples "
                f"of sequenceLength × data-parallel width = {unit}; change startTokens or increments"
            )


# ------------------------------------------------------------------------------------------------ status


class Phase(StrEnum):
    """One word for where the job stands."""

    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended for good."""
        return self in (Phase.SUCCEEDED, Phase.FAILED)


class StatusModel(Model):
    """Base of the status: like Model, but fields of a newer operator are passed over."""

    model_config = ConfigDict(extra="ignore")


class Condition(StatusModel):
    """metav1.Condition."""

    type: str
    """Type in CamelCase."""
    status: str = Field(pattern="^(True|False|Unknown)$")
    """True, False or Unknown."""
    reason: str = ""
    """Reason in CamelCase."""
    message: str = ""
    """A sentence."""
    last_transition_time: str
    """RFC 3339 time at which status changed."""
    observed_generation: int | None = None
    """metadata.generation that it speaks of."""


class Members(StatusModel):
    """Pods by role."""

    ready: int = 0
    """Members that hold a slot in the current epoch and are connected."""
    spares: int = 0
    """Warm spares."""
    starting: int = 0
    """Pods that are not up yet."""


class Progress(StatusModel):
    """How far training is."""

    step: int = 0
    """Optimizer steps done."""
    steps: int | None = None
    """Steps in all."""
    tokens: int = 0
    """Tokens trained on, recomputed ones left out."""
    loss: float | None = None
    """Mean training loss of the last step, in nats per token."""
    eval_loss: float | None = None
    """Loss on held-out files, in nats per token."""
    tokens_per_second: float | None = None
    """Over the last steps."""
    mfu: float | None = None
    """Model FLOPs utilisation of the last step, 0 to 1: the model's own FLOPs as a share of the GPUs' peak."""
    at: str | None = None
    """When this was seen, RFC 3339."""


class DurableCheckpoint(StatusModel):
    """The newest checkpoint that a fault can't take away."""

    step: int
    """Step."""
    uri: str
    """Its manifest."""
    at: str
    """When it was committed, RFC 3339."""


class CheckpointStatus(StatusModel):
    """Checkpoints."""

    durable: DurableCheckpoint | None = None
    """Newest durable one."""


class Restarts(StatusModel):
    """Restarts by rung, over the life of the job."""

    process: int = 0
    """Worker processes started again in their pod."""
    container: int = 0
    """Containers started again in place by the kubelet."""
    spare: int = 0
    """Slots taken by a spare."""
    pod: int = 0
    """Pods replaced."""
    total: int = 0
    """All of them."""


class BudgetsUsed(StatusModel):
    """Uses of each budget since the last durable checkpoint beyond a fault."""

    process: int = 0
    pod: int = 0


class Fault(StatusModel):
    """One fault and what it cost."""

    at: str
    """When it was noticed, RFC 3339."""
    epoch: int = 0
    """Epoch in which it happened."""
    generation: int = 0
    """Generation that it ended."""
    cause: str
    """WorkerExited, AgentLost, PodLost, NodeLost, Hang, StoreLost, LeaderLost …"""
    rung: str
    """process, container, spare or pod."""
    node: str | None = None
    """Kubernetes node."""
    pod: str | None = None
    """Pod."""
    rank: int | None = None
    """Global rank of the worker that failed first."""
    exit_code: int | None = None
    """Exit code, or minus the signal."""
    witness: str = ""
    """Who noticed: exit, stream, heartbeat, podStatus, nodeCondition, progress."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds per part of the recovery: detect, decide, restart, restore, recompute."""
    steps_lost: int | None = None
    """Steps that had to be computed again."""
    log_tail: list[str] = Field(default_factory=list)
    """Last lines of the worker's output."""


class LedgerState(StatusModel):
    """What the operator must remember to go on with the ledger; the ledger itself is in status.ledger."""

    at: float = 0
    """Unix seconds up to which pods' time is accounted for; 0: nothing yet."""
    base: dict[str, float] = Field(default_factory=dict)
    """GPU-seconds by class: closed epochs, and time outside membership."""
    member_seconds: float = 0
    """GPU-seconds that this epoch's members held."""
    leader: dict[str, float] = Field(default_factory=dict)
    """This epoch's newest totals from the leader, GPU-seconds by class."""


class TrainingJobStatus(StatusModel):
    """What is."""

    observed_generation: int | None = None
    """metadata.generation that this status speaks of."""
    phase: Phase | None = None
    """One word."""
    conditions: list[Condition] = Field(
        default_factory=list,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    """metav1 conditions: Ready, Suspended, CheckpointDegraded, Succeeded, Failed."""
    epoch: int = 0
    """Number of the current membership; raised at each change."""
    slot_map_hash: str | None = None
    """Hash of the current membership: which pod holds which slot."""
    slots: dict[str, str] = Field(default_factory=dict)
    """Slot → name of the pod that holds it in this epoch."""
    ready: str | None = None
    """Members ready, as ready/nodes, for kubectl."""
    step: str | None = None
    """Step, as step/steps, for kubectl."""
    loss: str | None = None
    """Training loss of the last step, in nats per token, for kubectl."""
    members: Members = Field(default_factory=Members)
    """Pods by role."""
    progress: Progress = Field(default_factory=Progress)
    """Progress."""
    checkpoint: CheckpointStatus = Field(default_factory=CheckpointStatus)
    """Checkpoints."""
    goodput: float | None = None
    """Share of GPU time that was productive, queued and suspended time left out."""
    goodput_percent: str | None = None
    """The same for kubectl."""
    ledger: dict[str, float] = Field(default_factory=dict)
    """GPU-seconds by class."""
    ledger_state: LedgerState = Field(default_factory=LedgerState)
    """For the operator's own use."""
    restarts: Restarts = Field(default_factory=Restarts)
    """Restarts by rung."""
    budgets_used: BudgetsUsed = Field(default_factory=BudgetsUsed)
    """Budget in use."""
    incarnations: dict[str, int] = Field(default_factory=dict)
    """Ordinal → incarnation of its newest pod, where that is not 0: names are never used twice."""
    faults: list[Fault] = Field(default_factory=list)
    """The last ten."""
    fault_cursor: str = "0/0"
    """epoch/generation of the newest fault that was counted: none is counted twice."""
    start_time: str | None = None
    """When the operator first acted on the job, RFC 3339."""
    completion_time: str | None = None
    """When it ended, RFC 3339."""
    active_since: str | None = None
    """Start of the current stretch outside suspension, RFC 3339."""
    active_seconds: float = 0
    """Active time of earlier stretches."""


_NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
_NAME_LIMIT = 48
"""Pods are <name>-<ordinal>-<incarnation> and their names are DNS labels of at most 63 characters."""
_NAME_TOO_LONG = (
    f"metadata.name may have at most {_NAME_LIMIT} characters: pods are named after it; choose a shorter one"
)
_NAME_WRONG = (
    "metadata.name must be lower-case letters, digits and hyphens, and start with a letter: a Service is named after it"
)


class TrainingJob(Model):
    """A distributed training run: pods that train one model together, kept running through faults."""

    model_config = ConfigDict(
        extra="ignore",
        **cel(
            (
                f"self.metadata.name.size() <= {_NAME_LIMIT}",
                _NAME_TOO_LONG,
            ),
            (
                f"self.metadata.name.matches('{_NAME_PATTERN}')",
                _NAME_WRONG,
            ),
        ),
    )

    api_version: str = constants.API_VERSION
    kind: str = constants.KIND
    metadata: dict[str, Any]
    spec: TrainingJobSpec
    status: TrainingJobStatus = Field(default_factory=TrainingJobStatus)

    @property
    def name(self) -> str:
        """metadata.name."""
        return str(self.metadata["name"])

    @property
    def namespace(self) -> str:
        """metadata.namespace, ``default`` where there is none."""
        return str(self.metadata.get("namespace") or "default")

    @property
    def uid(self) -> str:
        """metadata.uid."""
        return str(self.metadata["uid"])

    @property
    def generation(self) -> int:
        """metadata.generation."""
        return int(self.metadata.get("generation", 1))

    @model_validator(mode="after")
    def _name_fits(self) -> Self:
        name = str(self.metadata.get("name", ""))
        if len(name) > _NAME_LIMIT:
            raise ValueError(_NAME_TOO_LONG)
        if not re.fullmatch(_NAME_PATTERN, name):
            raise ValueError(_NAME_WRONG)
        return self
