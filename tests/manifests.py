"""Manifests that are right, and some that are wrong: each with the words that its refusal must contain.

The same table is put to the API server, to the pydantic models and to the CEL rules themselves.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]


def trainer_job(name: str = "quickstart") -> Manifest:
    """A small job of the project's own trainer."""
    return {
        "apiVersion": "lockstep.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": name},
        "spec": {
            "nodes": 2,
            "gpusPerNode": 2,
            "trainer": {
                "model": {"preset": "llama-debug"},
                "data": {"sources": [{"uri": "file://{stdlib}/**/*.py"}], "sequenceLength": 128},
                "recipe": {"steps": 100, "globalBatchTokens": 4096},
            },
            "checkpoint": {"uri": "s3://bucket/prefix"},
            "template": {"spec": {"containers": [{"name": "trainer", "image": "example/trainer:1"}]}},
        },
    }


def command_job(name: str = "script", **spec: Any) -> Manifest:
    """A user's own script."""
    return {
        "apiVersion": "lockstep.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": name},
        "spec": {"nodes": 1, "gpusPerNode": 1, "command": ["python3", "train.py"], **spec},
    }


@dataclass(frozen=True)
class Wrong:
    """A change that makes the trainer job wrong. A value of None takes the field away."""

    what: str
    change: dict[str, Any]
    says: tuple[str, ...]  # the API server, and the rule or bound behind it
    by_rule: bool = True  # by a CEL rule; else by the schema
    models_say: tuple[str, ...] = field(default=())  # pydantic, where its words differ

    def manifest(self) -> Manifest:
        """The wrong manifest."""
        manifest = trainer_job()
        for path, value in self.change.items():
            *parents, last = path.split(".")
            place: Any = manifest
            for part in parents:
                place = place.setdefault(part, {})
            if value is None:
                del place[last]
            else:
                place[last] = copy.deepcopy(value)
        return manifest


def _sources(*weights: float | None) -> list[Manifest]:
    """Sources a, b … of these weights."""
    return [
        {"name": name, "uri": f"s3://text/{name}", **({} if weight is None else {"weight": weight})}
        for name, weight in zip("abcdef", weights, strict=False)
    ]


WRONG = (
    Wrong(
        "both trainer and command",
        {"spec.command": ["python3", "train.py"]},
        ("set exactly one of trainer and command",),
    ),
    Wrong(
        "neither trainer nor command",
        {"spec.trainer": None},
        ("set exactly one of trainer and command",),
    ),
    Wrong(
        "a layout that does not divide the GPUs",
        {"spec.parallelism": {"replicate": 3}},
        (
            "parallelism: replicate × tensor × pipeline × context = 3 does not divide the 4 GPUs",
            "choose degrees whose product does",
        ),
    ),
    Wrong(
        "a rule that matches nothing",
        {"spec.resilience": {"retry": [{"action": "Fail"}]}},
        ("resilience.retry: a rule needs exitCodes, logPattern or both",),
    ),
    Wrong(
        "a pattern that is no regular expression",
        {"spec.resilience": {"retry": [{"action": "Fail", "logPattern": "a(b"}]}},
        ("resilience.retry: logPattern is no regular expression",),
    ),
    Wrong(
        "more degrees than GPUs",
        {"spec.parallelism": {"tensor": 2, "pipeline": 2, "context": 2}},
        ("parallelism: replicate × tensor × pipeline × context = 8 does not divide the 4 GPUs",),
    ),
    Wrong(
        "a sharded width that is not what is left",
        {"spec.parallelism": {"shard": 4, "tensor": 2}},
        ("parallelism.shard: with the other degrees it makes 8 GPUs, and this job has 4", "leave it out"),
    ),
    Wrong(
        "experts that do not fold over the other axes",
        {"spec.parallelism": {"expert": 3}},
        ("parallelism.expert: 3 does not divide shard × context × tensor = 4; choose a divisor",),
    ),
    Wrong(
        "tensor parallel groups that straddle nodes",
        {"spec.gpusPerNode": 3, "spec.parallelism": {"tensor": 2}, "spec.trainer.recipe.globalBatchTokens": 3 * 4096},
        ("parallelism.tensor: 2 neither divides gpusPerNode 3 nor is a multiple of it", "straddle nodes"),
    ),
    Wrong(
        "samples that tensor and context parallelism cannot cut",
        {
            "spec.parallelism": {"tensor": 2, "context": 2},
            "spec.trainer.data.sequenceLength": 100,
            "spec.trainer.recipe.globalBatchTokens": 4000,
        },
        ("trainer.data.sequenceLength: 100 is not a multiple of tensor × context (× 2 with context) = 8; choose one",),
    ),
    Wrong(
        "a batch that is no multiple",
        {"spec.trainer.recipe.globalBatchTokens": 5000},
        ("trainer.recipe.globalBatchTokens: 5000 is not a multiple", "= 512", "choose a multiple"),
    ),
    Wrong(
        "a script whose steps are to be compared",
        {
            "spec.trainer": None,
            "spec.checkpoint": None,
            "spec.command": ["python3", "train.py"],
            "spec.resilience": {"corruption": {"action": "Report"}},
        },
        ("resilience.corruption.action: only Lockstep's trainer can compare its steps", "set it to Off with command"),
    ),
    Wrong(
        "a script whose slow nodes are to be left",
        {
            "spec.trainer": None,
            "spec.checkpoint": None,
            "spec.command": ["python3", "train.py"],
            "spec.resilience": {"stragglers": {"action": "Swap"}},
        },
        ("resilience.stragglers.action: only the ranks of Lockstep's trainer are measured", "set it to Report"),
    ),
    Wrong(
        "steps that are to be compared and differ each time",
        {"spec.resilience": {"corruption": {"action": "Report"}}, "spec.trainer.recipe.deterministic": False},
        (
            "resilience.corruption.action: only what gives the same bits each time can be compared",
            "set trainer.recipe.deterministic to true, or action to Off",
        ),
    ),
    Wrong(
        "more nodes at least than in all",
        {"spec.resilience": {"elastic": {"minNodes": 3}}},
        ("resilience.elastic.minNodes: 3 is more than nodes, 2; choose fewer, or leave elastic out",),
    ),
    Wrong(
        "fewer nodes than whole replicas take",
        {"spec.parallelism": {"pipeline": 4}, "spec.resilience": {"elastic": {"minNodes": 1}}},
        (
            "resilience.elastic.minNodes: 1 nodes have no whole number of data-parallel replicas of 4 GPUs; choose a "
            "number that has",
        ),
        models_say=("minNodes: the job can't train on 1 nodes: 2 GPUs are no multiple of", "choose one of 2"),
    ),
    Wrong(
        "fewer nodes than the experts are spread over",
        {"spec.parallelism": {"expert": 4}, "spec.resilience": {"elastic": {"minNodes": 1}}},
        ("resilience.elastic.minNodes: on 1 nodes parallelism.expert 4 does not divide shard × context × tensor",),
        models_say=("minNodes: the job can't train on 1 nodes: expert 4 does not divide",),
    ),
    Wrong(
        "fewer nodes than the batch divides among",
        {"spec.nodes": 4, "spec.resilience": {"elastic": {"minNodes": 3}}},
        (
            "resilience.elastic.minNodes: on 3 nodes trainer.recipe.globalBatchTokens 4096 is not a multiple of "
            "sequenceLength × data-parallel width = 768; choose another number",
        ),
        models_say=("a batch of 4096 tokens is no multiple of", "= 768; choose one of 1, 2, 4"),
    ),
    Wrong(
        "evaluation without held-out files",
        {"spec.trainer.evaluate": {"every": 10}},
        ("trainer.evaluate needs held-out documents; set trainer.data.holdout", "or trainer.evaluate.sources"),
    ),
    Wrong(
        "a preset and a model of one's own",
        {"spec.trainer.model.module": "mymodels.tiny:build"},
        ("set exactly one of model.preset and model.module",),
    ),
    Wrong(
        "no model",
        {"spec.trainer.model": {}},
        ("set exactly one of model.preset and model.module",),
    ),
    Wrong(
        "a trainer without checkpoints",
        {"spec.checkpoint": None},
        ("checkpoint.uri is required with trainer",),
    ),
    Wrong(
        "two tokenizers",
        {"spec.trainer.tokenizer": {"uri": "s3://models/tokenizer.json", "train": {"vocabSize": 1000}}},
        ("set exactly one of tokenizer.uri and tokenizer.train",),
    ),
    Wrong(
        "a name too long for its pods",
        {"metadata.name": "x" * 49},
        ("metadata.name may have at most 48 characters", "choose a shorter one"),
    ),
    Wrong(
        "a name that no Service can have",
        {"metadata.name": "7b-run"},
        ("metadata.name must be lower-case letters, digits and hyphens, and start with a letter",),
    ),
    Wrong(
        "a checkpoint folder that is no URI",
        {"spec.checkpoint.uri": "/mnt/checkpoints"},
        ("spec.checkpoint.uri", "should match '^(s3|file)://.+"),
        by_rule=False,
        models_say=("uri", "should match pattern", "^(s3|file)://.+"),
    ),
    Wrong(
        "a ramp whose batches do not divide among the ranks",
        {"spec.trainer.recipe.batchRamp": {"startTokens": 1024, "steps": 20, "increments": 4}},
        (
            "trainer.recipe.batchRamp: startTokens and each of the parts up to globalBatchTokens",
            "= 512; change startTokens",
        ),
    ),
    Wrong(
        "a ramp that starts with the whole batch",
        {"spec.trainer.recipe.batchRamp": {"startTokens": 4096, "steps": 20}},
        ("recipe.batchRamp.startTokens is no smaller batch than globalBatchTokens; lower it",),
    ),
    Wrong(
        "a ramp longer than the run",
        {"spec.trainer.recipe.batchRamp": {"startTokens": 2048, "steps": 100, "increments": 4}},
        ("recipe.batchRamp.steps: the whole batch would never be reached",),
    ),
    Wrong(
        "a ramp with more parts than steps",
        {"spec.trainer.recipe.batchRamp": {"startTokens": 2048, "steps": 3, "increments": 4}},
        ("batchRamp.increments: each part lasts a step or more; lower it",),
    ),
    Wrong(
        "a warm-up longer than the run",
        {"spec.trainer.recipe.schedule": {"warmup": 101}},
        ("recipe.schedule: warmup and decay take more than all steps of the recipe",),
    ),
    Wrong(
        "a decay for a schedule without one",
        {"spec.trainer.recipe.schedule": {"name": "cosine", "decay": 5}},
        ("schedule.decay is for wsd only; leave it out, or choose wsd",),
    ),
    Wrong(
        "an unknown precision",
        {"spec.trainer.recipe.precision": "fp8"},
        ("spec.trainer.recipe.precision", 'Unsupported value: "fp8"', '"bf16", "fp32", "float8"'),
        by_rule=False,
        models_say=("precision", "^(bf16|fp32|float8)$"),
    ),
    Wrong(
        "an unknown pipeline schedule",
        {"spec.parallelism": {"schedule": "GPipe2"}},
        ("spec.parallelism.schedule", 'Unsupported value: "GPipe2"', '"1F1B"', '"DualPipeV"'),
        by_rule=False,
        models_say=("schedule", "^(GPipe|1F1B|"),
    ),
    Wrong(
        "a tracker that nobody knows",
        {"spec.trainer.callbacks": [{"module": "neptune"}]},
        ("spec.trainer.callbacks[0].module", "should match '^(tensorboard|wandb|mlflow|"),
        by_rule=False,
        models_say=("callbacks", "should match pattern", "^(tensorboard|wandb|mlflow|"),
    ),
    Wrong(
        "a module without a name in it",
        {"spec.trainer.recipe.loss": "mylosses"},
        ("spec.trainer.recipe.loss", "should match '^[A-Za-z_]"),
        by_rule=False,
        models_say=("recipe.loss", "should match pattern"),
    ),
    Wrong(
        "no GPUs",
        {"spec.gpusPerNode": 0},
        ("spec.gpusPerNode", "should be greater than or equal to 1"),
        by_rule=False,
        models_say=("gpusPerNode", "greater than or equal to 1"),
    ),
    Wrong(
        "a misspelled field",
        {"spec.trainer.recipe.learningRate": 0.1},
        ("learningRate", "unknown field"),
        by_rule=False,
        models_say=("learningRate", "Extra inputs are not permitted"),
    ),
    Wrong(
        "two sources of one name",
        {"spec.trainer.data.sources": [{"uri": "s3://text/a"}, {"uri": "s3://text/b"}]},
        ("give each source a name of its own",),
    ),
    Wrong(
        "a weight for one source of two",
        {"spec.trainer.data.sources": _sources(2.0, None)},
        ("give every source in data.sources a weight, or none",),
    ),
    Wrong(
        "stages that do not rise",
        {
            "spec.trainer.data.sources": _sources(2.0, 1.0),
            "spec.trainer.data.stages": [
                {"fromStep": 9, "weights": {"a": 1.0}},
                {"fromStep": 9, "weights": {"b": 1.0}},
            ],
        },
        ("fromStep of data.stages must rise from stage to stage",),
    ),
    Wrong(
        "a stage of a source that is not there",
        {
            "spec.trainer.data.sources": _sources(2.0, 1.0),
            "spec.trainer.data.stages": [{"fromStep": 9, "weights": {"c": 1.0}}],
        },
        ("the weights of data.stages must name sources of data.sources",),
    ),
    Wrong(
        "a stage without data",
        {
            "spec.trainer.data.sources": _sources(2.0, 1.0),
            "spec.trainer.data.stages": [{"fromStep": 9, "weights": {"a": 0.0}}],
        },
        ("each of data.stages needs a source with a weight above 0",),
    ),
    Wrong(
        "an own data set that is packed",
        {"spec.trainer.data.module": "own.data:open", "spec.trainer.data.packing": "bestFit"},
        ("data.module has its own samples: leave weights, stages and packing out",),
    ),
    Wrong(
        "an evaluated source of a name that is taken",
        {"spec.trainer.evaluate": {"sources": [{"uri": "s3://text/a"}]}},
        ("evaluate.sources need names of their own, other than those of data.sources",),
    ),
    Wrong(
        "a weight of an evaluated source",
        {"spec.trainer.evaluate": {"sources": [{"name": "a", "uri": "s3://text/a", "weight": 2.0}]}},
        ("evaluate.sources have no weight: each is evaluated by itself",),
    ),
    Wrong(
        "an interval of checkpoints that is no number",
        {"spec.checkpoint.every": "often"},
        ("write a number of steps from 1 on, or auto",),
    ),
    Wrong(
        "a number of steps in quotes",
        {"spec.checkpoint.every": "100"},
        ("write a number of steps from 1 on, or auto",),
    ),
    Wrong(
        "snapshots behind no step",
        {"spec.checkpoint.memory.every": 0},
        ("write a number of steps from 1 on, or auto",),
    ),
    Wrong(
        "a limit of memory without a known unit",
        {"spec.checkpoint.memory.limit": "64 GB"},
        ("spec.checkpoint.memory.limit",),
        by_rule=False,
        models_say=("memory.limit", "should match pattern"),
    ),
    Wrong(
        "a key for a store that encrypts with its own",
        {"spec.checkpoint.s3": {"encryption": {"type": "AES256", "kmsKeyId": "alias/lockstep"}}},
        ("kmsKeyId needs the type aws:kms",),
    ),
    Wrong(
        "uploads at no rate",
        {"spec.checkpoint.s3": {"uploadBandwidth": "0"}},
        ("spec.checkpoint.s3.uploadBandwidth",),
        by_rule=False,
        models_say=("uploadBandwidth", "should match pattern"),
    ),
)
