"""A rank whose device or link is slow is named while its job trains, in the status and in the journal."""

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

pytestmark = [pytest.mark.run, pytest.mark.timeout(600)]

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
LINK = """
import time

import torch.distributed as dist
from torch.nn.functional import cross_entropy

DELAYS = {{"all_gather_into_tensor": 0.1, "all_gather_single": 0.1, "batch_isend_irecv": 1.0}}
# FSDP calls the second from torch 2.15 on.


def delayed(transfer, seconds):
    def late(*args, **named):
        time.sleep(seconds)
        return transfer(*args, **named)

    return late


def loss(logits, targets):
    if dist.get_rank() == {rank} and dist.batch_isend_irecv.__name__ != "late":
        for name, seconds in DELAYS.items():
            if hasattr(dist, name):
                setattr(dist, name, delayed(getattr(dist, name), seconds))
    return cross_entropy(logits, targets, reduction="sum")
"""


def named(status: TrainingJobStatus, cause: str) -> bool:
    return any(verdict.ranks == [SLOW] and verdict.cause == cause for verdict in status.verdicts)


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
        status = run.until(lambda now: named(now, "Compute"), 240, "a verdict on the slow rank")
        verdict = next(one for one in status.verdicts if one.ranks == [SLOW])
        assert (verdict.kind, len(verdict.nodes)) == ("Slow", 1)
        assert verdict.slowdown > 0.1
        assert verdict.ended is None

        def lines() -> list[list[int]]:
            return [line["ranks"] for line in journal.read(open_uri(str(run.run_store))) if line["kind"] == "straggler"]

        eventually(lambda: [SLOW] in lines(), "a line of the journal")  # it is written some time after the status


def test_a_rank_with_a_slow_link_is_named_while_the_job_trains(tmp_path: Path) -> None:
    """No single pair of a loopback interface can be slowed down: what the rank calls to transfer data is late. By much,
    as four workers that share two cores differ by ten times in what an exchange takes them."""
    manifest = tmp_path / "job.yaml"
    shutil.copyfile(QUICKSTART, manifest)
    (tmp_path / "slowlink.py").write_text(LINK.format(rank=SLOW))
    overrides = [
        *small.overrides(100_000, every=100_000),
        "nodes=4",
        "trainer.recipe.loss=slowlink:loss",
    ]
    with LocalRun(tmp_path, overrides, manifest=manifest) as run:
        status = run.until(lambda now: named(now, "Network"), 500, "a verdict on the slow link")
        verdict = next(one for one in status.verdicts if one.ranks == [SLOW])
        assert (verdict.kind, len(verdict.nodes)) == ("Slow", 1)
