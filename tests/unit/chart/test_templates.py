"""What the chart installs, by values. Protects the operator's rights, its confinement, and the switches."""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lockstep_operator.__main__ import parse
from lockstep_operator.errors import ConfigError
from lockstep_trainer.health.table import load

REPOSITORY = Path(__file__).resolve().parents[3]
Render = Callable[..., dict[tuple[str, str], dict[str, Any]]]


def container(manifests: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = manifests["Deployment", "ls"]["spec"]["template"]["spec"]
    (only,) = pod["containers"]
    assert isinstance(only, dict)
    return only


def test_helm_lint_finds_nothing(helm: Path) -> None:
    result = subprocess.run(
        [helm, "lint", "--strict", REPOSITORY / "charts/lockstep"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_the_defaults_install(render: Render) -> None:
    assert set(render()) == {
        ("CustomResourceDefinition", "trainingjobs.lockstep.dev"),
        ("ServiceAccount", "ls"),
        ("Secret", "ls-master-key"),
        ("ClusterRole", "ls-jobs"),
        ("ClusterRole", "ls-cluster"),
        ("ClusterRole", "ls-view"),
        ("ClusterRole", "ls-edit"),
        ("ClusterRoleBinding", "ls-jobs"),
        ("ClusterRoleBinding", "ls-cluster"),
        ("Role", "ls-lease"),
        ("RoleBinding", "ls-lease"),
        ("Role", "ls-nodes"),
        ("RoleBinding", "ls-nodes"),
        ("Service", "ls-metrics"),
        ("Deployment", "ls"),
        ("ConfigMap", "ls-dashboard-fleet"),
        ("ConfigMap", "ls-dashboard-job"),
    }


@pytest.mark.parametrize(
    ("values", "added", "removed"),
    [
        ({"replicas": 2}, {("PodDisruptionBudget", "ls")}, set()),
        ({"replicas": 2, "podDisruptionBudget": {"enabled": False}}, set(), set()),
        ({"crds": {"enabled": False}}, set(), {("CustomResourceDefinition", "trainingjobs.lockstep.dev")}),
        ({"masterKey": {"existingSecret": "mine"}}, set(), {("Secret", "ls-master-key")}),
        ({"rbac": {"aggregate": False}}, set(), {("ClusterRole", "ls-view"), ("ClusterRole", "ls-edit")}),
        ({"metrics": {"service": False}}, set(), {("Service", "ls-metrics")}),
        ({"metrics": {"serviceMonitor": {"enabled": True}}}, {("ServiceMonitor", "ls")}, set()),
        ({"metrics": {"podMonitor": {"enabled": True}}}, {("PodMonitor", "ls-agents")}, set()),
        ({"prometheusRule": {"enabled": True}}, {("PrometheusRule", "ls")}, set()),
        ({"networkPolicy": {"enabled": True}}, {("NetworkPolicy", "ls")}, set()),
        ({"dashboards": {"enabled": False}}, set(), {("ConfigMap", f"ls-dashboard-{one}") for one in ("job", "fleet")}),
        ({"serviceAccount": {"create": False}}, set(), {("ServiceAccount", "ls")}),
        (
            {"watchNamespaces": ["team-a"]},
            {("RoleBinding", "ls-jobs"), ("Role", "ls-node-events"), ("RoleBinding", "ls-node-events")},
            {("ClusterRoleBinding", "ls-jobs")},
        ),
    ],
    ids=lambda value: yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, dict) else "",
)
def test_what_a_value_adds_and_removes(
    render: Render, values: dict[str, Any], added: set[tuple[str, str]], removed: set[tuple[str, str]]
) -> None:
    before, after = set(render()), set(render(values))
    assert (after - before, before - after) == (added, removed)


def test_objects_are_in_the_release_namespace_and_labelled(render: Render) -> None:
    everything = {"metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}, "replicas": 2}
    cluster_wide = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
    for (kind, name), manifest in render(everything).items():
        metadata = manifest["metadata"]
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "lockstep", name
        assert metadata.get("namespace") == (None if kind in cluster_wide else "lockstep-system"), (kind, name)


def test_the_operator_meets_the_restricted_pod_security_standard(render: Render) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, and a read-only root on top."""
    pod = render()["Deployment", "ls"]["spec"]["template"]["spec"]
    operator = container(render())
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert operator["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all(set(volume) - {"name"} <= {"secret", "emptyDir"} for volume in pod["volumes"])


def test_the_operator_may_do_what_it_does_and_no_more(render: Render) -> None:
    """The table is the review: who widens a role widens it here too."""
    granted: dict[str, set[str]] = {}
    manifests = render()
    for name in (("ClusterRole", "ls-jobs"), ("ClusterRole", "ls-cluster"), ("Role", "ls-lease"), ("Role", "ls-nodes")):
        for rule in manifests[name]["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    verbs = {f"{verb} {' '.join(rule.get('resourceNames', []))}".strip() for verb in rule["verbs"]}
                    granted.setdefault(f"{resource}.{group}".strip("."), set()).update(verbs)
    assert granted == {
        "trainingjobs.lockstep.dev": {"list", "watch", "delete"},
        "trainingjobs/status.lockstep.dev": {"patch"},
        "trainingjobs/finalizers.lockstep.dev": {"update"},
        "pods": {"list", "watch", "create", "patch", "delete"},
        "services": {"create", "get"},
        "configmaps": {"create", "get", "list ls-nodes", "watch ls-nodes", "update ls-nodes"},
        "secrets": {"create", "update"},  # neither get nor patch: both answer with what a Secret holds
        "events": {"create"},
        "nodes": {"list", "watch"},
        "leases.coordination.k8s.io": {"create", "get ls", "update ls"},
    }


def test_nodes_are_changed_only_where_the_administrator_asks_for_taints(render: Render) -> None:
    def verbs(values: dict[str, Any]) -> set[str]:
        (rule,) = render(values)["ClusterRole", "ls-cluster"]["rules"]
        assert rule["resources"] == ["nodes"]
        return set(rule["verbs"])

    assert verbs({}) == {"list", "watch"}
    assert "--taint-nodes" not in container(render())["args"]
    assert verbs({"nodes": {"taint": True}}) == {"list", "watch", "get", "patch"}
    assert "--taint-nodes" in container(render({"nodes": {"taint": True}}))["args"]


def test_the_status_of_nodes_is_changed_only_where_the_administrator_asks_for_conditions(render: Render) -> None:
    def rules(values: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = render(values)["ClusterRole", "ls-cluster"]["rules"]
        return found[1:]

    assert rules({}) == []
    assert "--node-conditions" not in container(render())["args"]
    assert rules({"nodes": {"condition": True}}) == [
        {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]}
    ]
    assert "--node-conditions" in container(render({"nodes": {"condition": True}}))["args"]


def test_rights_are_bound_in_the_watched_namespaces_only(render: Render, template: Any) -> None:
    result = template(values={"watchNamespaces": ["team-a", "team-b"]})
    manifests = [manifest for manifest in yaml.safe_load_all(result.stdout) if manifest]
    bound = {
        manifest["metadata"].get("namespace")
        for manifest in manifests
        if manifest["kind"].endswith("RoleBinding") and manifest["roleRef"]["name"] == "ls-jobs"
    }
    assert bound == {"team-a", "team-b"}
    only = render({"watchNamespaces": ["team-a"]})
    assert "--namespace=team-a" in container(only)["args"]
    assert not any(argument.startswith("--namespace") for argument in container(render())["args"])


def test_users_of_a_namespace_get_rights_by_the_clusters_own_roles(render: Render) -> None:
    manifests = render()
    prefix = "rbac.authorization.k8s.io/aggregate-to-"

    def joined(name: str) -> set[str]:
        labels = manifests["ClusterRole", name]["metadata"]["labels"]
        return {key.removeprefix(prefix) for key, value in labels.items() if key.startswith(prefix) and value == "true"}

    assert joined("ls-view") == {"view", "edit", "admin"}
    assert joined("ls-edit") == {"edit", "admin"}
    viewers = {verb for rule in manifests["ClusterRole", "ls-view"]["rules"] for verb in rule["verbs"]}
    assert viewers == {"get", "list", "watch"}


@pytest.mark.parametrize("keep", [True, False])
def test_the_crd_is_the_generated_one_with_labels(render: Render, keep: bool) -> None:
    expected = yaml.safe_load((REPOSITORY / "crds/lockstep.dev_trainingjobs.yaml").read_text())
    rendered = render({"crds": {"keep": keep}})["CustomResourceDefinition", "trainingjobs.lockstep.dev"]
    annotations = rendered["metadata"].pop("annotations", {})
    rendered["metadata"].pop("labels")
    assert rendered == expected
    assert annotations.get("helm.sh/resource-policy") == ("keep" if keep else None)


def test_the_master_key_is_random_or_given_and_survives_an_uninstall(render: Render) -> None:
    def key(values: dict[str, Any] | None = None) -> bytes:
        secret = render(values)["Secret", "ls-master-key"]
        assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        return base64.b64decode(secret["data"]["key"])

    first, second = key(), key()
    assert len(first) >= 32
    assert first != second
    assert key({"masterKey": {"value": "k" * 40}}) == b"k" * 40


def test_an_existing_master_key_is_mounted(render: Render) -> None:
    pod = render({"masterKey": {"existingSecret": "mine"}})["Deployment", "ls"]["spec"]["template"]["spec"]
    assert [v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v] == ["mine"]


def test_a_digest_wins_over_a_tag(render: Render) -> None:
    digest = f"sha256:{'0' * 64}"
    assert container(render())["image"] == "lockstep-operator:0.1.0"
    assert container(render({"image": {"tag": "dev"}}))["image"] == "lockstep-operator:dev"
    assert container(render({"image": {"tag": "dev", "digest": digest}}))["image"] == f"lockstep-operator@{digest}"


def test_the_operator_understands_its_command_line(render: Render, tmp_path: Path) -> None:
    """Chart and operator agree on the options: the real parser reads what the chart passes."""
    key = tmp_path / "key"
    key.write_text("k" * 32)
    values = {"watchNamespaces": ["team-a"], "trainer": {"image": "mine:1"}, "logLevel": "debug"}
    arguments = container(render(values))["args"]
    mounted = [argument for argument in arguments if argument.startswith("--master-key-file=")]
    assert mounted == ["--master-key-file=/etc/lockstep/master-key/key"]
    options = parse([argument for argument in arguments if argument not in mounted] + [f"--master-key-file={key}"])
    assert (options.namespaces, options.trainer_image, options.lease) == (("team-a",), "mine:1", "ls")
    assert (options.metrics_port, options.health_port, options.log_level) == (8080, 8081, "debug")


def test_faults_on_purpose_are_off_until_the_administrator_allows_them(render: Render, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 32)
    for values, allowed in ({}, False), ({"faultInjection": {"enabled": True}}, True):
        given = [one for one in container(render(values))["args"] if not one.startswith("--master-key-file=")]
        assert parse([*given, f"--master-key-file={key}"]).fault_injection is allowed


def test_an_administrators_findings_reach_the_operator_and_change_it(render: Render, tmp_path: Path) -> None:
    rows = {"gpu": {"nvlink-down": {"severity": "warn"}}, "xids": {63: {"severity": "fatal"}}}
    manifests = render({"preflight": {"findings": rows}, "podAnnotations": {"own": "1"}})
    text = manifests["ConfigMap", "ls-findings"]["data"]["findings.yaml"]
    (option,) = [argument for argument in container(manifests)["args"] if argument.startswith("--findings-file=")]
    (mount,) = [one for one in container(manifests)["volumeMounts"] if one["name"] == "findings"]
    assert option == f"--findings-file={mount['mountPath']}/findings.yaml"
    volumes = manifests["Deployment", "ls"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "findings", "configMap": {"name": "ls-findings"}} in volumes
    annotations = manifests["Deployment", "ls"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["own"] == "1"
    assert "lockstep.dev/findings" in annotations

    file, key = tmp_path / "findings.yaml", tmp_path / "key"
    file.write_text(text)
    key.write_text("k" * 32)
    assert parse([f"--master-key-file={key}", f"--findings-file={file}"]).findings == text
    table = load(file)  # what Helm makes of it is what the trainer's table takes
    assert (table.gpu["nvlink-down"].severity, table.xid(63).severity) == ("warn", "fatal")


@pytest.mark.parametrize(("text", "says"), [("- gpu", "must be an object"), ("{", "findings.yaml"), (None, "No such")])
def test_findings_that_can_not_be_read_stop_the_operator(tmp_path: Path, text: str | None, says: str) -> None:
    file, key = tmp_path / "findings.yaml", tmp_path / "key"
    key.write_text("k" * 32)
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        parse([f"--master-key-file={key}", f"--findings-file={file}"])


def test_replicas_are_spread_over_nodes_and_adding_one_replaces_none(render: Render) -> None:
    one, two = (render({"replicas": number})["Deployment", "ls"]["spec"] for number in (1, 2))
    assert one["template"] == two["template"]
    selector = two["selector"]["matchLabels"]
    (rule,) = two["template"]["spec"]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert rule["podAffinityTerm"]["labelSelector"]["matchLabels"] == selector
    assert selector.items() <= two["template"]["metadata"]["labels"].items()
    other = render({"affinity": {"nodeAffinity": {}}})["Deployment", "ls"]["spec"]["template"]["spec"]["affinity"]
    assert other == {"nodeAffinity": {}}


def test_probes_services_and_policies_name_ports_that_exist(render: Render) -> None:
    manifests = render({"networkPolicy": {"enabled": True}})
    operator = container(manifests)
    ports = {port["name"] for port in operator["ports"]}
    named = {operator[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    named |= {port["targetPort"] for port in manifests["Service", "ls-metrics"]["spec"]["ports"]}
    named |= {p["port"] for rule in manifests["NetworkPolicy", "ls"]["spec"]["ingress"] for p in rule["ports"]}
    assert named == ports


def test_monitors_keep_the_labels_that_series_come_with(render: Render) -> None:
    """An agent's name the node that is slow or wrong, the operator's the job's namespace: else the target's win."""
    manifests = render({"metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}})
    endpoints = (
        manifests["PodMonitor", "ls-agents"]["spec"]["podMetricsEndpoints"]
        + manifests["ServiceMonitor", "ls"]["spec"]["endpoints"]
    )
    assert [endpoint["honorLabels"] for endpoint in endpoints] == [True, True]


def test_the_notes_say_how_to_go_on(helm: Path) -> None:
    result = subprocess.run(
        [helm, "install", "ls", REPOSITORY / "charts/lockstep", "--dry-run=client", "--namespace", "lockstep-system"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    notes = result.stdout.partition("NOTES:")[2]
    assert "kubectl explain trainingjob.spec" in notes
    named = re.findall(r"\S+\.(?:md|yaml)\b", notes)
    assert named
    assert [file for file in named if not (REPOSITORY / file).exists()] == []
    assert "examples/demo.yaml" not in named  # its image and its store are those of `make demo`
    assert "kubectl delete crd trainingjobs.lockstep.dev" in notes
