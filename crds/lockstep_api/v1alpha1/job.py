"""The resource itself."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from lockstep_api import constants
from lockstep_api.v1alpha1.base import Model, cel
from lockstep_api.v1alpha1.checkpoint import CheckpointSpec
from lockstep_api.v1alpha1.parallelism import ParallelismSpec, elastic_rules, layout_rules
from lockstep_api.v1alpha1.resilience import CorruptionAction, ResilienceSpec, StragglerAction
from lockstep_api.v1alpha1.status import TrainingJobStatus
from lockstep_api.v1alpha1.trainer import TrainerSpec
from lockstep_api.v1alpha1.widths import obstacle


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


_UNCOMPARED = (
    "!has(self.resilience) || !has(self.resilience.corruption) || !has(self.resilience.corruption.action) || "
    "self.resilience.corruption.action == 'Off'"
)
_ONLY_TRAINER_COMPARES = (
    "resilience.corruption.action: only Lockstep's trainer can compare its steps; set it to Off with command"
)
_UNSWAPPED = (
    "!has(self.resilience) || !has(self.resilience.stragglers) || !has(self.resilience.stragglers.action) || "
    "self.resilience.stragglers.action != 'Swap'"
)
_ONLY_TRAINER_MEASURES = (
    "resilience.stragglers.action: only the ranks of Lockstep's trainer are measured; set it to Report with command"
)
_DETERMINISTIC = (
    "resilience.corruption.action: only what gives the same bits each time can be compared; set "
    "trainer.recipe.deterministic to true, or action to Off"
)
_IMMUTABLE = (
    "is immutable: running pods and the checkpoint's state were made for it; "
    "create another job, with checkpoint.resumeFrom"
)


class TrainingJobSpec(Model):
    """What is to run."""

    model_config = cel(
        ("has(self.trainer) != has(self.command)", "set exactly one of trainer and command"),
        *layout_rules(),
        *elastic_rules(),
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
        (f"has(self.trainer) || {_UNCOMPARED}", _ONLY_TRAINER_COMPARES),
        (f"has(self.trainer) || {_UNSWAPPED}", _ONLY_TRAINER_MEASURES),
        (
            f"!has(self.trainer) || {_UNCOMPARED} || !has(self.trainer.recipe.deterministic) || "
            "self.trainer.recipe.deterministic",
            _DETERMINISTIC,
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
    startup_deadline_seconds: int | None = Field(default=None, ge=1)
    """Fail the job when it has not finished a step so long after it was started or resumed, with the sentence of what
    it was waiting for. Without it the job waits."""
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
        self._check_elastic()
        compared = self.resilience.corruption.action is not CorruptionAction.OFF
        if self.trainer is None:
            if compared:
                raise ValueError(_ONLY_TRAINER_COMPARES)
            if self.resilience.stragglers.action is StragglerAction.SWAP:
                raise ValueError(_ONLY_TRAINER_MEASURES)
            return self
        if compared and not self.trainer.recipe.deterministic:
            raise ValueError(_DETERMINISTIC)
        if self.checkpoint is None:
            raise ValueError("checkpoint.uri is required with trainer: without it every fault would start from step 0")
        evaluation = self.trainer.evaluate
        if evaluation and not self.trainer.data.holdout and not evaluation.sources:
            raise ValueError(
                "trainer.evaluate needs held-out documents; set trainer.data.holdout, for example to 0.05, or "
                "trainer.evaluate.sources"
            )
        return self

    def _check_elastic(self) -> None:
        elastic = self.resilience.elastic
        if elastic is None:
            return
        fewest = elastic.min_nodes
        if fewest > self.nodes:
            raise ValueError(
                f"resilience.elastic.minNodes: {fewest} is more than nodes, {self.nodes}; choose fewer, or leave "
                "elastic out"
            )
        why = obstacle(self, fewest)
        if why is None:
            return
        fitting = [str(nodes) for nodes in range(1, min(self.nodes, 64) + 1) if obstacle(self, nodes) is None]
        ways = f"choose one of {', '.join(fitting)}" if fitting else "leave elastic out"
        raise ValueError(f"resilience.elastic.minNodes: the job can't train on {fewest} nodes: {why}; {ways}")

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
