"""Pods are lost while the store is away: training goes on from memory, and what it made becomes durable when the store
is back, behind the checkpoint that it descends from."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from crash.leg import durable_step, local_run
from integration.run import small
from localrun import LocalRun
from s3server import S3Server

pytestmark = [pytest.mark.run, pytest.mark.timeout(400)]


def lose(run: LocalRun, slot: int) -> None:
    """A pod dies, and others make new steps without it."""
    before = run.status
    supervisor = run.supervisor(slot)
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    after = run.until(lambda s: s.epoch > before.epoch, 60, "another epoch")
    run.until_step(max(before.progress.step, after.progress.step) + 5, 60)


def test_pods_lost_while_the_store_is_away(tmp_path: Path, server: S3Server, reference: list[float]) -> None:
    with local_run(tmp_path / "job", server, small.STEPS) as run:
        before = run.until(lambda s: durable_step(s) >= 20, 90, "a checkpoint")
        server.kill()
        for slot in (1, 0, 1):  # a member, the leader, and again: the second leader hears of it from the others
            lose(run, slot)
        away = run.status
        assert durable_step(away) < away.progress.step - 10
        assert away.restarts.pod >= before.restarts.pod + 3
        assert {fault.restored_from for fault in away.faults} == {"buddy"}
        degraded = next(one for one in away.conditions if one.type == "CheckpointDegraded")
        assert (degraded.status, degraded.reason) == ("True", "StoreUnavailable")
        server.start()
        run.until(lambda s: durable_step(s) >= away.progress.step, 90, "a checkpoint of what was made meanwhile")
        result = run.finish(240)
        assert result.code == 0, result.errors
        verdict = run.check(small.STEPS)
        assert verdict.exact, verdict
        # Lines that the lost leader could not write are lost with it; those that are there are bitwise the same.
        losses = {step.step: step.loss for step in run.journal().lineage}
        assert len(losses) > small.STEPS - 100
        assert losses == {step: reference[step - 1] for step in losses}
