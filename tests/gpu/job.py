"""A whole job on one GPU: agent, worker, NCCL, compiled blocks in bf16; then the same with workers killed in parts of a
step, and with the rendezvous store killed, for which the worker goes on in its process with new groups: bit for bit the
same losses. What comes back are the phases of start and recovery. The run folder is in memory, as in a pod, so that
snapshots are page-locked."""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from gpu.notes import keep
from localrun import LocalRun, victims
from lockstep_api.v1alpha1 import TrainingJobStatus
from lockstep_api.v1alpha1.status import Fault
from lockstep_cli.journal import Step

STEPS = 260
STORE = "the rendezvous store"
KILLED = ("forward", STORE, "backward", STORE, "optimizer")
"""In order: the worker in sections of its step, and the store."""
LEAST, REST, ENOUGH_SECONDS = 4, 80, 80
"""Of these, how many there must be; steps that must be left for one more; and since when there is no further one."""
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
    "trainer.recipe.compile=true",
    "trainer.evaluate=null",
    "trainer.generate=null",
    "checkpoint.every=100",
    "checkpoint.keep.last=10000",
]


def run(folder: Path) -> dict[str, Any]:
    """Phases in seconds."""
    place = Path(tempfile.mkdtemp(dir="/dev/shm"))
    found: dict[str, Any] = {}
    try:
        found["plain"], undisturbed = _run(place / "plain", faulty=False)
        keep(folder, "job", found)
        shutil.rmtree(place / "plain")
        found["faulty"], result = _run(place / "faulty", faulty=True)
        keep(folder, "job", found)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    assert len(undisturbed) == len(result) == STEPS
    first = next((n for n, (a, b) in enumerate(zip(undisturbed, result, strict=True)) if a != b), None)
    assert first is None, f"step {first}: {undisturbed[first or 0]} without faults, {result[first or 0]} with"
    found["loss"] = [undisturbed[0], undisturbed[-1]]
    rungs = [fault["rung"] for fault in found["faulty"]["faults"]]
    assert len(rungs) >= LEAST, f"only {len(rungs)} faults: steps are too short, or restarts too long"
    assert rungs == ["inProcess" if what == STORE else "process" for what in KILLED[: len(rungs)]], rungs
    same = found["faulty"]["same_process"]
    assert same == [rung == "inProcess" for rung in rungs], f"workers that went on in their process: {same}"
    return found


def _run(folder: Path, *, faulty: bool) -> tuple[dict[str, Any], list[float]]:
    choose = random.Random(4)
    begun = time.monotonic()
    with LocalRun(folder, [*SETTINGS, f"trainer.recipe.steps={STEPS}"]) as job:
        try:
            job.until_step(5, 120)
            fifth = time.monotonic() - begun
            print(f"step 5 after {fifth:.1f} s", flush=True)
            same: list[bool] = []
            for what in KILLED if faulty else ():
                if job.status.progress.step > STEPS - REST or time.monotonic() - begun > ENOUGH_SECONDS:
                    break
                job.until_step(job.status.progress.step + choose.randint(3, 12))
                same.append(_mended(job, what))
            result = job.finish(120)
            assert result.code == 0, f"{result.errors}\n{job.output()}"
            verdict = job.check(STEPS)
            assert verdict.exact, str(verdict)
        except BaseException:
            for log in sorted(job.state.glob("pods/*/workers/*/output.log"))[-3:]:
                lines = log.read_text(errors="replace").splitlines()[-40:]
                print(f"--- {log.parent.name}", *lines, sep="\n", flush=True)
            raise
        status, journal = result.status, job.journal()
        found = {
            "seconds": round(time.monotonic() - begun, 1),
            "fifth_step_s": round(fifth, 1),
            "ledger": status.to_wire().get("ledger"),
            "faults": [_told(fault) for fault in status.faults],
            "first_steps": [_short(step.sections) for step in _first_steps(journal.steps)],
            "same_process": same,
            "step_ms": round(1e3 * statistics.median(step.seconds for step in journal.lineage[20:]), 2),
        }
        print(found, flush=True)
        return found, job.losses()


def _mended(job: LocalRun, what: str) -> bool:
    """Kill it, and wait until what was lost has been computed again. Whether the worker's process is the same then."""
    restarts, worker = job.status.restarts.total, _worker(job)
    begun = time.monotonic()
    if what == STORE:
        os.kill(job.store_server(), signal.SIGKILL)
    else:
        victims.kill_in_section(job.state, what, rank=0, seconds=30)

    def done(status: TrainingJobStatus) -> bool:
        return status.restarts.total > restarts and status.faults[-1].steps_lost is not None

    fault = job.until(done, 60, f"the end of the fault of {what}").faults[-1]
    print(f"{what}: {time.monotonic() - begun:.1f} s", _told(fault), flush=True)
    return _worker(job) == worker


def _first_steps(steps: Sequence[Step]) -> list[Step]:
    """Of each generation, which counts what its workers did before."""
    return [next(of) for _, of in groupby(steps, key=lambda step: step.generation)]


def _short(sections: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds, 2) for name, seconds in sections.items() if seconds >= 0.02}


def _told(fault: Fault) -> dict[str, Any]:
    wire = fault.to_wire()
    return {name: wire.get(name) for name in ("cause", "rung", "seconds", "stepsLost", "restoredFrom")}


def _worker(job: LocalRun) -> int:
    return [victim.pid for victim in victims.workers(job.state)][-1]
