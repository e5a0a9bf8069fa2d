"""Pods as processes of this machine: `lockstep run`.

A pod is the supervisor that is PID 1 in a real one, with a run folder of its own, free ports and 127.0.0.1. Its
process ending is the pod failing. The job's status lives in memory and in ``status.json``.

::

    <state>/status.json                 the job as `kubectl get -o json` would show it
    <state>/config/job.json  token/{token,tls.crt,tls.key,ca.crt}
    <state>/pods/<name>/                run folder
    <state>/pods/<name>.log             the supervisor's output: what `kubectl logs` would show
    <state>/pods/<name>.json            {address, tls, metrics}: where its agent listens, whether with TLS, and the
                                        address of /metrics
    <state>/capacity                    a number of pods: more of them wait, as they would for nodes of a cluster.
                                        Written by whoever wants to see a job shrink and grow; without it none waits
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lockstep_api.constants import PREFLIGHT_EXIT_CODE
from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.backends import ports
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_operator.plan import children
from lockstep_operator.plan.actions import ChildKind, DeletePod, Event, LabelPod, NewPod
from lockstep_operator.plan.observed import Node, Pod

log = logging.getLogger(__name__)

CAPACITY_SECONDS = 0.5
"""Between two looks at the file ``capacity``, while pods wait."""
NODE = "local"
"""This machine, as the node of its pods."""
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL of a supervisor; its own children get a little less."""


@dataclass
class _LocalPod:
    new: NewPod
    process: asyncio.subprocess.Process
    ports: list[socket.socket]
    """Its agent's, that of rank 0's store, and that of its metrics: reserved as long as the pod is there."""
    uid: str
    created: float = field(default_factory=time.time)
    deleting: bool = False
    label: LabelPod | None = None
    watcher: asyncio.Task[None] | None = None


@dataclass(frozen=True)
class _Waiting:
    """A pod that there is no room for."""

    new: NewPod
    uid: str
    created: float


class LocalBackend:
    """One job on this machine. ``changed`` is called when a pod ends."""

    def __init__(
        self,
        state_dir: Path,
        on_status: Callable[[TrainingJobStatus], None],
        on_event: Callable[[Event], None] = lambda event: None,
        gpus: tuple[str, ...] | None = None,
        credentials: Credentials | None = None,
        *,
        fault_injection: bool = False,
    ) -> None:
        self._state_dir, self._on_status, self._on_event = state_dir, on_status, on_event
        self._gpus = _gpus_of_this_machine() if gpus is None else gpus
        self._pods: dict[str, _LocalPod] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._placing: asyncio.Task[None] | None = None
        # An authority for this run alone.
        self.credentials = credentials or Credentials(MasterKeys(secrets.token_bytes(32)))
        self.tls = True
        self._fault_injection = fault_injection
        self.changed: Callable[[], None] = lambda: None
        self.job_deleted = asyncio.Event()

    # ------------------------------------------------------------------------------------------- reading

    def pods(self, job: TrainingJob) -> tuple[Pod, ...]:
        """The supervisors."""
        waiting = tuple(
            Pod(
                name=name,
                uid=pod.uid,
                ordinal=pod.new.ordinal,
                incarnation=pod.new.incarnation,
                phase="Pending",
                created=pod.created,
                message=f"this machine has room for {self._capacity()} pods ({self._state_dir / 'capacity'})",
                role="starting",
            )
            for name, pod in self._waiting.items()
        )
        return tuple(self._view(name, pod) for name, pod in self._pods.items()) + waiting

    def nodes(self) -> Mapping[str, Node]:
        """This machine, whose condition is nobody's witness: it is the only one that there is."""
        return {NODE: Node(NODE)}

    def excluded(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def learn(self, job: TrainingJob) -> None:
        """There is one node, and no other job."""

    def _view(self, name: str, pod: _LocalPod) -> Pod:
        code = pod.process.returncode
        label = pod.label
        return Pod(
            name=name,
            uid=pod.uid,
            ordinal=pod.new.ordinal,
            incarnation=pod.new.incarnation,
            phase="Running" if code is None else "Failed",
            created=pod.created,
            node=NODE,
            address=f"127.0.0.1:{ports.number(pod.ports[0])}",
            deleting=pod.deleting,
            running=code is None,
            unfit=self._unfit(name) if code == PREFLIGHT_EXIT_CODE else "",
            message="" if code is None else f"the supervisor ended with {code}",
            slot=label.slot if label else None,
            epoch=label.epoch if label else None,
            role=label.role if label else "starting",
            tls=pod.new.tls,
        )

    # ------------------------------------------------------------------------------------------- writing

    async def write_status(self, job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        """In memory, and to status.json."""
        version = int(job.metadata.get("resourceVersion", 0)) + 1
        job = job.model_copy(update={"status": status, "metadata": {**job.metadata, "resourceVersion": str(version)}})
        path = self._state_dir / "status.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(job.to_wire(), indent=1, ensure_ascii=False))
        os.replace(fresh, path)
        self._on_status(status)
        return job

    async def create_child(self, job: TrainingJob, kind: ChildKind) -> None:
        """Files take the place of ConfigMap and Secret; a Service is not needed."""
        if kind == "ConfigMap":
            _replace(self._folder("config") / "job.json", children.job_json(job).encode())  # agents may be reading it
        elif kind == "Secret":
            for name, content in self.credentials.secret(job.uid).items():
                _replace(self._folder("token") / name, content)

    async def create_pod(self, job: TrainingJob, new: NewPod) -> None:
        """Start a supervisor, now or once there is room for it."""
        uid = str(uuid.uuid4())
        if self._has_room():
            await self._start_pod(job, new, uid)
            return
        self._waiting[new.name] = _Waiting(new, uid, time.time())
        if self._placing is None:
            self._placing = asyncio.create_task(self._place(job))
        self.changed()

    async def _place(self, job: TrainingJob) -> None:
        while self._waiting:
            await asyncio.sleep(CAPACITY_SECONDS)
            while self._waiting and self._has_room():
                name = min(self._waiting, key=lambda name: self._waiting[name].created)
                pod = self._waiting.pop(name)
                await self._start_pod(job, pod.new, pod.uid)
        self._placing = None

    def _capacity(self) -> int | None:
        try:
            return int((self._state_dir / "capacity").read_text())
        except (FileNotFoundError, ValueError):  # being written
            return None

    def _has_room(self) -> bool:
        capacity = self._capacity()
        return capacity is None or sum(pod.process.returncode is None for pod in self._pods.values()) < capacity

    async def _start_pod(self, job: TrainingJob, new: NewPod, uid: str) -> None:
        run_dir = self._folder("pods", new.name)
        reserved = ports.reserve(3)
        port, store_port, metrics_port = map(ports.number, reserved)
        environment = {
            **os.environ,
            "LOCKSTEP_POD_NAME": new.name,
            "LOCKSTEP_POD_UID": uid,
            "LOCKSTEP_NAMESPACE": job.namespace,
            "LOCKSTEP_NODE_NAME": NODE,
            "LOCKSTEP_HOST": "127.0.0.1",
            "LOCKSTEP_BIND": "127.0.0.1",
            "LOCKSTEP_AGENT_PORT": str(port),
            "LOCKSTEP_METRICS_PORT": str(metrics_port),
            "LOCKSTEP_STORE_PORT": str(store_port),
            "LOCKSTEP_ORDINAL": str(new.ordinal),
            "LOCKSTEP_INCARNATION": str(new.incarnation),
            "LOCKSTEP_RUN_DIR": str(run_dir),
            "LOCKSTEP_DATA_DIR": str(self._folder("data")),  # one machine: what one pod prepared serves them all
            "LOCKSTEP_CONFIG_DIR": str(self._folder("config")),
            "LOCKSTEP_TOKEN_DIR": str(self._folder("token")),
            "LOCKSTEP_TLS": "on" if new.tls else "off",
            "LOCKSTEP_FAULT_INJECTION": "on" if self._fault_injection else "off",
            "LOCKSTEP_DIE_WITH_PARENT": str(os.getpid()),
            "LOCKSTEP_CHECKED_NODES": ",".join(new.checked_nodes),
            "LOCKSTEP_TERMINATION_LOG": str(run_dir / "termination-log"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or _threads(job),
            "LOCKSTEP_GRACE_SECONDS": str(GRACE_SECONDS - 1),
            **self._visible_gpus(job, new.ordinal),
        }
        with run_dir.with_name(f"{new.name}.log").open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "lockstep_trainer.supervisor",
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in a terminal is for the operator alone: it ends its pods in order
            )
        pod = self._pods[new.name] = _LocalPod(new, process, reserved, uid)
        run_dir.with_name(f"{new.name}.json").write_text(
            json.dumps({"address": f"127.0.0.1:{port}", "tls": new.tls, "metrics": f"127.0.0.1:{metrics_port}"})
        )
        pod.watcher = asyncio.create_task(self._watch(new.name, pod))
        self.changed()

    async def delete_pod(self, job: TrainingJob, delete: DeletePod) -> None:
        """SIGTERM, then SIGKILL after the grace period; the pod is gone when its process is."""
        waiting = self._waiting.get(delete.name)
        if waiting is not None and waiting.uid == delete.uid:
            del self._waiting[delete.name]
            self.changed()
            return
        pod = self._pods.get(delete.name)
        if pod is None or pod.uid != delete.uid:
            return
        pod.deleting = True
        if pod.process.returncode is not None:
            self._forget(delete.name)
            self.changed()
            return
        _signal(pod.process, signal.SIGTERM)
        asyncio.get_running_loop().call_later(GRACE_SECONDS, _signal, pod.process, signal.SIGKILL)

    async def label_pod(self, job: TrainingJob, label: LabelPod) -> None:
        """Kept beside the process."""
        if (pod := self._pods.get(label.name)) and pod.uid == label.uid:
            pod.label = label

    async def post_event(self, job: TrainingJob, event: Event) -> None:
        """Handed on."""
        log.info("%s: %s", event.reason, event.message)
        self._on_event(event)

    async def delete_job(self, job: TrainingJob) -> None:
        """The run is over."""
        self.job_deleted.set()

    async def close(self) -> None:
        """End every process that was started here, and wait for it."""
        if self._placing:
            self._placing.cancel()
        for pod in self._pods.values():
            _signal(pod.process, signal.SIGTERM)
        waits = [asyncio.create_task(pod.process.wait()) for pod in self._pods.values()]
        if waits:
            await asyncio.wait(waits, timeout=GRACE_SECONDS)
            for pod in self._pods.values():
                _signal(pod.process, signal.SIGKILL)
            await asyncio.wait(waits)
        for pod in self._pods.values():
            if pod.watcher:
                pod.watcher.cancel()
        for name in list(self._pods):
            self._forget(name)

    # ------------------------------------------------------------------------------------------- details

    async def _watch(self, name: str, pod: _LocalPod) -> None:
        await pod.process.wait()
        if pod.deleting:
            self._forget(name)
        self.changed()

    def _forget(self, name: str) -> None:
        if pod := self._pods.pop(name, None):
            ports.release(pod.ports)

    def _folder(self, *parts: str) -> Path:
        path = self._state_dir.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _unfit(self, pod: str) -> str:
        """What its preflight checks found: a kubelet would have it from the same file."""
        try:
            return self._folder("pods", pod).joinpath("termination-log").read_text().strip()
        except FileNotFoundError:
            return "its preflight checks failed"

    def _visible_gpus(self, job: TrainingJob, ordinal: int) -> dict[str, str]:
        """Each pod sees its own GPUs, as it would in a container; spares share with those whose place they take."""
        count = job.spec.gpus_per_node
        if len(self._gpus) < job.spec.nodes * count:
            return {}
        first = (ordinal % job.spec.nodes) * count
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[first : first + count])}


def _replace(path: Path, content: bytes) -> None:
    """At once, and for nobody else to read."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600)
    fresh.write_bytes(content)
    fresh.replace(path)


def _gpus_of_this_machine() -> tuple[str, ...]:
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(filter(None, visible.split(",")))
    numbers = (re.fullmatch(r"nvidia(\d+)", entry.name) for entry in Path("/dev").iterdir())
    return tuple(sorted(match[1] for match in numbers if match))


def _threads(job: TrainingJob) -> str:
    """Threads of a worker: its pods share one machine, and more threads than cores only wait for each other."""
    return str(max(1, len(os.sched_getaffinity(0)) // (job.spec.nodes * job.spec.gpus_per_node)))


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.send_signal(number)
