"""The job's other objects: headless Service, Secret with token and certificate, ConfigMap with the configuration."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_operator.plan.actions import ChildKind

Manifest = dict[str, Any]


def service_name(job: TrainingJob) -> str:
    """Also the subdomain of the pods."""
    return job.name


def secret_name(job: TrainingJob) -> str:
    """The Secret with the bearer token and the certificate."""
    return f"{job.name}-lockstep-token"


def config_map_name(job: TrainingJob) -> str:
    """The ConfigMap with job.json."""
    return f"{job.name}-lockstep-config"


def name_of(job: TrainingJob, kind: ChildKind) -> str:
    """Of the job's object of that kind."""
    return {"Service": service_name, "Secret": secret_name, "ConfigMap": config_map_name}[kind](job)


def owner_reference(job: TrainingJob) -> Manifest:
    """Makes the garbage collector delete the object with its job."""
    return {
        "apiVersion": constants.API_VERSION,
        "kind": constants.KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def controlled_by(manifest: Manifest, uid: str) -> bool:
    """Whether the object with that uid is the controller that made this one."""
    owners = manifest["metadata"].get("ownerReferences", [])
    return any(owner["uid"] == uid and owner.get("controller") for owner in owners)


def labels(job: TrainingJob) -> dict[str, str]:
    """Labels of everything that belongs to the job."""
    return {
        "app.kubernetes.io/name": "lockstep-job",
        "app.kubernetes.io/managed-by": "lockstep",
        constants.LABEL_JOB_NAME: job.name,
        constants.LABEL_JOB_UID: job.uid,
    }


def job_json(job: TrainingJob) -> str:
    """What the pods read as job.json: the job with all its defaults."""
    content = {"name": job.name, "namespace": job.namespace, "uid": job.uid, "spec": job.spec.to_wire()}
    return json.dumps(content, indent=1, ensure_ascii=False)


def render(job: TrainingJob, kind: ChildKind, secret: Mapping[str, bytes], findings: str = "") -> Manifest:
    """The object of that kind. ``secret`` is what the job's Secret holds, ``findings`` the administrator's rows of the
    table of findings."""
    manifest: Manifest = {
        "apiVersion": "v1",
        "kind": kind,
        "metadata": {
            "name": name_of(job, kind),
            "namespace": job.namespace,
            "labels": labels(job),
            "ownerReferences": [owner_reference(job)],
        },
    }
    if kind == "Service":
        manifest["spec"] = {
            "clusterIP": "None",
            # Agents find each other before they are ready: being ready takes all of them.
            "publishNotReadyAddresses": True,
            "selector": {constants.LABEL_JOB_UID: job.uid},
            "ports": [
                {"name": constants.AGENT_PORT_NAME, "port": constants.AGENT_PORT, "protocol": "TCP"},
                {"name": constants.METRICS_PORT_NAME, "port": constants.METRICS_PORT, "protocol": "TCP"},
            ],
        }
    elif kind == "Secret":
        manifest |= {
            "type": "Opaque",
            "data": {name: base64.b64encode(content).decode() for name, content in secret.items()},
        }
    else:
        manifest["data"] = {"job.json": job_json(job), **({constants.FINDINGS_FILE: findings} if findings else {})}
    return manifest
