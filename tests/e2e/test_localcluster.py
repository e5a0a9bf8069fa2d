"""The local cluster itself: what the other tests on it rely on, and that nothing of it stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from localcluster import Cluster
from localcluster.imagestore import PAUSE
from localcluster.node import RESOURCE
from localcluster.processes import in_network

pytestmark = pytest.mark.cluster

NAME = "localcluster-test"
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "sleeper", "labels": {"lockstep.dev/job-name": "job-a"}},
    "spec": {
        "nodeName": "node1",
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "main",
                "image": PAUSE,
                "ports": [{"name": "metrics", "containerPort": 8000}],
                "resources": {"limits": {RESOURCE: "1", "memory": "64Mi"}},
            }
        ],
    },
}


def eventually(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def traces(name: str) -> dict[str, list[str]]:
    """Everything on this machine that a cluster of this name would leave behind."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"/{name}/" in command or f"{name}-" in command:
            processes.append(command)
    interfaces = json.loads(subprocess.run(["ip", "-json", "link"], check=True, capture_output=True).stdout)
    return {
        "processes": processes,
        "namespaces": sorted(str(p) for p in Path("/run/netns").glob(f"{name}-*")),
        "cni": sorted(str(p) for p in Path("/run/netns").glob("cni-*")),
        "cgroups": sorted(str(p) for p in Path("/sys/fs/cgroup").glob(f"**/*{name}*")),
        "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if name in line],
        "interfaces": sorted(i["ifname"] for i in interfaces),
    }


@pytest.fixture(scope="module")
def before() -> dict[str, list[str]]:
    """How the machine was."""
    return traces(NAME)


@pytest.fixture(scope="module")
def small(before: dict[str, list[str]]) -> Iterator[Cluster]:
    """A cluster of two nodes beside the one that the other tests use."""
    if os.geteuid():
        pytest.skip("needs root")
    cluster = Cluster.up(nodes=2, gpus=2, name=NAME)
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(POD))
    cluster.kubectl("wait", "--for=condition=Ready", "pod/sleeper", "--timeout=60s")
    yield cluster
    cluster.down(purge=True)


def reaches(cluster: Cluster, node: int, other: int) -> bool:
    """Whether one node's kubelet can be dialled from another node."""
    script = f"exec 3<>/dev/tcp/{cluster.layout.node_address(other)}/10250"
    argv = in_network(cluster.layout.namespace(node), "timeout", "1", "bash", "-c", script)
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def test_a_second_up_returns_at_once(small: Cluster) -> None:
    started = time.monotonic()
    again = Cluster.up(nodes=2, gpus=2, name=NAME)
    assert time.monotonic() - started < 2
    assert again.record == small.record


def test_pods_run_and_nodes_say_where_they_stand(small: Cluster) -> None:
    assert small.node_of("sleeper") == 1
    nodes = small.api.get("/api/v1/nodes")["items"]
    assert {n["metadata"]["labels"]["lockstep.dev/rack"] for n in nodes} == {"rack0"}
    assert {n["metadata"]["labels"]["kubernetes.io/hostname"] for n in nodes} == {"node0", "node1"}
    assert {n["status"]["capacity"][RESOURCE] for n in nodes} == {"2"}


def test_pods_are_found_by_prometheus(small: Cluster) -> None:
    def found() -> bool:
        with urllib.request.urlopen(f"{small.prometheus_url}/api/v1/targets") as answer:
            labels = [t["labels"] for t in json.load(answer)["data"]["activeTargets"]]
        return any(one.get("lockstep_job") == "job-a" and one["pod"] == "sleeper" for one in labels)

    eventually(found, 15)


def test_a_partition_between_two_nodes_leaves_the_rest(small: Cluster) -> None:
    assert reaches(small, 0, 1)
    small.partition(0, 1)
    assert not reaches(small, 0, 1)
    assert not reaches(small, 1, 0)
    assert small.api.get("/api/v1/nodes/node1/proxy/healthz") == "ok", "the control plane is not cut off"
    small.heal(1)
    assert reaches(small, 0, 1)


def test_a_partition_of_a_node_is_silence(small: Cluster) -> None:
    small.partition(1)
    assert not reaches(small, 0, 1)
    assert small.node(1).powered
    small.heal(1)
    eventually(lambda: reaches(small, 0, 1), 10)


def test_a_gpu_fails_and_is_well_again(small: Cluster) -> None:
    def allocatable() -> str:
        value: str = small.api.get("/api/v1/nodes/node0")["status"]["allocatable"][RESOURCE]
        return value

    small.gpu_fail(0, "1")
    eventually(lambda: allocatable() == "1", 20)
    small.gpu_heal(0)
    eventually(lambda: allocatable() == "2", 20)


def test_power_cut_and_power_on(small: Cluster) -> None:
    def restarts() -> int:
        status = small.api.get("/api/v1/namespaces/default/pods/sleeper")["status"]
        return sum(c["restartCount"] for c in status["containerStatuses"] if c["ready"])

    def bridge() -> int:
        """The number of the node's bridge; neighbours are remembered for it, by their addresses."""
        argv = in_network(small.layout.namespace(1), "ip", "-json", "link", "show", "cni0")
        return int(json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)[0]["ifindex"])

    first, before = restarts(), bridge()
    small.power_cut(1)
    assert not small.node(1).powered
    assert not [p for p in traces(NAME)["processes"] if "/node1/" in p]
    assert small.api.get("/api/v1/namespaces/default/pods/sleeper")["status"]["phase"] == "Running", "nobody knows yet"
    small.power_on(1)
    eventually(lambda: restarts() > first)
    assert PAUSE in small.node(1).containerd.images(), "its disk stayed"
    assert bridge() != before, "its pods have the same addresses again: nobody may remember who had them"


def test_the_tenant_may_edit_their_namespace_only(small: Cluster) -> None:
    def may(*what: str) -> bool:
        answer = small.kubectl(f"--kubeconfig={small.tenant_kubeconfig}", "auth", "can-i", *what, check=False)
        return answer.strip() == "yes"

    assert may("create", "pods", "-n", "team-a")
    assert not may("create", "pods", "-n", "default")
    assert not may("list", "nodes")


def test_s3_writes_conditionally_and_keeps_its_data(small: Cluster) -> None:
    s3 = small.s3
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint_host,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name=s3.region,
    )
    client.create_bucket(Bucket="bucket")
    client.put_object(Bucket="bucket", Key="key", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket="bucket", Key="key", Body=b"second", IfNoneMatch="*")
    small.s3_stop()
    with pytest.raises((EndpointConnectionError, Exception)):
        client.list_buckets()
    small.s3_start()
    assert client.get_object(Bucket="bucket", Key="key")["Body"].read() == b"first"


def test_down_leaves_nothing(small: Cluster, before: dict[str, list[str]]) -> None:
    """Last but one: ends the module's cluster."""
    assert traces(NAME) != before
    small.down(purge=True)
    eventually(lambda: traces(NAME) == before, 10)  # processes that ended are still to be reaped
    assert not small.layout.state.exists()


def test_down_cleans_what_a_crash_left(before: dict[str, list[str]]) -> None:
    command = [sys.executable, "-m", "localcluster", "up", "--nodes", "2"]
    environment = {**os.environ, "LOCKSTEP_CLUSTER_NAME": NAME}
    for delay in (0.8, 2.0, 3.5):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        Cluster(NAME).down()
        eventually(lambda: traces(NAME) == before, 10)


def test_interrupting_up_cleans_up(before: dict[str, list[str]]) -> None:
    command = [sys.executable, "-m", "localcluster", "up", "--nodes", "2"]
    environment = {**os.environ, "LOCKSTEP_CLUSTER_NAME": NAME}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    eventually(lambda: traces(NAME) == before, 10)
    Cluster(NAME).down(purge=True)
