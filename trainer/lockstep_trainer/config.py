"""What a worker is told: the job (``job.json``) and its orders for one generation (``start.json``)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lockstep_api.messages import Doubt, Rendezvous, RestorePoint, StateId, Term
from lockstep_api.v1alpha1 import CheckpointSpec, TrainerSpec, TrainingJobSpec
from lockstep_api.v1alpha1.widths import resized
from lockstep_trainer.errors import TrainerError, UserError


@dataclass(frozen=True, slots=True)
class Job:
    """The job as ``job.json`` holds it: identity, and the whole spec with its defaults."""

    name: str
    namespace: str
    uid: str
    spec: TrainingJobSpec
    trainer: TrainerSpec
    checkpoint: CheckpointSpec

    @property
    def prefix(self) -> str:
        """Where the job's checkpoints lie below ``checkpoint.uri``."""
        return f"{self.namespace}/{self.name}/{self.uid}"

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.trainer.recipe.global_batch_tokens // self.trainer.data.sequence_length

    def on(self, world_size: int) -> Job:
        """The job as ``world_size`` ranks train it: the operator may leave out whole data-parallel replicas. Raises
        UserError where its degrees of parallelism can't be had on so many."""
        full = self.spec.nodes * self.spec.gpus_per_node
        try:
            layout = resized(self.spec.parallelism, full, world_size)
        except ValueError as error:
            raise UserError(f"parallelism: {error}") from None
        nodes = world_size // self.spec.gpus_per_node
        return replace(self, spec=self.spec.model_copy(update={"nodes": nodes, "parallelism": layout}))


@dataclass(frozen=True, slots=True)
class Recall:
    """A snapshot in memory to start from, before ``restore`` is looked at."""

    state: StateId


@dataclass(frozen=True, slots=True)
class Orders:
    """A worker's orders: ``start.json``, written by its agent."""

    job: str  # path of job.json
    job_uid: str
    epoch: int
    generation: int
    rank: int
    local_rank: int
    node_rank: int
    world_size: int
    local_world_size: int
    rendezvous: Rendezvous
    restore: RestorePoint | None
    data_dir: str
    memory: Recall | None = None
    stays: bool = False
    """Between two generations the process waits for its agent to tell it to go on."""
    doubt: Doubt | None = None
    """What nobody could say who was wrong about, and is made again."""
    faults: str | None = None
    """Folder of the faults that are ordered of this device; None where none may be."""

    @property
    def term(self) -> Term:
        """The generation that this worker belongs to."""
        return Term(self.epoch, self.generation)


_ORDERS = TypeAdapter(Orders)


def check_work(job: Job, orders: Orders) -> None:
    """Raises UserError where another job's checkpoint is at the last step, and nothing is asked for behind it. The
    job's own may be there: what ends behind the last save is started again."""
    begin, spec = orders.restore, job.trainer
    if begin is None or "://" not in begin.manifest or spec.evaluate or spec.generate or spec.export:
        return
    if begin.state.step >= spec.recipe.steps:
        raise UserError(
            f"checkpoint.resumeFrom: {begin.manifest} is at step {begin.state.step} of {spec.recipe.steps} already, "
            "and no step is left to train; raise trainer.recipe.steps"
        )


def load_job(path: Path) -> Job:
    """Read ``job.json``; raises UserError naming the field that is wrong."""
    document = _read(path)
    try:
        spec = TrainingJobSpec.of_server(document["spec"])
        name, namespace, uid = (str(document[key]) for key in ("name", "namespace", "uid"))
    except KeyError as error:
        raise UserError(f"{path} has no {error}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}") from None
    if spec.trainer is None or spec.checkpoint is None:
        raise UserError(f"{path}: this worker runs spec.trainer, with spec.checkpoint; the job has spec.command")
    return Job(name, namespace, uid, spec, spec.trainer, spec.checkpoint)


def load_orders(path: Path) -> Orders:
    """Read ``start.json``; raises TrainerError where the agent wrote something else."""
    try:
        return _ORDERS.validate_python(_read(path))
    except ValidationError as error:
        raise TrainerError(f"{path}: {_first(error)}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrainerError(f"{path} can't be read: {error}") from None
    if not isinstance(document, dict):
        raise TrainerError(f"{path} holds no JSON object")
    return document


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'spec'}: {first['msg'].removeprefix('Value error, ')}"
