"""What the trainer's own work costs: CPU time of a step that is not the model's.

    PYTHONPATH=tests .venv/bin/python tests/bench/overhead.py [--steps 20]

Two whole workers on this machine train a small decoder (dim 256, 6 layers, samples of 256 tokens) as a job would. The
model's own work is what runs in the sections forward, backward, optimizer and collective. All other CPU time of the
training loop is the trainer's: the main thread's (drawing and logging samples, records, schedule, clock), and that of
threads beside it (reading ahead). A collection of garbage is timed once and counted as often as it comes. Waiting is no
CPU time, so a busy machine changes little. The checkpoint behind the last step stands apart: how often there is one is
the job's choice. The share is that of rank 0, over the steps behind the first five; the
result is added to docs/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from bench import results
from forked import rendezvous_store, run_workers, worker_folders
from lockstep_api.v1alpha1 import TrainingJobSpec
from lockstep_trainer import worker
from lockstep_trainer.runtime import GARBAGE_EVERY
from lockstep_trainer.sections import Sections
from lockstep_trainer.train import Trainer

RESULTS = results.RESULTS / "overhead.json"
MODEL_WORK = ("forward", "backward", "pipeline", "optimizer", "collective")
WARM_UP = 5
LENGTH, SAMPLES = 256, 16


class CpuSections(Sections):
    """Sections that also count the main thread's CPU seconds."""

    cpu: ClassVar[defaultdict[str, float]] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """As the base has it."""
        begun = time.thread_time()
        with super().__call__(name):
            yield
        CpuSections.cpu[name] += time.thread_time() - begun


def clocks() -> dict[str, float]:
    """CPU seconds so far: the process's, the main thread's, other Python threads' and the main thread's by section."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    beside = sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in others if thread.ident)
    sections = {f"section {name}": seconds for name, seconds in CpuSections.cpu.items()}
    return {"process": time.process_time(), "main": time.thread_time(), "beside": beside, **sections}


class MeasuredTrainer(Trainer):
    """The real loop, with the clocks read behind its warm-up and its last step."""

    def train(self) -> None:
        """As the base has it; rank 0 leaves the result in the job's folder."""
        super().train()
        last = clocks()
        if self.ranks.leads:
            found = {name: value - self.first.get(name, 0.0) for name, value in last.items()}
            begun = time.thread_time()
            self.garbage.collect()
            found["garbage"] = (time.thread_time() - begun) * (self.step - WARM_UP) / GARBAGE_EVERY
            found["wall"] = time.perf_counter() - self.begun
            Path(self.orders.job).with_name("clocks.json").write_text(json.dumps(found))

    def _train_step(self, step: int) -> None:
        if step == WARM_UP + 1:
            self.first, self.begun = clocks(), time.perf_counter()
        super()._train_step(step)


def measure(steps: int) -> dict[str, float]:
    """CPU seconds of rank 0 over ``steps`` steps."""
    setattr(worker, "Sections", CpuSections)  # noqa: B010 (what a module imported is no attribute to mypy)
    setattr(worker, "Trainer", MeasuredTrainer)  # noqa: B010
    with tempfile.TemporaryDirectory() as folder, rendezvous_store() as port:
        root = Path(folder)
        spec = TrainingJobSpec.model_validate(
            {
                "nodes": 1,
                "gpusPerNode": 2,
                "trainer": {
                    "model": {"preset": "llama-debug", "overrides": {"dim": 256, "layers": 6, "ffn_dim": 768}},
                    "tokenizer": {"train": {"kind": "bytes"}},
                    "data": {"sources": [{"uri": "file://{stdlib}/json/**/*.py"}], "sequenceLength": LENGTH},
                    "recipe": {
                        "steps": steps + WARM_UP,
                        "globalBatchTokens": LENGTH * SAMPLES,
                        "precision": "fp32",
                        "schedule": {"warmup": 2},
                    },
                },
                "checkpoint": {"uri": f"file://{root}/store", "every": 1_000_000},
            }
        )
        job = root / "job.json"
        job.write_text(json.dumps({"name": "job", "namespace": "ns", "uid": "uid", "spec": spec.to_wire()}))
        folders = worker_folders(
            root, job, ranks=2, port=port, rendezvous={"host": "127.0.0.1", "port": port, "prefix": "1"}
        )
        codes = run_workers(folders)
        if codes != [0, 0]:
            raise SystemExit(f"workers ended with {codes}: {(folders[0] / 'output.log').read_text()[-3000:]}")
        found: dict[str, float] = json.loads((root / "clocks.json").read_text())
        return found


def judge(found: dict[str, float], steps: int) -> dict[str, Any]:
    """Milliseconds per step, and the trainer's share of all CPU time."""
    model = sum(found.get(f"section {name}", 0.0) for name in MODEL_WORK)
    checkpoint = found.get("section checkpoint", 0.0)
    own = found["main"] - model - checkpoint + found["beside"] + found["garbage"]
    per_step = {name: round(1000 * seconds / steps, 3) for name, seconds in found.items()}
    return {
        "share": round(own / (found["process"] - checkpoint + found["garbage"]), 5),
        "own_ms_per_step": round(1000 * own / steps, 3),
        "checkpoint_ms": round(1000 * checkpoint, 3),
        "ms_per_step": per_step,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = {
        **results.origin(
            "CPU time per step of a worker that is not forward, backward, optimizer or collectives",
            f"torch {torch.__version__}, float32, CPU, 2 ranks",
        ),
        "steps": arguments.steps,
        **judge(measure(arguments.steps), arguments.steps),
    }
    results.add(result, arguments.results)


if __name__ == "__main__":
    main()
