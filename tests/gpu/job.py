"""A whole job on one GPU: agent, worker, NCCL, compiled blocks in bf16; then the same with workers killed in parts of a
step: bit for bit the same losses. What comes back are the phases of start and recovery."""

from __future__ import annotations

import random
import shutil
import statistics
from pathlib import Path
from typing import Any

from localrun import LocalRun, victims

STEPS = 1500
SETTINGS = [
    "nodes=1",
    "gpusPerNode=1",
    "parallelism={}",
    "trainer.model.overrides={layers: 6, dim: 768, heads: 12, kv_heads: 4, ffn_dim: 2048}",
    "trainer.tokenizer.train.vocabSize=1000",
    "trainer.data.sources.0.maxBytes=2000000",
    "trainer.data.sequenceLength=512",
    "trainer.recipe.globalBatchTokens=16384",
    "trainer.recipe.precision=bf16",
    "trainer.evaluate=null",
    "trainer.generate=null",
    "checkpoint.every=100",
    "checkpoint.keep.last=10000",
]


def run(folder: Path) -> dict[str, Any]:
    """Phases in seconds."""
    place = folder / "jobs"
    shutil.rmtree(place, ignore_errors=True)
    plain, undisturbed = _run(place / "plain", STEPS, [])
    sections = ["forward", "backward", "optimizer", "stage"]
    faulty, result = _run(place / "faulty", STEPS, sections)
    assert len(undisturbed) == len(result) == STEPS
    first = next((n for n, (a, b) in enumerate(zip(undisturbed, result, strict=True)) if a != b), None)
    assert first is None, f"step {first}: {undisturbed[first or 0]} without faults, {result[first or 0]} with"
    shutil.rmtree(place, ignore_errors=True)
    return {"plain": plain, "faulty": faulty, "loss": [undisturbed[0], undisturbed[-1]]}


def _run(folder: Path, steps: int, sections: list[str]) -> tuple[dict[str, Any], list[float]]:
    choose = random.Random(4)
    with LocalRun(folder, [*SETTINGS, f"trainer.recipe.steps={steps}"]) as job:
        job.until_step(5, 120)
        for section in sections:
            before = job.status
            job.until_step(before.progress.step + choose.randint(3, 20))
            victims.kill_in_section(job.state, section, rank=0, seconds=30)
            job.until(lambda now, was=before: now.restarts.total > was.restarts.total, 60, "the fault")
        result = job.finish(120)
        assert result.code == 0, f"{result.errors}\n{job.output()}"
        verdict = job.check(steps)
        assert verdict.exact, str(verdict)
        status = result.status
        journal = job.journal()
        faults = [fault.to_wire() for fault in status.faults]
        lines = job.output(4000)
        seconds = [step.seconds for step in journal.lineage[20:]]
        found = {
            "ledger": status.to_wire().get("ledger"),
            "faults": faults,
            "step_ms": round(1e3 * statistics.median(seconds), 2),
            "restored_from": [line for line in lines.splitlines() if "restor" in line][-6:],
        }
        return found, job.losses()
