"""What a snapshot costs a training loop on a GPU, beside torch's asynchronous save: page-locked memory on both sides,
the copy beside the next forward and backward pass. Files go to a memory-backed folder: only the stall is compared."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from gpu.ranks import alone
from lockstep_api.messages import StateId, Term
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.batch import Batch
from lockstep_trainer.checkpoint.planning import Planned, plan_snapshots
from lockstep_trainer.checkpoint.recall import recall
from lockstep_trainer.checkpoint.snapshots import FOLDER, Root, rank_folder
from lockstep_trainer.checkpoint.stage import Facts, Stage
from lockstep_trainer.checkpoint.state import training_state
from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.optim.build import build_optimizer, start_fresh
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize
from lockstep_trainer.runtime import make_deterministic, refusing, set_allocator

GPU = torch.device("cuda", 0)
CONFIG = DecoderConfig(dim=1536, layers=12, heads=12, kv_heads=4, ffn_dim=4096, vocab_size=32768)
ROUNDS, PLAIN = 4, 4


def run(folder: Path) -> dict[str, Any]:
    """Milliseconds that the loop stood still, and by how much the steps beside the copy are longer."""
    set_allocator(GPU)
    make_deterministic()
    alone(GPU)
    loop = _Loop()
    memory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        ours = _Ours(loop, memory)
        result: dict[str, Any] = {"gib": round(ours.planned.plan.size / 2**30, 2)}
        result["lockstep"] = _rounds(loop, ours)
        ours.checked()
        result["async_save, thread"] = _rounds(loop, _Theirs(loop, ours.planned, memory / "theirs"))
        return result
    finally:
        shutil.rmtree(memory, ignore_errors=True)


class _Loop:
    """Training, without data."""

    def __init__(self) -> None:
        layout = Layout()
        meshes = Meshes.build(layout, GPU)
        parts = build_parts(CONFIG, layout, meshes, device=GPU, precision="bf16", compile_backend="inductor")
        initialize(parts, seed=0)
        self.engine = Engine(parts, layout, meshes, Loss(), micro_batch_size=2, device=GPU)
        self.named = list(self.engine.named_parameters())
        self.optimizer = build_optimizer(self.named, OptimizerSpec(lr=1e-4))
        start_fresh(self.optimizer)
        tokens = torch.randint(0, CONFIG.vocab_size, (4, 4097), device=GPU)
        self.batch = Batch(tokens[:, :-1], tokens[:, 1:])
        for _ in range(3):
            self.step(lambda: None)

    def step(self, before_the_update: Any) -> float:
        """Seconds of a step. The sums are read, as the training loop does, before the wait."""
        begun = time.perf_counter()
        with refusing(True):
            sums = self.engine.forward_backward(self.batch, self.batch.tokens)
        sums.tolist()
        before_the_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    def state(self) -> Any:
        """What is saved."""
        return training_state(self.engine.state(), self.named, self.optimizer)


class _Ours:
    def __init__(self, loop: _Loop, memory: Path) -> None:
        self.loop, self.memory, self.number = loop, memory, 0
        degrees = {"world_size": 1}
        group = dist.new_group(backend="gloo")
        self.planned = plan_snapshots(loop.state(), degrees, rank=0, group=group)
        self.stage = Stage(rank_folder(memory / FOLDER, 0), self.planned, GPU)
        self.stage.prepare(lambda held: False)

    def begin(self) -> None:
        self.number += 1
        newest = StateId(self.number - 1, 1, 1)
        assert self.stage.reserve(lambda held: held == newest)
        header = {"anything": "a header may say"}
        facts = Facts(StateId(self.number, 1, 1), header, Root(Term(1, 1), None), 0, None, "")
        self.stage.begin(self.planned.sources(self.loop.state()), facts)

    def wait(self) -> None:
        self.stage.wait()

    def finish(self) -> None:
        self.stage.finish()

    def checked(self) -> None:
        """What was copied beside a step is what the state was at its boundary, bit for bit."""
        for _ in range(2):
            expected = [source.detach().clone() for source in self.planned.sources(self.loop.state())]
            self.begin()
            self.loop.step(self.wait)
            self.finish()
            into = [torch.empty_like(source) for source in expected]
            recall(rank_folder(self.memory / FOLDER, 0), self.planned, StateId(self.number, 1, 1), into)
            assert all(torch.equal(a, b) for a, b in zip(expected, into, strict=True)), "a snapshot is torn"


class _Theirs:
    """The same tensors in one plain dictionary."""

    def __init__(self, loop: _Loop, planned: Planned, folder: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.loop, self.planned, self.folder, self.number = loop, planned, folder, 0
        self.group = dist.new_group(backend="gloo")
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=True, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=True
            )
        )
        inner: Any = self.stager._state_dict_stager
        inner.close = lambda: None  # torch 2.11 closes it behind the first save, and fails at the second
        self.staged: Future[None] | None = None
        self.saved: Any = None

    def begin(self) -> None:
        self.number += 1
        shutil.rmtree(self.folder, ignore_errors=True)
        response: Any = dcp.async_save(
            {str(number): source.detach() for number, source in enumerate(self.planned.sources(self.loop.state()))},
            storage_writer=dcp.FileSystemWriter(self.folder, sync_files=False),
            process_group=self.group,
            async_stager=self.stager,
        )
        self.staged, self.saved = response.staging_completion, response.upload_completion

    def wait(self) -> None:
        assert self.staged is not None
        self.staged.result()

    def finish(self) -> None:
        self.saved.result()


def _rounds(loop: _Loop, side: Any) -> dict[str, Any]:
    blocked, longer = [], []
    for number in range(ROUNDS + 1):
        plain = statistics.median(loop.step(lambda: None) for _ in range(PLAIN))
        begun = time.perf_counter()
        side.begin()
        at_boundary = time.perf_counter() - begun
        waits: list[float] = []

        def wait(waits: list[float] = waits) -> None:
            before = time.perf_counter()
            side.wait()
            waits.append(time.perf_counter() - before)

        step = loop.step(wait)
        side.finish()
        if number:  # the first makes its memory
            blocked.append(1e3 * (at_boundary + waits[0]))
            longer.append(1e3 * (step - waits[0] - plain))
    return {
        "step_ms": round(1e3 * plain, 1),
        "blocked_ms": [round(each, 2) for each in blocked],
        "step_longer_ms": [round(each, 2) for each in longer],
    }
