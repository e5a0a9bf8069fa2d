"""Puts Lockstep, a bucket and a namespace into a cluster."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from demonstration.target import REPOSITORY, DemoError, Target

RELEASE = "lockstep"
SYSTEM_NAMESPACE = "lockstep-system"
SECRET = "s3-credentials"
CHART = REPOSITORY / "charts/lockstep"


def install_all(
    target: Target, namespace: str, bucket: str, *, operators: int = 2, values: dict[str, str | int] | None = None
) -> None:
    """Images onto the local cluster's nodes, operators (two: one may lose its node), namespace and bucket."""
    load_images(target, build_images(target))
    helm_install(target, {"replicas": operators, **(values or {})})
    prepare_namespace(target, namespace, bucket)


def build_images(target: Target) -> list[Path]:
    """Builds operator and trainer image, unless nothing they are made of has changed."""
    from localcluster import images

    return [
        images.build_image(REPOSITORY / f"images/{name}.Dockerfile", tag)
        for name, tag in (("operator", target.operator_image), ("trainer", target.trainer_image))
    ]


def helm_install(target: Target, values: dict[str, str | int] | None = None, chart: Path = CHART) -> None:
    """Installs or upgrades the chart, and waits until the operator is ready."""
    target.run("helm", *helm_words(target, values, chart))


def helm_words(target: Target, values: dict[str, str | int] | None = None, chart: Path = CHART) -> list[str]:
    """What ``helm`` is called with for that."""
    repository, _, tag = target.operator_image.rpartition(":")
    settings: dict[str, str | int] = {
        "image.repository": repository,
        "image.tag": tag,
        "trainer.image": target.trainer_image,
        # Images of one tag change while one works on them: a new pod must take the new image.
        "podAnnotations.restarted": _image_stamp(target),
    }
    return [
        "upgrade", "--install", RELEASE, str(chart),
        "--namespace", SYSTEM_NAMESPACE, "--create-namespace", "--wait", "--timeout", "120s",
        *(word for name, value in settings.items() for word in ("--set-json", f"{name}={json.dumps(value)}")),
        *(word for name, value in (values or {}).items() for word in ("--set", f"{name}={value}")),
    ]  # fmt: skip


def _image_stamp(target: Target) -> str:
    """Something that differs when the local operator image does."""
    if target.cluster is None:
        return "never"
    from localcluster.images import content_hash

    sources = ("crds/lockstep_api", "operator", "requirements/operator.txt", "images")
    return content_hash([REPOSITORY / source for source in sources])[:16]


def prepare_namespace(target: Target, namespace: str, bucket: str) -> None:
    """Namespace, Secret with the S3 keys, bucket."""
    keys = {"accessKeyId": target.s3.access_key, "secretAccessKey": target.s3.secret_key}
    encoded = {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()}
    target.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    target.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": SECRET, "namespace": namespace},
            "data": encoded,
        }
    )
    client = s3_client(target)
    if bucket not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)


def s3_client(target: Target) -> Any:
    """A boto3 client for the target's S3 server, from here."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=target.s3.endpoint_host,
        aws_access_key_id=target.s3.access_key,
        aws_secret_access_key=target.s3.secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def load_images(target: Target, files: list[Path]) -> None:
    """Gives images to the nodes."""
    assert target.cluster is not None
    target.cluster.load_image(*files)


def operator_pods(target: Target) -> list[dict[str, Any]]:
    """The operators' pods that are not being deleted."""
    found = target.get("pods", "-n", SYSTEM_NAMESPACE, "-l", f"app.kubernetes.io/instance={RELEASE}")["items"]
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def lease_holder(target: Target) -> str:
    """The process of the operator that works, ``<pod>_<pid>_<random>``; empty while none does."""
    return str(target.get("lease", RELEASE, "-n", SYSTEM_NAMESPACE)["spec"].get("holderIdentity", ""))


def operator_node(target: Target) -> str:
    """The node of the operator that holds the Lease; while none does, of one that may."""
    running = [pod for pod in operator_pods(target) if pod["status"].get("phase") == "Running"]
    if not running:
        raise DemoError(f"no operator pod is running in {SYSTEM_NAMESPACE}")
    holder = lease_holder(target).partition("_")[0]
    first = min(running, key=lambda pod: pod["metadata"]["name"] != holder)
    return str(first["spec"]["nodeName"])
