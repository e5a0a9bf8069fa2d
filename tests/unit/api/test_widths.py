"""On how many nodes a job may train: what the operator chooses, and the degrees that every worker derives from it.

What is protected: a job never goes on at a width at which its global batch does not divide or a replica is torn apart.
"""

from __future__ import annotations

from typing import Any

import pytest

from lockstep_api.v1alpha1 import ParallelismSpec, TrainingJob, TrainingJobSpec
from lockstep_api.v1alpha1.widths import largest, obstacle, resized
from manifests import trainer_job


def spec(nodes: int, *, gpus: int = 1, minimum: int | None = 1, batch: int = 24, **parallelism: Any) -> TrainingJobSpec:
    """A trainer's job with steps of ``batch`` samples."""
    manifest = trainer_job()
    manifest["spec"] |= {"nodes": nodes, "gpusPerNode": gpus, "parallelism": parallelism}
    manifest["spec"]["trainer"]["recipe"]["globalBatchTokens"] = batch * 128
    if minimum is not None:
        manifest["spec"]["resilience"] = {"elastic": {"minNodes": minimum}}
    return TrainingJob.model_validate(manifest).spec


def test_the_largest_number_of_nodes_is_the_one_at_which_the_global_batch_still_divides() -> None:
    job = spec(8, batch=24)
    assert [largest(job, have) for have in range(9)] == [None, 1, 2, 3, 4, 4, 6, 6, 8]


def test_nothing_below_the_minimum_is_chosen() -> None:
    assert largest(spec(8, minimum=6), 5) is None
    assert largest(spec(8, minimum=6), 7) == 6


def test_without_elastic_only_all_nodes_will_do() -> None:
    job = spec(4, minimum=None)
    assert (largest(job, 3), largest(job, 4), largest(job, 9)) == (None, 4, 4)


def test_pipelines_and_tensor_groups_stay_whole() -> None:
    """Two nodes hold one replica: an odd number of them would tear one apart."""
    job = spec(6, gpus=2, minimum=2, batch=24, tensor=2, pipeline=2)
    assert [largest(job, have) for have in range(7)] == [None, None, 2, 2, 4, 4, 6]
    assert obstacle(job, 3) == "6 GPUs are no multiple of tensor × pipeline × context = 4"


def test_whole_copies_of_the_sharded_model_go_and_shards_stay() -> None:
    job = spec(6, minimum=2, batch=24, replicate=3)
    assert [largest(job, have) for have in range(1, 7)] == [None, 2, 2, 4, 4, 6]
    assert resized(job.parallelism, 6, 4).replicate == 2
    assert "copies of the model" in (obstacle(job, 3) or "")


def test_a_shard_degree_that_is_written_out_follows() -> None:
    assert resized(ParallelismSpec(shard=8, tensor=2), 16, 12).shard == 6
    assert resized(ParallelismSpec(tensor=2), 16, 12).shard is None


def test_experts_must_still_divide_the_ranks_that_they_fold_over() -> None:
    with pytest.raises(ValueError, match="expert 4 does not divide shard × context × tensor = 6"):
        resized(ParallelismSpec(expert=4), 8, 6)


def test_each_part_of_a_ramp_must_divide_too() -> None:
    manifest = trainer_job()
    manifest["spec"]["nodes"] = 4  # × 2 GPUs × 128 tokens
    manifest["spec"]["trainer"]["recipe"] |= {
        "globalBatchTokens": 24 * 256,
        "batchRamp": {"startTokens": 8 * 256, "steps": 10, "increments": 2},
    }
    job = TrainingJob.model_validate(manifest).spec
    assert "a batch of 2048 tokens is no multiple" in (obstacle(job, 3) or "")
    assert obstacle(job, 2) is None


def test_micro_batches_must_fit_the_share_of_a_rank_and_the_schedule() -> None:
    manifest = trainer_job()
    manifest["spec"]["nodes"] = 4  # × 2 GPUs
    manifest["spec"]["trainer"]["recipe"] |= {"globalBatchTokens": 24 * 128, "microBatchSize": 3}
    assert "microBatchSize 3 does not divide the 4 samples" in (
        obstacle(TrainingJob.model_validate(manifest).spec, 3) or ""
    )
    manifest["spec"]["trainer"]["recipe"].pop("microBatchSize")
    manifest["spec"]["parallelism"] = {"pipeline": 4, "schedule": "Interleaved1F1B"}
    manifest["spec"]["trainer"]["recipe"]["globalBatchTokens"] = 18 * 128
    job = TrainingJob.model_validate(manifest).spec
    assert obstacle(job, 2) == "schedule Interleaved1F1B can't do 18 micro-batches per step"
