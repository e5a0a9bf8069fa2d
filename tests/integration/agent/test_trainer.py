"""Lockstep's own trainer on real agents: a worker, the rendezvous store and the leader's agent die in one run."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from integration.agent.harness import UID, Cluster, gone, kill
from lockstep_api.messages import Message, Progress, Recovered
from lockstep_api.v1alpha1 import TrainingJobSpec

pytestmark = [pytest.mark.run, pytest.mark.timeout(240)]
STEPS = 60


def spec(store: Path, text: Path) -> dict[str, Any]:
    text.mkdir()
    for number in range(8):
        lines = [f"the {word} of {number} is {word * 7 % 31}\n" for word in range(900)]
        (text / f"{number}.txt").write_text("".join(lines))
    raw = {
        "nodes": 2,
        "gpusPerNode": 1,
        "trainer": {
            "model": {"preset": "llama-debug", "overrides": {"layers": 1}},
            "tokenizer": {"train": {"vocabSize": 300}},
            "data": {"sources": [{"uri": f"file://{text}/*.txt"}], "sequenceLength": 32},
            "recipe": {"steps": STEPS, "globalBatchTokens": 256, "precision": "fp32"},
        },
        "checkpoint": {"uri": f"file://{store}", "every": 10},
    }
    return TrainingJobSpec.model_validate(raw).to_wire()


def reached(step: int, term: int) -> Any:
    def there(message: Message) -> bool:
        newest = message.newest if isinstance(message, Progress) else None
        return newest is not None and newest.step >= step and message.term.generation >= term  # type: ignore[union-attr]

    return there


def test_training_goes_on(tmp_path: Path) -> None:
    """Each fault inside the epoch costs one generation and no sample; the leader's agent costs nothing. The journal
    has each step of the lineage, and the ledger counts what was done twice as recomputing."""

    async def scenario() -> None:
        store = tmp_path / "store"
        async with Cluster.up(tmp_path / "pods", spec(store, tmp_path / "text")) as cluster:
            await cluster.wait_for(reached(13, 1), timeout=120)
            killed = kill(cluster.pods[1].worker_pid(1, 1))
            recovered = await cluster.wait_for(lambda m: isinstance(m, Recovered))
            print(f"kill to first new step: {time.time() - killed:.2f} s, {recovered}")
            await cluster.wait_for(reached(23, 2))
            kill(cluster.pods[0].store_pid())
            await cluster.wait_for(reached(33, 3))
            agent = cluster.pods[0].agent_pid()
            kill(agent)
            await gone(agent)
            finished = await cluster.finished()
            assert (finished.outcome, finished.term.generation) == ("succeeded", 3)
            assert [fault.cause for fault in cluster.faults()] == ["WorkerExited", "StoreLost"]

        lines = [
            json.loads(line)
            for path in (store / "default" / "job" / UID / "journal").glob("*.jsonl")  # a killed agent leaves others
            for line in path.read_text().splitlines()
        ]
        steps = sorted((line["epoch"], line["generation"], line["step"]) for line in lines if line["kind"] == "step")
        assert len(steps) == len(set(steps)), "a step is in the journal once per generation"
        assert {step for _, _, step in steps} == set(range(1, STEPS + 1))
        restored = next(line["restore"] for line in lines if line["kind"] == "start" and line["generation"] == 2)
        reached_first = max(step for _, generation, step in steps if generation == 1)
        assert recovered.steps_lost == reached_first - restored["step"]  # type: ignore[union-attr]
        last = max((line for line in lines if line["kind"] == "ledger"), key=lambda line: line["at"])["classes"]
        assert (last["recomputing"] > 0) == (len(steps) > STEPS), "only steps that were done twice are recomputed"
        assert last["productive"] > last["recomputing"]
        assert [line["outcome"] for line in lines if line["kind"] == "finished"] == ["succeeded"]

    asyncio.run(scenario())
