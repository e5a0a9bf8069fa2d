"""The chart on a real cluster: it installs under the restricted pod security standard, grants what it should and no
more, and loses neither key nor jobs through upgrade, uninstall and a new installation.

Runs before the other end-to-end tests (by its name) and leaves no release behind.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from localcluster import Cluster, images
from localcluster.processes import wait_for

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESPACE, RELEASE = "lockstep-system", "lockstep"
TAG = "lockstep-operator:chart-test"
CRD = "trainingjobs.lockstep.dev"


class Release:
    """The chart's release on the cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def helm(self, *arguments: str) -> str:
        """Run helm; its output."""
        environment = {**os.environ, **self.cluster.environment}
        command = ["helm", *arguments, "--namespace", NAMESPACE]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}\n{self.state()}"
        return result.stdout

    def install(self, *settings: str) -> None:
        """Install or upgrade, and wait until the operator is ready."""
        repository, _, tag = TAG.rpartition(":")
        words = [f"--set={word}" for word in (f"image.repository={repository}", f"image.tag={tag}", *settings)]
        chart = str(REPOSITORY / "charts/lockstep")
        self.helm("upgrade", "--install", RELEASE, chart, "--wait", "--timeout=90s", "--take-ownership", *words)

    def get(self, *what: str) -> dict[str, Any]:
        """An object, or a list of them."""
        found: dict[str, Any] = json.loads(self.cluster.kubectl("get", "-n", NAMESPACE, "-o", "json", *what))
        return found

    def pods(self) -> list[dict[str, Any]]:
        """The operator's pods that are not being deleted."""
        found = self.get("pods", "-l", f"app.kubernetes.io/instance={RELEASE}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def key(self) -> str:
        """The master key as the Secret has it."""
        return str(self.get("secret", f"{RELEASE}-master-key")["data"]["key"])

    def state(self) -> str:
        """What helps to see why an installation failed."""
        parts = (("describe", "pods"), ("logs", f"deployment/{RELEASE}", "--tail=40"))
        return "\n".join(self.cluster.kubectl("-n", NAMESPACE, *part, check=False) for part in parts)


@pytest.fixture(scope="module")
def release(cluster: Cluster) -> Iterator[Release]:
    """The chart, installed into a namespace that refuses pods that are not restricted."""
    cluster.load_image(images.build_image(REPOSITORY / "images/operator.Dockerfile", TAG))
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    release = Release(cluster)
    release.install()
    yield release
    release.helm("uninstall", RELEASE, "--ignore-not-found", "--wait")


def allowed(cluster: Cluster, verb: str, resource: str, *, user: str, namespace: str) -> bool:
    """Whether a user may do something, as the API server's own authorizer says."""
    kind, _, part = resource.partition("/")
    words = ["auth", "can-i", verb, kind, "-n", namespace, "--as", user, *([f"--subresource={part}"] if part else [])]
    answer = cluster.kubectl(*words, check=False)
    return answer.strip() == "yes"


def test_the_operator_is_ready_and_does_not_restart(release: Release) -> None:
    (pod,) = release.pods()
    (status,) = pod["status"]["containerStatuses"]
    assert (status["ready"], status["restartCount"]) == (True, 0)


def test_metrics_are_served_behind_the_service(release: Release) -> None:
    path = f"/api/v1/namespaces/{NAMESPACE}/services/{RELEASE}-metrics:metrics/proxy/metrics"
    assert "# TYPE lockstep_" in release.cluster.kubectl("get", "--raw", path)


def test_the_definition_explains_itself(release: Release) -> None:
    text = release.cluster.kubectl("explain", "trainingjob.spec.nodes")
    assert "Slots: pods that train." in text


@pytest.mark.parametrize(
    ("verb", "resource", "may"),
    [
        ("create", "pods", True),
        ("delete", "pods", True),
        ("watch", "nodes", True),
        ("patch", f"{CRD}/status", True),
        ("update", f"{CRD}/finalizers", True),
        ("create", "secrets", True),
        ("get", "secrets", False),
        ("list", "secrets", False),
        ("patch", "nodes", False),
        ("create", "pods/exec", False),
        ("create", "clusterrolebindings.rbac.authorization.k8s.io", False),
    ],
)
def test_what_the_operator_may_do_in_a_users_namespace(release: Release, verb: str, resource: str, may: bool) -> None:
    user = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"
    assert allowed(release.cluster, verb, resource, user=user, namespace="team-a") is may


def test_a_tenant_may_use_jobs_in_its_namespace_only(release: Release) -> None:
    """The local cluster's tenant is bound to the cluster's role `edit` in team-a: aggregation must reach it."""
    kubeconfig = yaml.safe_load(release.cluster.tenant_kubeconfig.read_text())
    assert kubeconfig["users"], "the tenant has no credentials"
    asked = {}
    for namespace in ("team-a", "default"):
        for verb in ("create", "get", "delete"):
            command = ["kubectl", "auth", "can-i", verb, CRD, "-n", namespace]
            environment = {**os.environ, **release.cluster.environment}
            environment["KUBECONFIG"] = str(release.cluster.tenant_kubeconfig)
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            asked[namespace, verb] = result.stdout.strip()
    assert set(asked.values()) == {"yes", "no"}
    assert {place for place, answer in asked.items() if answer == "yes"} == {
        ("team-a", "create"),
        ("team-a", "get"),
        ("team-a", "delete"),
    }


def test_an_upgrade_without_a_change_replaces_nothing(release: Release) -> None:
    key, uids = release.key(), [pod["metadata"]["uid"] for pod in release.pods()]
    release.install()
    assert release.key() == key
    assert [pod["metadata"]["uid"] for pod in release.pods()] == uids


def test_two_replicas_are_ready_and_one_holds_the_lease(release: Release) -> None:
    first = {pod["metadata"]["uid"] for pod in release.pods()}
    release.install("replicas=2")
    pods = release.pods()
    assert len(pods) == 2
    assert first < {pod["metadata"]["uid"] for pod in pods}  # the first one went on
    assert all(status["ready"] for pod in pods for status in pod["status"]["containerStatuses"])
    names = [pod["metadata"]["name"] for pod in pods]

    def one_holds_it() -> bool:
        (lease,) = release.get("leases")["items"]
        return any(lease["spec"]["holderIdentity"].startswith(name) for name in names)

    wait_for("one of the replicas holds the lease", one_holds_it, 30, release.cluster.layout.logs / "audit.log")
    assert release.get("poddisruptionbudget", RELEASE)["spec"]["minAvailable"] == 1
    release.install()


def test_an_uninstall_leaves_definition_and_key_and_a_new_installation_takes_them_up(release: Release) -> None:
    key = release.key()
    release.helm("uninstall", RELEASE, "--wait")
    assert release.get("deployments")["items"] == []
    assert release.key() == key
    definition = release.get("crd", CRD)
    release.install()
    assert release.key() == key
    assert release.get("crd", CRD)["metadata"]["uid"] == definition["metadata"]["uid"]
