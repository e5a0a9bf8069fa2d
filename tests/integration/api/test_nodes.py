"""The memory of nodes on a real API server: who writes it, who reads it, and what comes of it."""

from __future__ import annotations

import json
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from awaited import eventually
from integration.api.operators import Operator
from localcluster import Cluster
from lockstep_cli.__main__ import main
from lockstep_operator.plan.times import rfc3339
from manifests import command_job

pytestmark = pytest.mark.api


@pytest.fixture
def nodes(control_plane: Cluster) -> Iterator[tuple[str, ...]]:
    """Three nodes that no kubelet stands behind: never ready, so nothing is scheduled there."""
    names = tuple(f"gpu-{uuid.uuid4().hex[:6]}" for _ in range(3))
    status = {"conditions": [{"type": "Ready", "status": "Unknown"}]}
    for name in names:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": status}
        control_plane.kubectl("create", "-f", "-", stdin=json.dumps(node))
    yield names
    control_plane.kubectl("delete", "node", *names, "--ignore-not-found")


@pytest.fixture
def operator(control_plane: Cluster, api: Any, tmp_path: Path) -> Iterator[Operator]:
    """An operator that taints nodes and sets a condition, not yet started."""
    one = Operator(tmp_path, control_plane.kubeconfig, api.namespace, "--taint-nodes", "--node-conditions")
    yield one
    one.kill()
    print(one.log)


@pytest.fixture
def lockstep(control_plane: Cluster, api: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """`lockstep nodes …`: exit status and JSON."""

    def call(*arguments: str) -> tuple[int, dict[str, Any]]:
        where = ["-n", api.namespace, "--kubeconfig", str(control_plane.kubeconfig), "--output", "json"]
        status = main(["nodes", *arguments, *where])
        return status, json.loads(capsys.readouterr().out)

    return call


def taint(cluster: Cluster, node: str) -> list[str]:
    """Value of Lockstep's taint, if it is there."""
    found = json.loads(cluster.kubectl("get", "node", node, "-o", "json"))["spec"].get("taints", [])
    return [one.get("value", "") for one in found if one["key"] == "lockstep.dev/excluded"]


def condition(cluster: Cluster, node: str) -> dict[str, Any]:
    """Lockstep's, if it is there; beside those of others."""
    found = json.loads(cluster.kubectl("get", "node", node, "-o", "json"))["status"].get("conditions", [])
    assert any(one["type"] == "Ready" for one in found)
    return next((one for one in found if one["type"] == "LockstepExcluded"), {})


def kept_out(api: Any) -> set[str]:
    """Nodes that the newest pods' affinity rules out."""
    terms: list[dict[str, Any]] = []
    for pod in api.get("pods")["items"]:
        affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
        required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
        terms += [field for term in required.get("nodeSelectorTerms", []) for field in term.get("matchFields", [])]
    return {value for field in terms if field["operator"] == "NotIn" for value in field["values"]}


def events(cluster: Cluster, node: str) -> set[str]:
    """Reasons of the node's events."""
    selector = f"involvedObject.kind=Node,involvedObject.name={node}"
    found = json.loads(cluster.kubectl("get", "events", "-n", "default", "--field-selector", selector, "-o", "json"))
    return {one["reason"] for one in found["items"]}


def job(name: str) -> dict[str, Any]:
    template = {"spec": {"containers": [{"name": "trainer", "image": "example/trainer:1"}]}}
    return command_job(name, nodes=1, template=template)


def test_an_administrator_excludes_and_clears_a_node(
    control_plane: Cluster, api: Any, operator: Operator, nodes: tuple[str, ...], lockstep: Any
) -> None:
    status, answer = lockstep()
    assert status == 1
    assert "no operator remembers nodes" in answer["error"]

    operator.start()
    eventually(lambda: lockstep()[0] == 0, "the operator has made its ConfigMap")
    assert lockstep("exclude", "no-such-node")[0] == 1
    assert lockstep("exclude", nodes[0], "--for", "2h", "--reason", "cable")[0] == 0
    eventually(lambda: taint(control_plane, nodes[0]) == ["administrator"], "the node is tainted")
    told = eventually(lambda: condition(control_plane, nodes[0]), "the node has a condition")
    assert (told["status"], told["reason"]) == ("True", "ByAdministrator")
    assert "stay away: cable." in told["message"]
    api.create(job("careful"))
    eventually(lambda: kept_out(api) == {nodes[0]}, "new pods stay away")
    with urllib.request.urlopen(f"http://127.0.0.1:{operator.metrics_port}/metrics", timeout=5) as metrics:
        assert f'lockstep_node_excluded{{by="administrator",node="{nodes[0]}"}} 1.0' in metrics.read().decode()

    operator.kill()
    api.kubectl("delete", "lease", "lockstep-operator", "--ignore-not-found")
    operator.start()
    (known,) = lockstep()[1]["nodes"]
    assert (known["node"], known["excluded"], known["reason"]) == (nodes[0], True, "cable")
    assert lockstep("clear", nodes[0])[0] == 0
    eventually(lambda: taint(control_plane, nodes[0]) == [], "the taint is taken away")
    eventually(lambda: condition(control_plane, nodes[0])["status"] == "False", "the condition is over")
    assert lockstep("clear", "never-heard-of")[0] == 1


def test_faults_of_jobs_exclude_a_node_for_all_jobs_and_survive_the_operator(
    control_plane: Cluster, api: Any, operator: Operator, nodes: tuple[str, ...], lockstep: Any
) -> None:
    api.create(job("witness"))
    operator.start()
    eventually(lambda: api.get("tj", "witness").get("status", {}).get("phase"), "the job has a status")
    lemon, user_error = nodes[0], nodes[1]
    now = time.time()
    faults = [
        {"at": rfc3339(now - 7200 * n), "cause": "NodeLost", "rung": "pod", "node": lemon, "pod": f"p{n}"}
        for n in (3, 2, 1)
    ]
    faults.append({"at": rfc3339(now), "cause": "WorkerExited", "rung": "process", "node": user_error, "pod": "p"})
    patch = {"status": {"faults": faults}}
    api.kubectl("patch", "tj", "witness", "--subresource=status", "--type=merge", "-p", json.dumps(patch))
    eventually(lambda: taint(control_plane, lemon) == ["score"], "the node is excluded")
    eventually(lambda: "NodeExcluded" in events(control_plane, lemon), "an event says so")
    (known,) = lockstep()[1]["nodes"]
    assert (known["node"], known["by"], len(known["faults"])) == (lemon, "score", 3)

    operator.kill()
    api.kubectl("delete", "lease", "lockstep-operator", "--ignore-not-found")
    operator.start()
    api.create(job("other"))
    eventually(lambda: len(api.get("pods")["items"]) == 2, "its pod exists")
    assert kept_out(api) == {lemon}
    assert lockstep("clear", lemon)[0] == 0
    eventually(lambda: taint(control_plane, lemon) == [], "the taint is taken away")
    # The job tells its faults again after each start; forgiven is forgiven.
    operator.kill()
    api.kubectl("delete", "lease", "lockstep-operator", "--ignore-not-found")
    operator.start()
    api.create(job("third"))
    eventually(lambda: len(api.get("pods")["items"]) == 3, "its pod exists")
    assert lockstep()[1]["nodes"][0]["excluded"] is False
