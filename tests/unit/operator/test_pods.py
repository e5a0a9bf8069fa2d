"""What a pod looks like, and what of the template stands."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_operator.backends.kubernetes import KubernetesBackend
from lockstep_operator.cache import trim_pod
from lockstep_operator.errors import RefusedError
from lockstep_operator.plan import children, pods, pool
from lockstep_operator.plan.actions import NewPod
from manifests import trainer_job
from unit.operator.builders import CREDENTIALS, UID, make_job

DEFAULTS = pods.PodDefaults(image="example/default:1")


def render(template: dict[str, Any] | None = None, new: NewPod | None = None) -> dict[str, Any]:
    return pods.render(make_job(template=template or {}), new or NewPod("run-3-1", 3, 1), DEFAULTS)


def container(pod: dict[str, Any]) -> dict[str, Any]:
    return next(one for one in pod["spec"]["containers"] if one["name"] == constants.CONTAINER_NAME)


def test_an_empty_template_makes_a_whole_pod() -> None:
    pod = render()
    spec, own = pod["spec"], container(pod)
    assert own["image"] == "example/default:1"
    assert own["command"] == ["python3", "-m", "lockstep_trainer.supervisor"]
    assert own["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert (spec["hostname"], spec["subdomain"], spec["restartPolicy"]) == ("run-3-1", "run", "Always")
    assert {mount["mountPath"]: mount["name"] for mount in own["volumeMounts"]} == {
        "/lockstep/run": "lockstep-run",
        "/lockstep/config": "lockstep-config",
        "/lockstep/token": "lockstep-token",
        "/dev/shm": "lockstep-shm",
    }
    assert {mount["name"] for mount in own["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert {"name": "lockstep-run", "emptyDir": {"medium": "Memory"}} in spec["volumes"]


def test_every_variable_of_the_contract_is_set() -> None:
    names = {variable["name"] for variable in container(render())["env"]}
    assert names == {
        *("LOCKSTEP_POD_NAME", "LOCKSTEP_POD_UID", "LOCKSTEP_NAMESPACE", "LOCKSTEP_NODE_NAME", "LOCKSTEP_HOST"),
        *("LOCKSTEP_BIND", "LOCKSTEP_AGENT_PORT", "LOCKSTEP_STORE_PORT", "LOCKSTEP_ORDINAL", "LOCKSTEP_INCARNATION"),
        *("LOCKSTEP_RUN_DIR", "LOCKSTEP_CONFIG_DIR", "LOCKSTEP_TOKEN_DIR", "LOCKSTEP_GRACE_SECONDS"),
        *("LOCKSTEP_TLS", "LOCKSTEP_METRICS_PORT", "LOCKSTEP_TERMINATION_LOG"),
        "LOCKSTEP_FAULT_INJECTION",
    }


@pytest.mark.parametrize(("grace", "told"), [(None, "25"), (600, "595"), (2, "1"), (0, "0")])
def test_the_agent_knows_how_long_its_pod_may_take_to_end(grace: int | None, told: str) -> None:
    """A last checkpoint takes as long as it may, and no longer."""
    pod = render({"spec": {} if grace is None else {"terminationGracePeriodSeconds": grace}})
    assert {"name": "LOCKSTEP_GRACE_SECONDS", "value": told} in container(pod)["env"]


def test_who_is_replaced_is_the_operators_decision() -> None:
    """Pods stay on unreachable nodes until the operator gives them up."""
    for taint in ("not-ready", "unreachable"):
        toleration = {"key": f"node.kubernetes.io/{taint}", "operator": "Exists", "effect": "NoExecute"}
        assert toleration in render()["spec"]["tolerations"]  # no tolerationSeconds: without limit


def test_safe_defaults_can_be_opened_by_the_template() -> None:
    pod = render()
    assert pod["spec"]["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container(pod)["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["spec"]["automountServiceAccountToken"] is False

    opened = {
        "serviceAccountName": "reader",
        "securityContext": {"runAsNonRoot": False, "seccompProfile": {"type": "Unconfined"}},
        "containers": [{"name": "trainer", "securityContext": {"privileged": True}}],
    }
    pod = render({"spec": opened})
    assert pod["spec"]["securityContext"] == opened["securityContext"]
    assert container(pod)["securityContext"] == {"privileged": True}
    assert "automountServiceAccountToken" not in pod["spec"]


def test_what_the_template_says_stands() -> None:
    template = {
        "metadata": {"labels": {"team": "a", constants.LABEL_ORDINAL: "77"}, "annotations": {"note": "b"}},
        "spec": {
            "hostNetwork": True,
            "nodeSelector": {"pool": "gpu"},
            "terminationGracePeriodSeconds": 120,
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "volumes": [{"name": "corpus", "persistentVolumeClaim": {"claimName": "corpus"}}],
            "containers": [
                {"name": "sidecar", "image": "example/sidecar:1"},
                {
                    "name": "trainer",
                    "image": "example/mine:2",
                    "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "LOCKSTEP_HOST", "value": "spoofed"}],
                    "volumeMounts": [{"name": "corpus", "mountPath": "/data"}],
                    "resources": {"limits": {"memory": "10Gi"}},
                },
            ],
        },
    }
    pod = render(template)
    spec, own = pod["spec"], container(pod)
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["metadata"]["labels"][constants.LABEL_ORDINAL] == "3"
    assert pod["metadata"]["annotations"] == {"note": "b", constants.ANNOTATION_TLS: "on"}
    assert (spec["hostNetwork"], spec["nodeSelector"]) == (True, {"pool": "gpu"})
    assert spec["terminationGracePeriodSeconds"] == 120
    assert spec["tolerations"][0] == {"key": "gpu", "operator": "Exists"}
    assert own["image"] == "example/mine:2"
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in own["env"]
    assert "valueFrom" in next(one for one in own["env"] if one["name"] == "LOCKSTEP_HOST")
    assert own["volumeMounts"][0] == {"name": "corpus", "mountPath": "/data"}
    assert own["resources"]["limits"] == {"memory": "10Gi", "nvidia.com/gpu": "2"}
    assert {"name": "sidecar", "image": "example/sidecar:1"} in spec["containers"]


@pytest.mark.parametrize(
    "resources",
    [
        {"limits": {"amd.com/gpu": "2"}},
        {"limits": {"nvidia.com/gpu": "1"}},
        {"requests": {"nvidia.com/mig-1g.10gb": "2"}},
        {"claims": [{"name": "gpus"}]},
    ],
)
def test_devices_that_the_template_names_are_not_asked_for_twice(resources: dict[str, Any]) -> None:
    own = container(render({"spec": {"containers": [{"name": "trainer", "resources": resources}]}}))
    asked = {**own["resources"].get("limits", {}), **own["resources"].get("requests", {})}
    assert asked == {**resources.get("limits", {}), **resources.get("requests", {})}


def test_a_volume_that_the_template_mounts_is_not_mounted_twice() -> None:
    spec = {
        "volumes": [{"name": "mine", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}],
        "containers": [{"name": "trainer", "volumeMounts": [{"name": "mine", "mountPath": "/dev/shm/"}]}],
    }
    pod = render({"spec": spec})
    assert "lockstep-shm" not in json.dumps(pod)


def test_rendering_leaves_the_job_as_it_was() -> None:
    """The job is rendered once per pod: a change would pile up."""
    job = make_job(template={"spec": {"containers": [{"name": "trainer", "image": "a"}]}})
    first = pods.render(job, NewPod("run-0-0", 0, 0), DEFAULTS)
    assert pods.render(job, NewPod("run-0-0", 0, 0), DEFAULTS) == first
    assert job.spec.template.spec == {"containers": [{"name": "trainer", "image": "a"}]}


def test_nodes_that_were_lost_are_avoided_where_possible() -> None:
    pod = render(new=NewPod("run-0-1", 0, 1, avoid_nodes=("node-7",)))
    (preferred,) = pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred["preference"]["matchFields"] == [
        {"key": "metadata.name", "operator": "NotIn", "values": ["node-7"]}
    ]


def test_excluded_nodes_are_ruled_out_in_every_alternative_of_the_template() -> None:
    """Terms are alternatives: one without the condition would let the pod onto the node."""
    rule = {"key": "gpu", "operator": "In", "values": ["h100"]}
    terms = [{"matchExpressions": [rule]}, {"matchExpressions": [{**rule, "values": ["h200"]}]}]
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    new = NewPod("run-0-1", 0, 1, exclude_nodes=("node-7", "node-9"))
    out = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("node-7", "node-9")]

    def required(pod: dict[str, Any]) -> Any:
        return pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]

    assert required(render(new=new)) == {"nodeSelectorTerms": [{"matchFields": out}]}
    with_terms = required(render({"spec": {"affinity": affinity}}, new))
    assert with_terms == {"nodeSelectorTerms": [{**term, "matchFields": out} for term in terms]}


def test_credentials_come_from_the_secret_that_the_job_names() -> None:
    manifest = trainer_job()
    manifest["metadata"] |= {"uid": "u", "namespace": "team"}
    manifest["spec"]["checkpoint"]["s3"] = {"secretRef": {"name": "keys"}}
    job = TrainingJob.model_validate(manifest)
    variables = {
        one["name"]: one for one in container(pods.render(job, NewPod("quickstart-0-0", 0, 0), DEFAULTS))["env"]
    }
    assert variables["AWS_ACCESS_KEY_ID"]["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "accessKeyId"}}
    assert variables["AWS_SECRET_ACCESS_KEY"]["valueFrom"] == {
        "secretKeyRef": {"name": "keys", "key": "secretAccessKey"}
    }


@pytest.mark.parametrize("kind", ["Service", "Secret", "ConfigMap"])
def test_children_are_owned_by_the_job(kind: Any) -> None:
    manifest = children.render(make_job(), kind, {})
    (owner,) = manifest["metadata"]["ownerReferences"]
    assert owner == {
        "apiVersion": "lockstep.dev/v1alpha1",
        "kind": "TrainingJob",
        "name": "run",
        "uid": "6f0c-uid",
        "controller": True,
        "blockOwnerDeletion": True,
    }
    assert manifest["metadata"]["namespace"] == "team"


def test_the_children_hold_what_agents_read() -> None:
    secret = children.render(make_job(), "Secret", CREDENTIALS.secret(UID))
    assert set(secret["data"]) == {"token", "tls.crt", "tls.key", "ca.crt"}
    assert base64.b64decode(secret["data"]["token"]).decode() == CREDENTIALS.token(UID)
    config = json.loads(children.render(make_job(), "ConfigMap", {})["data"]["job.json"])
    assert set(config) == {"name", "namespace", "uid", "spec"}
    assert config["spec"]["resilience"]["hang"]["factor"] == 5.0  # all defaults are in it
    assert set(children.render(make_job(), "ConfigMap", {})["data"]) == {"job.json"}
    rows = "gpu: {nvlink-down: {severity: warn}}"
    assert children.render(make_job(), "ConfigMap", {}, rows)["data"][constants.FINDINGS_FILE] == rows
    service = children.render(make_job(), "Service", {})["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True


@pytest.mark.parametrize(("tls", "said"), [(True, "on"), (False, "off")])
def test_pod_and_operator_agree_on_tls(tls: bool, said: str) -> None:
    """The annotation tells the operator how to call the agent that the variable tells how to answer."""
    pod = render(new=NewPod("run-0-0", 0, 0, tls=tls))
    assert {"name": "LOCKSTEP_TLS", "value": said} in container(pod)["env"]
    pod["metadata"] |= {"uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    assert trim_pod(pod)[1].tls is tls


def test_prometheus_finds_a_port_that_asks_for_nothing() -> None:
    pod = render({"metadata": {"annotations": {constants.ANNOTATION_AGENT_PORT: "31000"}}})
    ports = {port["name"]: port["containerPort"] for port in container(pod)["ports"]}
    assert ports == {"agent": 31000, "metrics": 31001}
    assert {"name": "LOCKSTEP_METRICS_PORT", "value": "31001"} in container(pod)["env"]


@pytest.mark.parametrize("allowed", [True, False])
def test_only_the_administrator_allows_faults(allowed: bool) -> None:
    own = {"name": "trainer", "env": [{"name": "LOCKSTEP_FAULT_INJECTION", "value": "on"}]}
    job = make_job(template={"spec": {"containers": [own]}})
    pod = pods.render(job, NewPod("run-0-0", 0, 0), pods.PodDefaults(fault_injection=allowed))
    said = [one["value"] for one in container(pod)["env"] if one["name"] == "LOCKSTEP_FAULT_INJECTION"]
    assert said == ["on" if allowed else "off"]


NULLS: list[dict[str, Any]] = [
    {"metadata": {"labels": None, "annotations": None}},
    {"spec": {"containers": None, "tolerations": None, "volumes": None, "securityContext": None}},
    {"spec": {"terminationGracePeriodSeconds": None}},
    {
        "spec": {
            "containers": [
                {
                    "name": "trainer",
                    **dict.fromkeys(("image", "env", "ports", "volumeMounts", "securityContext", "resources")),
                }
            ]
        }
    },
    {"spec": {"containers": [{"name": "trainer", "resources": {"limits": None, "requests": None}}]}},
    {"spec": {"affinity": None}},
    {"spec": {"affinity": {"nodeAffinity": None}}},
]


@pytest.mark.parametrize("template", NULLS)
def test_null_is_as_if_it_were_left_out(template: dict[str, Any]) -> None:
    """What YAML makes of a name with nothing behind it."""
    new = NewPod("run-3-1", 3, 1, avoid_nodes=("lost",), exclude_nodes=("bad",))
    assert render(template, new) == render(None, new)
    assert pool.speaks_tls(make_job(template=template), (), otherwise=True)


def created(template: dict[str, Any], *, epoch: int = 0) -> list[Any]:
    """What the API server is asked to create, and how, of a job's pod."""
    asked: list[Any] = []

    class Client:
        async def create(self, *what: Any, **how: Any) -> None:
            asked.append((what, how))

    nothing: Any = None
    client: Any = Client()
    backend = KubernetesBackend(
        client, nothing, memory=nothing, events=nothing, defaults=DEFAULTS, credentials=CREDENTIALS
    )
    job = make_job(template=template)
    job = job.model_copy(update={"status": job.status.model_copy(update={"epoch": epoch})})
    asyncio.run(backend.create_pod(job, NewPod("run-0-0", 0, 0)))
    return asked


def test_the_server_is_asked_to_refuse_fields_that_it_does_not_know() -> None:
    (((_, manifest), how),) = created({"spec": {"nodeSelecter": {"gpu": "h100"}}})
    assert manifest["spec"]["nodeSelecter"] == {"gpu": "h100"}
    assert how == {"strict": True}


def test_a_job_that_has_trained_does_not_end_by_a_field_that_was_let_pass_before() -> None:
    (((_, manifest), how),) = created({"spec": {"nodeSelecter": {"gpu": "h100"}}}, epoch=3)
    assert manifest["spec"]["nodeSelecter"] == {"gpu": "h100"}
    assert how == {"strict": False}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"spec": {"volumes": [{"emptyDir": {}}]}}, "an entry lacks the field 'name'"),
        ({"metadata": {"annotations": {constants.ANNOTATION_AGENT_PORT: "x"}}}, "agent-port]: 'x' is no port's number"),
        ({"metadata": {"annotations": ["a"]}}, "metadata.annotations: ['a'] is no mapping of names to texts"),
        ({"metadata": {"labels": "a"}}, "metadata.labels: 'a' is no mapping of names to texts"),
        ({"spec": {"containers": ["trainer"]}}, "no pod can be made from spec.template"),
    ],
)
def test_a_template_of_which_no_pod_can_be_made_is_refused(template: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError) as refused:
        created(template)
    assert refused.value.code == 422
    assert words in refused.value.message


def test_annotations_that_are_none_keep_nobody_from_planning_and_from_saying_so() -> None:
    """A plan that can not be made would be tried every five seconds, and the job never told of it."""
    job = make_job(template={"metadata": {"annotations": ["a"]}})
    assert pool.speaks_tls(job, [], otherwise=True)
    assert pods.agent_port(job) == constants.AGENT_PORT
