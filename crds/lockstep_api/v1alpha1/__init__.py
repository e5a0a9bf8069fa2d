"""The TrainingJob resource, v1alpha1.

These files are the one truth: the CRD, the chart's copy of it and the reference are generated from them, and operator,
trainer and command-line tool read manifests through them. Field names are camelCase on the wire and snake_case in
Python. A rule that joins several fields stands twice, beside each other: as CEL, for the API server, and as a
validator, for ``lockstep run`` and ``lockstep validate``; a test holds the two together.

A field appears here when something acts on it. Nothing is accepted and ignored: an unknown field is refused.
"""

from __future__ import annotations

from lockstep_api.v1alpha1.base import Model, ModuleName, Uri
from lockstep_api.v1alpha1.checkpoint import (
    CheckpointSpec,
    KeepSpec,
    MemorySpec,
    Quantity,
    S3Spec,
    SecretReference,
    StepsOrAuto,
)
from lockstep_api.v1alpha1.data import DataSource, DataSpec, DataStage, TokenizerSpec, TokenizerTraining
from lockstep_api.v1alpha1.job import PodTemplate, TrainingJob, TrainingJobSpec
from lockstep_api.v1alpha1.parallelism import ParallelismSpec
from lockstep_api.v1alpha1.recipe import BatchRampSpec, OptimizerSpec, RecipeSpec, ScheduleSpec
from lockstep_api.v1alpha1.resilience import (
    BudgetsSpec,
    CorruptionAction,
    CorruptionSpec,
    ElasticSpec,
    HangSpec,
    NodesSpec,
    Preflight,
    ResilienceSpec,
    RetryAction,
    RetryRule,
    SentinelAction,
    SentinelsSpec,
    StragglerAction,
    StragglersSpec,
)
from lockstep_api.v1alpha1.status import (
    BudgetsUsed,
    CheckpointInterval,
    CheckpointStatus,
    Condition,
    DurableCheckpoint,
    ElasticStatus,
    ExcludedNode,
    Fault,
    Injection,
    LedgerState,
    Members,
    MemorySnapshot,
    Phase,
    Progress,
    Restarts,
    StatusModel,
    TrainingJobStatus,
    Verdict,
)
from lockstep_api.v1alpha1.trainer import CallbackSpec, EvaluateSpec, ExportSpec, GenerateSpec, ModelSpec, TrainerSpec

__all__ = [
    "BatchRampSpec",
    "BudgetsSpec",
    "BudgetsUsed",
    "CallbackSpec",
    "CheckpointInterval",
    "CheckpointSpec",
    "CheckpointStatus",
    "Condition",
    "CorruptionAction",
    "CorruptionSpec",
    "DataSource",
    "DataSpec",
    "DataStage",
    "DurableCheckpoint",
    "ElasticSpec",
    "ElasticStatus",
    "EvaluateSpec",
    "ExcludedNode",
    "ExportSpec",
    "Fault",
    "GenerateSpec",
    "HangSpec",
    "Injection",
    "KeepSpec",
    "LedgerState",
    "Members",
    "MemorySnapshot",
    "MemorySpec",
    "Model",
    "ModelSpec",
    "ModuleName",
    "NodesSpec",
    "OptimizerSpec",
    "ParallelismSpec",
    "Phase",
    "PodTemplate",
    "Preflight",
    "Progress",
    "Quantity",
    "RecipeSpec",
    "ResilienceSpec",
    "Restarts",
    "RetryAction",
    "RetryRule",
    "S3Spec",
    "ScheduleSpec",
    "SecretReference",
    "SentinelAction",
    "SentinelsSpec",
    "StatusModel",
    "StepsOrAuto",
    "StragglerAction",
    "StragglersSpec",
    "TokenizerSpec",
    "TokenizerTraining",
    "TrainerSpec",
    "TrainingJob",
    "TrainingJobSpec",
    "TrainingJobStatus",
    "Uri",
    "Verdict",
]
