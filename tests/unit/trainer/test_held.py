"""Whole workers that are asked for a last state: behind it they make no step, whatever they would have done next."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from awaited import eventually
from forked import rendezvous_store, start_workers, wait_all, worker_folders
from lockstep_trainer.checkpoint.request import ask
from lockstep_trainer.steprecord import StepReader
from staged import keeping, snapshots_of, staged_states
from unit.trainer.test_worker import meeting, write_job

STEPS = 100_000
"""Only the last step has the section that is waited for, and it is far away."""


def test_no_step_follows_the_last_state(tmp_path: Path) -> None:
    recipe = {"steps": STEPS, "globalBatchTokens": 128, "precision": "fp32", "seed": 3}
    job = write_job(tmp_path, recipe=recipe, evaluate=None, generate=None)
    with rendezvous_store() as port:
        folders = worker_folders(tmp_path, job, ranks=2, port=port, rendezvous=meeting(port, "held"))
        with keeping(folders[0]):
            pids = start_workers(folders)
            try:
                eventually((folders[0] / "steps").exists, "the first worker", 120)
                reader = StepReader(folders[0] / "steps")
                done = [record.step for record in eventually(reader.new_records, "a step", 120)]
                ask(snapshots_of(folders[0]), hold=True)
                eventually(lambda: reader.section == "checkpoint", "the workers wait", 120)
                done += [record.step for record in reader.new_records()]
                eventually(lambda: staged_states(folders[0])[-1:], "the state", 120)
                assert staged_states(folders[0])[-1].step == done[-1]
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                wait_all(pids)
