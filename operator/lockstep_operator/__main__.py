"""The operator's process: ``python -m lockstep_operator``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import kopf
import yaml

from lockstep_api import heap
from lockstep_operator import handlers
from lockstep_operator.backends.kubernetes import KubernetesBackend
from lockstep_operator.cache import ClusterCache
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_operator.errors import ConfigError
from lockstep_operator.events import EventPoster
from lockstep_operator.health import serve
from lockstep_operator.jobs import Jobs
from lockstep_operator.kube import KubeClient, credentials
from lockstep_operator.lease import Lease
from lockstep_operator.metrics import OperatorMetrics
from lockstep_operator.nodememory import NodeMemory
from lockstep_operator.plan.nodes.exclusion import Limits
from lockstep_operator.plan.pods import PodDefaults
from lockstep_operator.plan.renewal import Validity

log = logging.getLogger("lockstep_operator")

WATCH_AGE_LIMIT_SECONDS = 180.0
"""A watch that was silent for so long is broken: bookmarks come every minute. The kubelet then starts the operator
again."""
KEY_BYTES = 16
MEMORY_SECONDS = 5.0
"""How long a start waits for the memory of nodes, so that no pod is made for a node that is excluded."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    namespaces: tuple[str, ...]
    keys: MasterKeys
    validity: Validity
    tls: bool
    trainer_image: str
    bind: str
    metrics_port: int
    health_port: int
    lease: str
    lease_namespace: str
    identity: str
    findings: str
    fault_injection: bool
    node_memory: str
    node_limits: Limits
    taint_nodes: bool
    node_conditions: bool
    log_level: str


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line and the environment. Raises errors.ConfigError."""
    parser = argparse.ArgumentParser(prog="lockstep-operator", description="Serves TrainingJobs.")
    parser.add_argument("--namespace", action="append", default=[], help="serve this one only; may be repeated")
    parser.add_argument(
        "--master-key-file", type=Path, required=True, help="secret that tokens and certificates come from"
    )
    parser.add_argument(
        "--accepted-keys-file", type=Path, help="further keys, a line each, that are believed; it may be missing"
    )
    parser.add_argument(
        "--certificate-seconds", type=float, default=Validity().seconds, help="how long they are valid; %(default)g"
    )
    parser.add_argument(
        "--certificate-renewal-seconds", type=float, default=Validity().renew_seconds, help="default: %(default)g"
    )
    parser.add_argument("--no-tls", action="store_true", help="pods of jobs that start speak without TLS")
    parser.add_argument("--trainer-image", default=PodDefaults().image, help="image of pods whose template names none")
    parser.add_argument(
        "--findings-file", type=Path, help="rows that change the table of findings of preflight checks, as YAML"
    )
    parser.add_argument(
        "--fault-injection", action="store_true", help="faults may be made on purpose, by `lockstep inject`"
    )
    parser.add_argument("--bind-address", default="0.0.0.0", help="for metrics and health; default: %(default)s")
    parser.add_argument("--metrics-port", type=int, default=8080, help="default: %(default)s")
    parser.add_argument("--health-port", type=int, default=8081, help="default: %(default)s")
    parser.add_argument("--lease", default="lockstep-operator", help="name of the Lease; default: %(default)s")
    parser.add_argument("--lease-namespace", default=os.environ.get("POD_NAMESPACE", "default"))
    limits = Limits()
    parser.add_argument(
        "--node-memory",
        default="lockstep-operator-nodes",
        help="ConfigMap beside the Lease that remembers faults of nodes; default: %(default)s",
    )
    parser.add_argument(
        "--exclude-nodes-per-hour",
        type=int,
        default=limits.per_hour,
        help="at most so many by their score; 0: none; default: %(default)s",
    )
    parser.add_argument(
        "--exclude-nodes-share",
        type=float,
        default=limits.share,
        help="of the cluster, at most, at any time; default: %(default)s",
    )
    parser.add_argument("--taint-nodes", action="store_true", help="taint excluded nodes (needs the right to)")
    parser.add_argument(
        "--node-conditions", action="store_true", help="say in a condition that a node is excluded (needs the right to)"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    given = parser.parse_args(argv)
    return Options(
        namespaces=tuple(given.namespace),
        keys=MasterKeys(_master_key(given.master_key_file), _accepted_keys(given.accepted_keys_file)),
        validity=Validity(given.certificate_seconds, given.certificate_renewal_seconds),
        tls=not given.no_tls,
        trainer_image=given.trainer_image,
        findings=_findings(given.findings_file),
        fault_injection=given.fault_injection,
        bind=given.bind_address,
        metrics_port=given.metrics_port,
        health_port=given.health_port,
        lease=given.lease,
        lease_namespace=given.lease_namespace,
        # The process is part of the name: a container that starts again must not believe it still holds the lease.
        identity=f"{os.environ.get('POD_NAME', socket.gethostname())}_{os.getpid()}_{os.urandom(3).hex()}",
        node_memory=given.node_memory,
        node_limits=_limits(given.exclude_nodes_per_hour, given.exclude_nodes_share),
        taint_nodes=given.taint_nodes,
        node_conditions=given.node_conditions,
        log_level=given.log_level,
    )


async def run(options: Options) -> int:
    """Serve until the lease is lost or a signal comes; the exit code."""
    async with KubeClient(credentials()) as client:
        events = EventPoster(client)
        cache = ClusterCache(client, options.namespaces)
        memory = NodeMemory(
            client,
            events,
            options.lease_namespace,
            options.node_memory,
            nodes=cache.nodes,
            limits=options.node_limits,
            taint=options.taint_nodes,
            condition=options.node_conditions,
        )
        cache.nodes_changed = memory.look
        defaults = PodDefaults(
            options.trainer_image,
            tls=options.tls,
            findings=options.findings,
            fault_injection=options.fault_injection,
        )
        own = Credentials(options.keys, options.validity)
        backend = KubernetesBackend(client, cache, memory=memory, events=events, defaults=defaults, credentials=own)
        jobs = Jobs(client, options.namespaces, backend)
        cache.wake = jobs.wake
        working = False

        def age() -> float:
            return cache.age() if working else 0.0

        metrics = OperatorMetrics(jobs.known, age, memory)
        jobs.reporter = metrics
        lease = Lease(client, options.lease_namespace, options.lease, options.identity)
        async with serve(
            options.bind,
            metrics_port=options.metrics_port,
            health_port=options.health_port,
            registry=metrics.registry,
            healthy=lambda: age() < WATCH_AGE_LIMIT_SECONDS,
        ):
            await lease.acquire()
            working = True
            metrics.leading.set(1)
            try:
                return await _work(options, jobs, cache, memory, lease)
            finally:
                await jobs.close()
                await lease.release()


async def _work(options: Options, jobs: Jobs, cache: ClusterCache, memory: NodeMemory, lease: Lease) -> int:
    """The first of these to end ends the others: the lease, the watches, Kopf. Exit code 1 asks for a new start."""
    watching = asyncio.create_task(cache.run(), name="pods and nodes")
    remembering = asyncio.create_task(memory.run(), name="memory of nodes")
    holding = asyncio.create_task(lease.hold(), name="lease")
    trimming = asyncio.create_task(heap.keep_trimmed(), name="heap")
    tasks = [watching, remembering, holding, trimming]
    synced = asyncio.create_task(cache.synced())
    try:
        await asyncio.wait([*tasks, synced], return_when=asyncio.FIRST_COMPLETED)
        if not synced.done():
            return 1
        with suppress(TimeoutError):  # an operator that may not read its memory works without
            await asyncio.wait_for(memory.synced(), MEMORY_SECONDS)
        serving = asyncio.create_task(
            kopf.operator(
                registry=handlers.registry(jobs),
                settings=handlers.settings(),
                namespaces=options.namespaces,
                clusterwide=not options.namespaces,
                standalone=True,
            ),
            name="kopf",
        )
        tasks += [asyncio.create_task(jobs.relist(), name="relist"), serving]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if serving in done:
            return 0  # Kopf takes SIGTERM and SIGINT over, and ends by itself on nothing else
        log.error("%s has ended; the operator ends too", ", ".join(task.get_name() for task in done))
        return 1
    finally:
        for task in [*tasks, synced]:
            task.cancel()
        await asyncio.gather(*tasks, synced, return_exceptions=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    # Kopf asks for the user's name, and a container's uid need not have one.
    os.environ.setdefault("LOGNAME", "lockstep")
    try:
        options = parse(argv)
        logging.basicConfig(
            level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        logging.getLogger("kopf").setLevel(logging.WARNING)
        return asyncio.run(_until_signal(options))
    except ConfigError as error:
        print(f"lockstep-operator: {error}", file=sys.stderr)
        return 2


async def _until_signal(options: Options) -> int:
    work = asyncio.create_task(run(options))
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        return work.result()
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work
    return 0


def _limits(per_hour: int, share: float) -> Limits:
    if per_hour < 0:
        raise ConfigError(f"--exclude-nodes-per-hour {per_hour}: choose 0 (none) or more")
    if not 0 <= share <= 1:
        raise ConfigError(f"--exclude-nodes-share {share}: choose a share between 0 and 1, such as 0.1")
    return Limits(per_hour, share)


def _master_key(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--master-key-file {path}: {error.strerror}; mount the Secret with the key there") from None
    return _long_enough(key, f"--master-key-file {path}")


def _accepted_keys(path: Path | None) -> tuple[bytes, ...]:
    try:
        keys = path.read_bytes().split() if path else []
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError(f"--accepted-keys-file {path}: {error.strerror}") from None
    return tuple(_long_enough(key, f"--accepted-keys-file {path}") for key in keys)


def _findings(path: Path | None) -> str:
    """Text that is an object; what its rows mean is known to the trainer image, whose table it changes."""
    if path is None:
        return ""
    try:
        text = path.read_text()
        rows = yaml.safe_load(text) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--findings-file {path}: {error}") from None
    if not isinstance(rows, dict):
        raise ConfigError(f"--findings-file {path}: it must be an object with parts such as gpu and xids")
    return text if rows else ""


def _long_enough(key: bytes, where: str) -> bytes:
    if len(key) < KEY_BYTES:
        raise ConfigError(f"{where}: {len(key)} bytes are too few; use at least {KEY_BYTES} random ones")
    return key


if __name__ == "__main__":
    sys.exit(main())
