"""The end of a run that was stopped from outside, by Ctrl-C or SIGTERM: what status.json says, and how to go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lockstep_api.v1alpha1 import DurableCheckpoint, TrainingJob
from lockstep_cli import explain, store, target
from lockstep_operator.plan.times import rfc3339


def record(folder: Path, now: float) -> str:
    """Write the end into the run's folder and return the sentences that tell of it. A run that had ended by itself
    stays as it is: then its own reason is returned, "" for a success. All of its processes must be gone."""
    job = target.load_local(folder)
    if job.status.phase is None or not job.status.phase.terminal:
        job = interrupted(job, _newest(job), now)
        path = folder / target.JOB_FILE
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(job.to_wire(), indent=1, ensure_ascii=False))
        os.replace(fresh, path)
    return explain.failure(job.status)


def interrupted(job: TrainingJob, newest: DurableCheckpoint | None, now: float) -> TrainingJob:
    """The job at its end: nothing goes on with it but its ``newest`` checkpoint."""
    from lockstep_operator.plan import lifecycle  # with all that it decides by: only for whoever needs it
    from lockstep_operator.plan.observed import Observed

    if newest:
        how = (
            f"Its newest checkpoint is of step {newest.step}; to go on from there, start it again with another "
            f"--workdir and --set checkpoint.resumeFrom={newest.uri}"
        )
    else:
        how = f"{'It has left no checkpoint; start' if job.spec.trainer else 'Start'} it again with another --workdir."
    status = lifecycle.begin(job, now)
    status = status.model_copy(
        update={"checkpoint": status.checkpoint.model_copy(update={"durable": newest, "memory": None})}
    )
    ending = lifecycle.Ending(False, "Interrupted", f"The run was interrupted. {how}")
    return job.model_copy(update={"status": lifecycle.finish(job, status, Observed(), ending, now).status})


def _newest(job: TrainingJob) -> DurableCheckpoint | None:
    """The newest checkpoint: as a folder has it, since the last ones may have been committed, and older ones removed,
    behind the status; of S3 as the status has it, since a store that is away would hold up the end."""
    known, checkpoint = job.status.checkpoint.durable, job.spec.checkpoint
    if checkpoint is None or not checkpoint.uri.startswith("file://"):
        return known
    from lockstep_trainer.checkpoint.chain import Chain
    from lockstep_trainer.errors import TrainerError
    from lockstep_trainer.storage.store import open_store

    uri = store.run_uri(job)
    try:
        chain = Chain(open_store(uri))
        point = chain.newest()
        if point is None:
            return None
        manifest = chain.manifest(point)
    except TrainerError:
        return known
    where = point.manifest if "://" in point.manifest else f"{uri}/{point.manifest}"
    return DurableCheckpoint(
        step=point.state.step, uri=where, at=rfc3339(manifest.written_at), verified=list(manifest.verified) or None
    )
