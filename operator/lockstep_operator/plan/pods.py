"""Renders a pod from the job's template. What the template says stands; what it leaves open gets safe defaults."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_operator.plan.actions import NewPod
from lockstep_operator.plan.children import config_map_name, labels, owner_reference, secret_name, service_name
from lockstep_operator.plan.pool import template_annotations

Manifest = dict[str, Any]

GPU_RESOURCE = "nvidia.com/gpu"
TERMINATION_LOG = "/dev/termination-log"
"""Where a kubelet looks for a container's last words if its template names no other file."""
CHECKED_BYTES = 100_000
GRACE_SECONDS = 30
GRACE_MARGIN_SECONDS = 5
"""What is left of a pod's grace period, half of it at most, when its processes have ended by themselves."""


@dataclass(frozen=True, slots=True)
class PodDefaults:
    """What the administrator of the operator chooses for pods whose template does not say."""

    image: str = "ghcr.io/lockstep/trainer:0.1.0"
    tls: bool = True  # agents of jobs that start speak TLS
    findings: str = ""  # the administrator's rows of the table of findings, as YAML
    fault_injection: bool = False  # `lockstep inject` is allowed


def render(job: TrainingJob, new: NewPod, defaults: PodDefaults) -> Manifest:
    """The whole pod, as it is sent to the API server. Raises AttributeError, KeyError, TypeError or ValueError where no
    pod can be made from the template."""
    template = copy.deepcopy({"metadata": job.spec.template.metadata, "spec": job.spec.template.spec})
    metadata, spec = _given(template["metadata"]), _given(template["spec"])
    for name in ("labels", "annotations"):
        if not isinstance(metadata.get(name, {}), Mapping):
            raise TypeError(f"metadata.{name}: {metadata[name]!r} is no mapping of names to texts")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": new.name,
            "namespace": job.namespace,
            "labels": {
                **metadata.get("labels", {}),
                **labels(job),
                constants.LABEL_ORDINAL: str(new.ordinal),
                constants.LABEL_INCARNATION: str(new.incarnation),
                constants.LABEL_ROLE: "starting",
            },
            "annotations": {
                **metadata.get("annotations", {}),
                constants.ANNOTATION_TLS: "on" if new.tls else "off",
            },
            "ownerReferences": [owner_reference(job)],
        },
        "spec": _spec(job, new, spec, defaults),
    }


def _spec(job: TrainingJob, new: NewPod, spec: Manifest, defaults: PodDefaults) -> Manifest:
    containers = spec.get("containers") or []
    found = next((one for one in containers if one.get("name") == constants.CONTAINER_NAME), None)
    others = [one for one in containers if one is not found]
    own = _given(found or {})
    added = _volumes(job, own)
    spec["containers"] = [_container(job, new, own, [mount for mount, _ in added], defaults), *others]
    # A worker or agent that dies is handled inside the pod; a container that dies starts again in place and finds
    # its memory-backed volume as it left it.
    spec["restartPolicy"] = "Always"
    spec["hostname"], spec["subdomain"] = new.name, service_name(job)
    spec.setdefault("terminationGracePeriodSeconds", GRACE_SECONDS)
    spec.setdefault("enableServiceLinks", False)
    if "serviceAccountName" not in spec:
        spec.setdefault("automountServiceAccountToken", False)
    security = spec.setdefault("securityContext", {})
    security.setdefault("runAsNonRoot", True)
    security.setdefault("seccompProfile", {"type": "RuntimeDefault"})
    # Without a time limit: who is replaced, and when, is the operator's decision and not the taint manager's.
    spec["tolerations"] = [
        *spec.get("tolerations", []),
        *(
            {"key": f"node.kubernetes.io/{taint}", "operator": "Exists", "effect": "NoExecute"}
            for taint in ("not-ready", "unreachable")
        ),
    ]
    taken = {volume["name"] for volume in spec.get("volumes", [])}
    spec["volumes"] = [
        *spec.get("volumes", []),
        *(volume for _, volume in added if volume["name"] not in taken),
    ]
    if new.exclude_nodes:
        _exclude(spec, new.exclude_nodes)
    if new.avoid_nodes:
        _avoid(spec, new.avoid_nodes)
    return spec


def _container(
    job: TrainingJob, new: NewPod, container: Manifest, mounts: list[Manifest], defaults: PodDefaults
) -> Manifest:
    port = agent_port(job)
    container["name"] = constants.CONTAINER_NAME
    container.setdefault("image", new.image or defaults.image)
    # `python3` is what both a virtual environment and a distribution's own Python are called on PATH.
    container["command"] = ["python3", "-m", "lockstep_trainer.supervisor"]
    container.pop("args", None)
    ended = {"name": "LOCKSTEP_TERMINATION_LOG", "value": container.get("terminationMessagePath", TERMINATION_LOG)}
    # Always said: whether faults may be made is the administrator's word, not a template's.
    allowed = {"name": "LOCKSTEP_FAULT_INJECTION", "value": "on" if defaults.fault_injection else "off"}
    own = [*_environment(job, new, port), ended, allowed]
    names = {variable["name"] for variable in own}
    container["env"] = [*own, *(one for one in container.get("env", []) if one["name"] not in names)]
    container["ports"] = [
        *container.get("ports", []),
        {"name": constants.AGENT_PORT_NAME, "containerPort": port, "protocol": "TCP"},
        {"name": constants.METRICS_PORT_NAME, "containerPort": metrics_port(port), "protocol": "TCP"},
    ]
    container["volumeMounts"] = [*container.get("volumeMounts", []), *mounts]
    _request_gpus(container, job.spec.gpus_per_node)
    security = container.setdefault("securityContext", {})
    if not security.get("privileged"):
        security.setdefault("allowPrivilegeEscalation", False)
        security.setdefault("capabilities", {"drop": ["ALL"]})
    return container


def _given(fields: Mapping[str, Any]) -> Manifest:
    """Fields that have a value: null is as if they were left out, for the API server too."""
    return {name: value for name, value in fields.items() if value is not None}


def agent_port(job: TrainingJob) -> int:
    """The agent's port: constants.AGENT_PORT, or the template's annotation where pods share their host's network.
    Raises ValueError for one that is no number."""
    port = str(template_annotations(job).get(constants.ANNOTATION_AGENT_PORT, constants.AGENT_PORT))
    if not port.isdecimal():
        raise ValueError(f"metadata.annotations[{constants.ANNOTATION_AGENT_PORT}]: {port!r} is no port's number")
    return int(port)


def metrics_port(agent_port: int) -> int:
    """The port beside it, for /healthz and /metrics without TLS."""
    return agent_port + constants.METRICS_PORT - constants.AGENT_PORT


def until_end(job: TrainingJob) -> float:
    """Seconds from SIGTERM in which the pod's processes have to end, a last checkpoint included."""
    grace = float(_given(job.spec.template.spec).get("terminationGracePeriodSeconds", GRACE_SECONDS))
    return max(grace - GRACE_MARGIN_SECONDS, grace / 2)


def _environment(job: TrainingJob, new: NewPod, port: int) -> list[Manifest]:
    variables: list[Manifest] = [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
        for name, path in (
            ("LOCKSTEP_POD_NAME", "metadata.name"),
            ("LOCKSTEP_POD_UID", "metadata.uid"),
            ("LOCKSTEP_NAMESPACE", "metadata.namespace"),
            ("LOCKSTEP_NODE_NAME", "spec.nodeName"),
            ("LOCKSTEP_HOST", "status.podIP"),
        )
    ]
    variables += [
        {"name": name, "value": value}
        for name, value in (
            ("LOCKSTEP_BIND", "0.0.0.0"),
            ("LOCKSTEP_AGENT_PORT", str(port)),
            ("LOCKSTEP_METRICS_PORT", str(metrics_port(port))),
            ("LOCKSTEP_STORE_PORT", str(constants.STORE_PORT)),
            ("LOCKSTEP_ORDINAL", str(new.ordinal)),
            ("LOCKSTEP_INCARNATION", str(new.incarnation)),
            ("LOCKSTEP_GRACE_SECONDS", f"{until_end(job):g}"),
            ("LOCKSTEP_RUN_DIR", constants.VOLUME_MOUNT),
            ("LOCKSTEP_CONFIG_DIR", constants.CONFIG_MOUNT),
            ("LOCKSTEP_TOKEN_DIR", constants.TOKEN_MOUNT),
            ("LOCKSTEP_TLS", "on" if new.tls else "off"),
        )
    ]
    if new.checked_nodes:
        variables.append({"name": "LOCKSTEP_CHECKED_NODES", "value": _as_many(new.checked_nodes)})
    secret = job.spec.checkpoint.s3.secret_ref if job.spec.checkpoint else None
    if secret:
        variables += [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": key}}}
            for name, key in (("AWS_ACCESS_KEY_ID", "accessKeyId"), ("AWS_SECRET_ACCESS_KEY", "secretAccessKey"))
        ]
    return variables


def _as_many(nodes: tuple[str, ...]) -> str:
    """Their names, as many as fit: a variable may have 128 KiB, and the others are checked once more."""
    size = accumulate(len(node) + 1 for node in nodes)
    return ",".join(node for node, end in zip(nodes, size, strict=True) if end <= CHECKED_BYTES)


def _volumes(job: TrainingJob, container: Mapping[str, Any]) -> list[tuple[Manifest, Manifest]]:
    """(mount, volume) of everything that the agent needs and the template's container does not mount itself."""
    memory = {"emptyDir": {"medium": "Memory"}}
    needed: list[tuple[Manifest, Manifest]] = [
        ({"name": "lockstep-run", "mountPath": constants.VOLUME_MOUNT}, memory),
        (
            {"name": "lockstep-config", "mountPath": constants.CONFIG_MOUNT, "readOnly": True},
            {"configMap": {"name": config_map_name(job)}},
        ),
        (
            {"name": "lockstep-token", "mountPath": constants.TOKEN_MOUNT, "readOnly": True},
            {"secret": {"secretName": secret_name(job)}},
        ),
        # Container runtimes give /dev/shm 64 MiB, too little for NCCL's and gloo's shared buffers.
        ({"name": "lockstep-shm", "mountPath": "/dev/shm"}, memory),
    ]
    taken = {mount["mountPath"].rstrip("/") for mount in container.get("volumeMounts", [])}
    return [(mount, {"name": mount["name"], **source}) for mount, source in needed if mount["mountPath"] not in taken]


def _request_gpus(container: Manifest, gpus: int) -> None:
    """Ask for the GPUs, unless the template names them itself: another vendor's, a partition, or DRA claims."""
    resources = container["resources"] = _given(container.get("resources", {}))
    limits = resources.setdefault("limits", {})
    named = any(name.endswith("/gpu") or "/mig-" in name for name in (*limits, *resources.get("requests", {})))
    if not named and "claims" not in resources:
        limits[GPU_RESOURCE] = str(gpus)


def _avoid(spec: Manifest, nodes: tuple[str, ...]) -> None:
    """Prefer other nodes; a preference, since silence alone excludes no node."""
    affinity = _node_affinity(spec)
    preferred = affinity.setdefault("preferredDuringSchedulingIgnoredDuringExecution", [])
    preferred.append({"weight": 100, "preference": {"matchFields": _other_than(nodes)}})


def _exclude(spec: Manifest, nodes: tuple[str, ...]) -> None:
    """Only other nodes, whatever else the template asks for: its terms are alternatives, so each gets the condition."""
    affinity = _node_affinity(spec)
    required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    for term in required.get("nodeSelectorTerms") or required.setdefault("nodeSelectorTerms", [{}]):
        term.setdefault("matchFields", []).extend(_other_than(nodes))


def _node_affinity(spec: Manifest) -> Manifest:
    """That of the pod, to be added to."""
    affinity = spec["affinity"] = _given(spec.get("affinity", {}))
    found: Manifest = _given(affinity.get("nodeAffinity", {}))
    affinity["nodeAffinity"] = found
    return found


def _other_than(nodes: tuple[str, ...]) -> list[Manifest]:
    """By the node's name, as DaemonSets do: the label kubernetes.io/hostname may be another one. A requirement on a
    field takes one value only."""
    return [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
