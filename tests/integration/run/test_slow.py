"""A rank whose device computes slowly is named while its job trains, in the status and in the journal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from awaited import eventually
from integration.run import small
from localrun import LocalRun
from localrun.run import QUICKSTART
from lockstep_api.v1alpha1 import TrainingJobStatus
from lockstep_cli import journal
from lockstep_cli.store import open_uri

pytestmark = [pytest.mark.run, pytest.mark.timeout(300)]

SLOW = 2
LOSS = """
import time

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

CALLS = 0
KERNELS = torch.library.Library("aten", "IMPL")


def slow_product(a, b):
    '''Every matrix product of the process, whoever asks for it, takes twice as long and 0.2 ms.'''
    begun = time.perf_counter()
    out = torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    until = 2 * time.perf_counter() - begun + 2e-4
    while time.perf_counter() < until:
        pass
    return out


def loss(logits, targets):
    global CALLS
    CALLS += 1
    if dist.get_rank() == {rank} and CALLS == 20:
        KERNELS.impl("mm", slow_product, "CPU")
    return cross_entropy(logits, targets, reduction="sum")
"""


def named(status: TrainingJobStatus) -> bool:
    return any(verdict.ranks == [SLOW] and verdict.cause == "Compute" for verdict in status.verdicts)


def test_a_rank_with_a_slow_device_is_named_while_the_job_trains(tmp_path: Path) -> None:
    manifest = tmp_path / "job.yaml"
    shutil.copyfile(QUICKSTART, manifest)
    (tmp_path / "slowdevice.py").write_text(LOSS.format(rank=SLOW))
    overrides = [
        *small.overrides(100_000, every=100_000),  # until it is named
        "nodes=2",
        "gpusPerNode=2",
        "trainer.recipe.loss=slowdevice:loss",
    ]
    with LocalRun(tmp_path, overrides, manifest=manifest) as run:
        status = run.until(named, 240, "a verdict on the slow rank")
        verdict = next(one for one in status.verdicts if one.ranks == [SLOW])
        assert (verdict.kind, len(verdict.nodes)) == ("Slow", 1)
        assert verdict.slowdown > 0.1
        assert verdict.ended is None

        def lines() -> list[list[int]]:
            return [line["ranks"] for line in journal.read(open_uri(str(run.run_store))) if line["kind"] == "straggler"]

        eventually(lambda: [SLOW] in lines(), "a line of the journal")  # it is written some time after the status
