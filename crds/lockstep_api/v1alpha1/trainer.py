"""Lockstep's own trainer: model, data, recipe, and what happens beside the steps."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from lockstep_api.v1alpha1.base import Model, ModuleName, Uri, cel
from lockstep_api.v1alpha1.data import DataSource, DataSpec, TokenizerSpec, TokenizerTraining
from lockstep_api.v1alpha1.recipe import RecipeSpec


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

    module: str = Field(
        pattern=r"^(tensorboard|wandb|mlflow|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
        max_length=253,
        examples=["tensorboard", "wandb", "mlflow", "package.module:name"],
    )
    """A built-in one (tensorboard, wandb, mlflow), or your own class as package.module:name."""
    options: dict[str, int | float | bool | str] = Field(default_factory=dict, max_length=64)
    """Arguments of its constructor."""


class ExportSpec(Model):
    """The trained model for other tools, written after the last step."""

    uri: Uri
    """Folder that it is written into. A model that is there is replaced; it can't be model.initFrom."""
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
