"""Jobs for end-to-end tests: small ones, and what one does with a running one."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from checker.chain import latest_pointer
from checker.check import Verdict, check
from checker.stores import BucketObjects
from demonstration import faults, install
from demonstration.target import DemoError, Target
from demonstration.watch import JobWatch, watch
from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob

NAMESPACE = "lockstep-e2e"
BUCKET = "lockstep-e2e"
TRAINER: dict[str, Any] = {
    "model": {"preset": "llama-debug", "overrides": {"layers": 2, "dim": 32}},
    "tokenizer": {"train": {"vocabSize": 300}},
    "data": {
        "sources": [{"uri": "file://{stdlib}/**/*.py", "maxBytes": 1_000_000}],
        "sequenceLength": 32,
        "holdout": 0.2,
    },
    "recipe": {"steps": 100, "globalBatchTokens": 256, "precision": "fp32"},
    "evaluate": {"every": 100, "batches": 1},
}
POD_SPEC: dict[str, Any] = {
    "terminationGracePeriodSeconds": 2,
    "containers": [
        {
            "name": constants.CONTAINER_NAME,
            # All nodes share this machine's cores: a worker that takes them all makes each step three times as long.
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
            "resources": {
                "limits": {"nvidia.com/gpu": 1, "memory": "3Gi"},
                "requests": {"cpu": "100m", "memory": "1Gi"},
            },
        }
    ],
}


class RunningJob:
    """A job in the cluster, watched. Use as a context manager: it is deleted at the end."""

    def __init__(self, target: Target, name: str, spec: dict[str, Any]) -> None:
        self.target, self.name = target, name
        self.manifest: dict[str, Any] = {
            "apiVersion": constants.API_VERSION,
            "kind": constants.KIND,
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"nodes": 2, "gpusPerNode": 1, "template": {"spec": POD_SPEC}, **spec},
        }
        self._stack = ExitStack()
        self._watch: JobWatch

    @classmethod
    def training(
        cls,
        target: Target,
        name: str,
        steps: int,
        *,
        every: int = 10,
        model: dict[str, Any] | None = None,
        checkpoint: dict[str, Any] | None = None,
        **spec: Any,
    ) -> RunningJob:
        """A job of Lockstep's own trainer with checkpoints on the S3 server; ``checkpoint``: further fields of that."""
        trainer = {**TRAINER, "recipe": {**TRAINER["recipe"], "steps": steps}, "model": model or TRAINER["model"]}
        s3 = {"endpoint": target.s3.endpoint_pods, "pathStyle": True, "secretRef": {"name": install.SECRET}}
        # The checker follows the chain to its beginning: nothing may be retired from it.
        saved = {"uri": f"s3://{BUCKET}/runs", "every": every, "keep": {"last": 10_000}, "s3": s3, **(checkpoint or {})}
        return cls(target, name, {"trainer": trainer, "checkpoint": saved, **spec})

    def __enter__(self) -> RunningJob:
        self.target.apply(self.manifest)
        self.watch_again()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self.kubectl("delete", "trainingjob", self.name, "--ignore-not-found", "--wait=true", "--timeout=60s")

    def watch_again(self) -> None:
        """Watches anew: a watch ends with the API server that it was made of."""
        self._stack.close()
        self._watch = self._stack.enter_context(watch(self.target, NAMESPACE, self.name))

    def kubectl(self, *arguments: str) -> str:
        """kubectl in the tests' namespace."""
        return self.target.kubectl("-n", NAMESPACE, *arguments)

    def until(self, condition: Callable[[TrainingJob], bool], seconds: float, what: str) -> TrainingJob:
        """Waits for a state of the job; one that does not come fails with all that there is to say about the job."""
        try:
            return self._watch.until(condition, seconds, what)
        except DemoError as error:
            raise AssertionError(f"{error}\n\n{self.story()}") from error

    def look(self, seconds: float) -> TrainingJob | None:
        """What has become of the job: waits so long for a change, None where there was none."""
        try:
            return self._watch.next(seconds)
        except DemoError:  # the API server ends each watch after half an hour to an hour
            self.watch_again()
            return None

    def story(self, lines: int = 15) -> str:
        """What has become of the job, on a page: its faults, and the last lines that each of its pods wrote."""
        now = self.job.status
        told = [f"{self.name}: {now.phase}, epoch {now.epoch}, step {now.progress.step}, slots {now.slots}"]
        told += [f"{one.type} {one.status}, {one.reason}: {one.message}" for one in now.conditions]
        told += [str(one.model_dump(exclude_none=True)) for one in (*now.faults, *now.verdicts, *now.excluded_nodes)]
        told += [f"restarts {now.restarts}; budgets used {now.budgets_used}; incarnations {now.incarnations}"]
        for pod in self.pod_names():
            try:
                told.append(f"{pod}:\n{self.kubectl('logs', pod, '-c', constants.CONTAINER_NAME, f'--tail={lines}')}")
            except DemoError as error:  # its node may have no power
                told.append(f"{pod}: {error}")
        return "\n".join(told)

    def until_step(self, step: int, seconds: float = 120) -> TrainingJob:
        """Waits for a step."""
        return self.until(lambda job: job.status.progress.step >= step, seconds, f"step {step}")

    def until_phase(self, phase: str, seconds: float = 120) -> TrainingJob:
        """Waits for a phase."""
        return self.until(lambda job: job.status.phase == phase, seconds, phase)

    def mended(self, before: TrainingJob, seconds: float = 120) -> TrainingJob:
        """Waits until it has taken new steps after one more restart than ``before``."""
        restarted = self.until(
            lambda job: job.status.restarts.total > before.status.restarts.total and job.status.phase == "Running",
            seconds, "recovery",
        )  # fmt: skip
        return self.until_step(restarted.status.progress.step + 2)

    @property
    def job(self) -> TrainingJob:
        """The job as it is now."""
        return TrainingJob.model_validate(json.loads(self.kubectl("get", "trainingjob", self.name, "-o", "json")))

    def pods(self) -> list[dict[str, Any]]:
        """Pods that hold a slot, by slot."""
        return faults.pods(self.target, NAMESPACE, self.name)

    def pod_names(self) -> list[str]:
        """Their names."""
        return [pod["metadata"]["name"] for pod in self.pods()]

    def event_reasons(self) -> set[str]:
        """Reasons of the job's events: what `kubectl describe` shows."""
        selector = f"involvedObject.name={self.name},involvedObject.kind={constants.KIND}"
        found = json.loads(self.kubectl("get", "events", "--field-selector", selector, "-o", "json"))
        return {event["reason"] for event in found["items"]}

    def kill_in(self, pod: str, module: str) -> None:
        """SIGKILL to the process of a pod that runs ``python -m module``."""
        code = (
            "import os, pathlib, signal\n"
            "for entry in pathlib.Path('/proc').glob('[0-9]*'):\n"
            "    try: words = (entry / 'cmdline').read_bytes().split(b'\\0')\n"
            "    except OSError: continue\n"
            "    standby = (entry / 'comm').read_text().strip() == 'agent (standby)'\n"
            f"    if {module.encode()!r} in words and int(entry.name) != 1 and not standby:\n"
            "        os.kill(int(entry.name), signal.SIGKILL); print(entry.name); break\n"
            "else: raise SystemExit('not running')\n"
        )
        self.target.exec(NAMESPACE, pod, ["python3", "-c", code])

    @property
    def uri(self) -> str:
        """Where its checkpoints and its journal are."""
        job = self.job
        return f"s3://{BUCKET}/runs/{NAMESPACE}/{job.name}/{job.uid}"

    @property
    def objects(self) -> BucketObjects:
        """What is there."""
        return BucketObjects(self.uri, self.target.s3.endpoint_host)

    def check(self, steps: int | None = None, origin: RunningJob | None = None, *, ended: bool = True) -> Verdict:
        """The checker's verdict; ``steps`` is how many the job was to do, None: as far as it came. ``origin``: the job
        from whose checkpoint it began, so that the lineage goes on in there. Not ``ended``: it is only suspended."""
        objects = Resumed(self.objects, origin.uri, origin.objects) if origin else self.objects
        return check(objects, steps=steps, ended=ended)

    def durable_step(self) -> int:
        """The step of the newest checkpoint in the store, 0 where none is: what status can only repeat."""
        point = latest_pointer(self.objects)["point"]
        return int(point["state"]["step"]) if point else 0

    def journal(self, kind: str) -> list[dict[str, Any]]:
        """The journal's lines of this kind, by time."""
        objects = self.objects
        keys = [key for key in objects.names() if key.startswith("journal/")]
        lines = [json.loads(line) for key in keys for line in objects.read(key).splitlines()]
        return sorted((line for line in lines if line["kind"] == kind), key=lambda line: line["at"])


@dataclass(frozen=True)
class Resumed:
    """The objects of a job, and behind them those of the job from whose checkpoint it began."""

    own: BucketObjects
    origin_uri: str
    origin: BucketObjects

    def names(self) -> list[str]:
        """Names of its own objects."""
        return self.own.names()

    def read(self, key: str) -> bytes:
        """Its own, else the other job's: a first manifest names its parent by URI, that one names its own by key."""
        try:
            return self.own.read(key)
        except KeyError:
            return self.origin.read(key.removeprefix(f"{self.origin_uri}/"))
