"""The operator on a real API server, without kubelets: pods are created and stay pending."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from awaited import eventually
from integration.api.operators import Operator
from localcluster import Cluster
from manifests import command_job

pytestmark = pytest.mark.api

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def operator(control_plane: Cluster, api: Any, tmp_path: Path) -> Iterator[Operator]:
    """An operator that serves the test's namespace, not yet started."""
    one = Operator(tmp_path, control_plane.kubeconfig, api.namespace)
    yield one
    one.kill()
    print(one.log)


def job(name: str, nodes: int, **spec: Any) -> dict[str, Any]:
    """A job whose pods the server accepts."""
    template = {"spec": {"containers": [{"name": "trainer", "image": "example/trainer:1"}]}}
    return command_job(name, nodes=nodes, template=template, **spec)


def pods(api: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.get("pods")["items"]
    return found


def test_children_are_owned_and_complete(api: Any, operator: Operator) -> None:
    stored = api.create(job("whole", 2, spares=1))
    operator.start()
    eventually(lambda: len(pods(api)) == 3, "three pods exist")
    eventually(lambda: api.get("tj", "whole").get("status", {}).get("ready") == "0/2", "the status says so")

    objects = [*pods(api), api.get("svc", "whole"), api.get("cm", "whole-lockstep-config")]
    objects.append(api.get("secret", "whole-lockstep-token"))
    for one in objects:
        (owner,) = one["metadata"]["ownerReferences"]
        assert owner["uid"] == stored["metadata"]["uid"]
        assert owner["controller"] is owner["blockOwnerDeletion"] is True

    config = json.loads(objects[-2]["data"]["job.json"])
    assert (config["name"], config["uid"]) == ("whole", stored["metadata"]["uid"])
    assert config["spec"]["resilience"]["budgets"]["pod"] == 5
    assert re.fullmatch("[0-9a-f]{64}", base64.b64decode(objects[-1]["data"]["token"]).decode())
    assert set(objects[-1]["data"]) == {"token", "tls.crt", "tls.key", "ca.crt"}
    condition = api.get("tj", "whole")["status"]["conditions"][0]
    assert (condition["type"], condition["status"], condition["reason"]) == ("Ready", "False", "PodsPending")
    assert "0 of 3 pods are scheduled" in condition["message"]
    assert operator.stop() == 0


def certificate(api: Any, name: str) -> str:
    """Of a job, in its Secret."""
    found: str = api.get("secret", f"{name}-lockstep-token")["data"]["tls.crt"]
    return found


def test_an_operator_that_starts_finds_the_secret_as_it_should_be(api: Any, operator: Operator) -> None:
    """It writes it without having read it, and the server sees that nothing has changed."""
    api.create(job("kept", 1))
    operator.start()
    eventually(lambda: len(pods(api)) == 1, "the pod exists")
    before = api.get("secret", "kept-lockstep-token")
    operator.kill()
    api.kubectl("delete", "configmap", "kept-lockstep-config")  # written after the Secret
    operator.start()
    eventually(lambda: api.get("cm")["items"], "its successor has written its objects")
    assert api.get("secret", "kept-lockstep-token")["metadata"] == before["metadata"]


def test_a_secret_that_was_tampered_with_is_put_right(api: Any, operator: Operator) -> None:
    api.create(job("mended", 1))
    operator.start()
    eventually(lambda: len(pods(api)) == 1, "the pod exists")
    right = api.get("secret", "mended-lockstep-token")["data"]
    operator.kill()
    wrong = {"data": {"token": "d3Jvbmc=", "tls.key": None}, "metadata": {"ownerReferences": None}}
    api.kubectl("patch", "secret", "mended-lockstep-token", "--type=merge", "-p", json.dumps(wrong))
    operator.start()
    eventually(lambda: api.get("secret", "mended-lockstep-token")["data"] == right, "the Secret is put right")
    (owner,) = api.get("secret", "mended-lockstep-token")["metadata"]["ownerReferences"]
    assert owner["name"] == "mended"


def test_deleting_the_job_leaves_nothing_behind(api: Any, operator: Operator) -> None:
    api.create(job("brief", 2))
    operator.start()
    eventually(lambda: len(pods(api)) == 2, "pods exist")
    api.kubectl("delete", "tj", "brief", "--timeout=30s")  # would hang on a finalizer
    operator.stop()

    def rest() -> list[str]:
        names = api.kubectl("get", "pods,svc,secrets,configmaps", "-o", "name").split()
        # What the operator remembers of nodes is its own, and outlives any job.
        return [name for name in names if "kube-root-ca" not in name and not name.endswith("-nodes")]

    eventually(lambda: not rest(), f"the garbage collector takes pods, Service, Secret and ConfigMap: {rest()}")


@pytest.mark.parametrize("seed", range(3))
def test_killing_the_operator_at_any_moment_makes_no_duplicate(api: Any, operator: Operator, seed: int) -> None:
    chance = random.Random(seed)
    count = 24
    api.create(job("killed", count))
    for start in range(1, 4):
        operator.start()
        eventually(lambda expected=start: operator.log.count("holding the lease") == expected, "it works", 30)
        time.sleep(chance.uniform(0.0, 0.6))  # the random instant itself, not a wait for something
        operator.kill()
        # A killed operator holds its lease for 8 s; the test's subject is the state it leaves, so hand it on.
        api.kubectl("delete", "lease", "lockstep-operator", "--ignore-not-found")
    operator.start()
    eventually(lambda: len(pods(api)) >= count, "all pods exist")
    eventually(lambda: api.get("tj", "killed")["status"]["members"]["starting"] == count, "the status counts them")

    names = sorted(pod["metadata"]["name"] for pod in pods(api))
    assert names == sorted(f"killed-{ordinal}-0" for ordinal in range(count))
    status = api.get("tj", "killed")["status"]
    assert status["restarts"]["total"] == 0
    assert status["incarnations"] == {}


def test_suspend_deletes_pods_and_resume_makes_new_ones(api: Any, operator: Operator) -> None:
    api.create(job("paused", 2))
    operator.start()
    eventually(lambda: len(pods(api)) == 2, "pods exist")
    api.patch("paused", {"spec": {"suspend": True}})
    eventually(lambda: api.get("tj", "paused")["status"]["phase"] == "Suspended", "suspended")
    assert pods(api) == []
    api.patch("paused", {"spec": {"suspend": False}})
    eventually(lambda: len(pods(api)) == 2, "new pods exist")
    assert {pod["metadata"]["name"] for pod in pods(api)} == {"paused-0-1", "paused-1-1"}
    conditions = {one["type"]: one for one in api.get("tj", "paused")["status"]["conditions"]}
    assert conditions["Suspended"]["status"] == "False"


def test_a_job_past_its_deadline_fails_for_good_and_its_ttl_takes_it_away(api: Any, operator: Operator) -> None:
    api.create(job("late", 1, activeDeadlineSeconds=1, ttlSecondsAfterFinished=3))
    operator.start()
    ended = eventually(
        lambda: (found := api.get("tj", "late")).get("status", {}).get("phase") == "Failed" and found, "failed"
    )
    conditions = {one["type"]: one for one in ended["status"]["conditions"]}
    assert conditions["Failed"]["reason"] == "DeadlineExceeded"
    eventually(lambda: not api.get("tj")["items"], "the job is deleted")
    eventually(lambda: not pods(api), "its pods too")


def test_a_job_of_another_controller_is_left_alone(api: Any, operator: Operator) -> None:
    api.create(job("foreign", 1, managedBy="example.com/other"))
    api.create(job("ours", 1))
    operator.start()
    eventually(lambda: len(pods(api)) == 1, "our pod exists")
    assert "status" not in api.get("tj", "foreign")


def test_a_template_that_cannot_work_fails_the_job_with_the_servers_words(api: Any, operator: Operator) -> None:
    wrong = job("misspelled", 1)
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"] = "Sometimes"
    api.create(wrong)
    operator.start()
    ended = eventually(
        lambda: (found := api.get("tj", "misspelled")).get("status", {}).get("phase") == "Failed" and found, "failed"
    )
    conditions = {one["type"]: one for one in ended["status"]["conditions"]}
    assert conditions["Failed"]["reason"] == "InvalidTemplate"
    assert "imagePullPolicy" in conditions["Failed"]["message"]


def test_a_quota_is_told_and_nothing_half_made_is_left(api: Any, operator: Operator) -> None:
    api.kubectl("create", "quota", "small", "--hard=pods=2")
    api.create(job("wide", 4))
    operator.start()

    def told() -> bool:
        conditions = api.get("tj", "wide").get("status", {}).get("conditions", [])
        return any(one["reason"] == "CreationRefused" and "exceeded quota" in one["message"] for one in conditions)

    eventually(told, "the condition names the quota")
    eventually(lambda: not pods(api), "the pods that were created are deleted again")
    api.kubectl("delete", "quota", "small")
    eventually(lambda: len(pods(api)) == 4, "with room, all pods come")


def test_a_second_operator_waits_and_takes_over(
    control_plane: Cluster, api: Any, operator: Operator, tmp_path: Path
) -> None:
    """Two replicas: one works, the other is healthy and idle until the lease is free."""
    operator.start()
    eventually(lambda: "holding the lease" in operator.log, "the first works")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "master-key").write_text((tmp_path / "master-key").read_text())
    second = Operator(tmp_path / "second", control_plane.kubeconfig, api.namespace)
    second.start()
    try:

        def healthy() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{second.health_port}/healthz", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        eventually(healthy, "the second is healthy")
        api.create(job("handed", 1))
        eventually(lambda: len(pods(api)) == 1, "the first serves")
        assert "holding the lease" not in second.log
        operator.kill()  # without a word: the lease must run out
        api.patch("handed", {"spec": {"spares": 1}})
        eventually(lambda: len(pods(api)) == 2, "the second serves", 40)
        assert "holding the lease" in second.log
    finally:
        second.kill()


def test_events_and_metrics_tell_what_was_decided(api: Any, operator: Operator) -> None:
    api.create(job("told", 1))
    operator.start()
    eventually(lambda: len(pods(api)) == 1, "the pod exists")

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{operator.metrics_port}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    eventually(
        lambda: f'lockstep_job_nodes{{job_name="told",namespace="{api.namespace}"}} 1.0' in scrape(), "job gauge"
    )
    assert 'lockstep_operator_jobs{phase="Pending"} 1.0' in scrape()
    api.patch("told", {"spec": {"suspend": True}})

    def posted() -> set[str]:
        events = api.get("events", "--field-selector", "involvedObject.kind=TrainingJob")["items"]
        return {one["reason"] for one in events}

    eventually(lambda: "Suspended" in posted(), "an event says so")
    with urllib.request.urlopen(f"http://127.0.0.1:{operator.health_port}/healthz", timeout=5) as answer:
        assert answer.status == 200


def test_the_charts_roles_are_enough(control_plane: Cluster, api: Any, operator: Operator, tmp_path: Path) -> None:
    """With a token of the chart's service account and OwnerReferencesPermissionEnforcement on: every right that the
    operator uses is granted by the chart, and Secrets can't be read with it."""
    chart = [
        "helm",
        "template",
        "lockstep",
        str(REPOSITORY / "charts" / "lockstep"),
        f"--namespace={api.namespace}",
        "--set=crds.enabled=false",
        f"--set=watchNamespaces={{{api.namespace}}}",
    ]
    rendered = subprocess.run(
        chart, env=control_plane.environment, text=True, capture_output=True, timeout=60, check=True
    ).stdout
    everything = [one for one in yaml.safe_load_all(rendered) if one]
    (deployment,) = [one for one in everything if one["kind"] == "Deployment"]
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    named = [argument for argument in arguments if argument.startswith(("--lease=", "--node-memory="))]
    assert len(named) == 2
    kinds = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    wanted = [one for one in everything if one["kind"] in kinds]
    cluster_wide = [one for one in wanted if one["kind"].startswith("Cluster")]
    control_plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(wanted))
    try:
        account = next(one["metadata"]["name"] for one in wanted if one["kind"] == "ServiceAccount")
        token = api.kubectl("create", "token", account).strip()
        config = yaml.safe_load(control_plane.kubeconfig.read_text())
        config["users"] = [{"name": "operator", "user": {"token": token}}]
        config["contexts"][0]["context"]["user"] = "operator"
        config["current-context"] = config["contexts"][0]["name"]
        kubeconfig = tmp_path / "operator.kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(config))
        renewal = ("--certificate-seconds=100", "--certificate-renewal-seconds=2")
        limited = Operator(tmp_path, kubeconfig, api.namespace, *named, *renewal)
        api.create(job("limited", 2, activeDeadlineSeconds=600))
        limited.start()
        try:
            eventually(lambda: len(pods(api)) == 2, "pods exist")
            first = certificate(api, "limited")
            eventually(lambda: certificate(api, "limited") != first, "the certificate is renewed")
            before = {pod["metadata"]["uid"] for pod in pods(api)}
            api.kubectl("delete", "pod", "limited-1-0", "--now")
            eventually(lambda: len({pod["metadata"]["uid"] for pod in pods(api)} - before) == 1, "it is replaced")
            api.patch("limited", {"spec": {"suspend": True}})
            eventually(lambda: api.get("tj", "limited")["status"]["phase"] == "Suspended", "suspended")
            of_jobs = ("--field-selector", "involvedObject.kind=TrainingJob")
            eventually(lambda: api.get("events", *of_jobs)["items"], "events are written")
            eventually(
                lambda: api.kubectl("get", "cm", "-o", "name", "-l", "lockstep.dev/node-memory"), "nodes' memory"
            )
            assert limited.stop() == 0
            assert "forbidden" not in limited.log.lower(), limited.log
        finally:
            limited.kill()
        reading = f"--as=system:serviceaccount:{api.namespace}:{account}"
        for verb in ("get", "list", "watch", "patch", "delete"):  # the answer to a patch is the whole Secret
            may = subprocess.run(
                ["kubectl", "auth", "can-i", verb, "secrets", "-n", api.namespace, reading],
                env=control_plane.environment, text=True, capture_output=True, timeout=30, check=False,
            )  # fmt: skip
            assert may.stdout.strip() == "no", verb
    finally:
        control_plane.kubectl("delete", "-f", "-", "--ignore-not-found", stdin=yaml.safe_dump_all(cluster_wide))
