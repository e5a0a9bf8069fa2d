"""What a callback is, and what it is told.

A callback runs on rank 0 only, in a thread of its own: it may be slow, and it may fail, and training goes on. It gets
plain values and must not touch model, optimizer or process groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.config import Job, Orders

Outcome = Literal["finished", "failed", "interrupted"]
"""``finished``: the last step is done. ``failed``: the job ends with an error. ``interrupted``: this process ends, and
the job goes on in another one that continues the same run."""


@dataclass(frozen=True, slots=True)
class Run:
    """The job, at the start of one of its processes. A job that was restarted n times tells this n + 1 times."""

    name: str
    namespace: str
    uid: str
    """The job's own; the same over all restarts."""
    spec: Mapping[str, Any]
    """The job's spec as in the manifest, with all defaults; without the pod template, which may hold secrets."""
    step: int
    """Steps done: 0 for a fresh start, else that of the state that was loaded. The next step is ``step + 1``."""
    steps: int
    """Steps in all."""
    epoch: int
    generation: int
    """With epoch, the number of this start."""
    world_size: int
    parameters: int | None
    """Weights of the model, a tied one once."""
    store: str
    """URI of the job's own folder, where its checkpoints lie."""
    s3: S3Spec
    """How that is reached."""

    @classmethod
    def of(cls, job: Job, orders: Orders, *, step: int, parameters: int | None) -> Run:
        """What a worker knows of its job."""
        spec = job.spec.to_wire()
        spec.pop("template", None)
        return cls(
            name=job.name,
            namespace=job.namespace,
            uid=job.uid,
            spec=spec,
            step=step,
            steps=job.trainer.recipe.steps,
            epoch=orders.epoch,
            generation=orders.generation,
            world_size=orders.world_size,
            parameters=parameters,
            store=f"{job.checkpoint.uri.rstrip('/')}/{job.prefix}",
            s3=job.checkpoint.s3,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step."""

    step: int
    at: float
    """Unix seconds at its end."""
    seconds: float
    """Wall time."""
    loss: float
    """Nats per token, over the global batch."""
    tokens: int
    """Over all ranks."""
    grad_norm: float
    lr: float
    sections: Mapping[str, float] = field(default_factory=dict)
    """Section → seconds of rank 0."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """What else was measured: mfu, memory_bytes and the like."""

    def scalars(self) -> dict[str, float]:
        """Name → value, as trackers show them."""
        return {
            "train/loss": self.loss,
            "train/grad_norm": self.grad_norm,
            "train/lr": self.lr,
            "train/tokens_per_second": self.tokens / self.seconds if self.seconds > 0 else 0.0,
            "train/seconds": self.seconds,
            **{f"train/{name}": value for name, value in self.extra.items()},
            **{f"seconds/{name}": value for name, value in self.sections.items()},
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss on held-out documents."""

    step: int
    loss: float
    """Nats per token, over all sources."""
    tokens: int
    sources: Mapping[str, float] = field(default_factory=dict)
    """Source → nats per token."""

    def scalars(self) -> dict[str, float]:
        """Name → value, as trackers show them."""
        return {"eval/loss": self.loss, **{f"eval/{name}/loss": value for name, value in self.sources.items()}}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state was saved from which the job may go on: what a tracker has not stored of earlier steps is not told
    again."""

    step: int
    seconds: float
    """That training waited."""


class Callback:
    """Base class of callbacks: override what you need.

    Hooks are called one at a time, in order. An exception is logged and turns this callback off; the job goes on. To
    refuse wrong options raise ``lockstep_trainer.errors.UserError`` in the constructor: that ends the job with your
    sentence. After a fault steps are computed again and told again: ``Run.step`` says from where.
    """

    def on_start(self, run: Run) -> None:
        """A process of the job is about to train."""

    def on_step(self, step: Step) -> None:
        """An optimizer step is done. Where hooks take longer than steps, some steps are left out."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation is done. Never left out."""

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        """A checkpoint was saved: write out what you hold back. Never left out."""

    def on_end(self, outcome: Outcome) -> None:
        """This process ends. Not called where it is killed."""
