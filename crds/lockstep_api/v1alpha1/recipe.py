"""How it is trained."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from lockstep_api.v1alpha1.base import Model, ModuleName, cel


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
    """Compile each block and the loss."""
    deterministic: bool = True
    """The same steps give the same bits, so that a recovered run is bitwise the undisturbed one; what has no such
    kernel is refused. On GPUs it costs some percent of speed, most of it in attention."""
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
