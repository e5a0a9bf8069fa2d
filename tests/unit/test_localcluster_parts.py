"""The parts of the local cluster that need neither root nor Kubernetes."""

import ipaddress
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from localcluster import build
from localcluster.controlplane import path_of
from localcluster.discovery import targets
from localcluster.images import content_hash, copied
from localcluster.node import labels
from localcluster.paths import MAX_NODES, PACKAGE, Layout
from localcluster.processes import ClusterError, Process, Processes, start_time, wait_for
from localcluster.services import free_ports


def test_addresses_do_not_overlap() -> None:
    layout = Layout("some-cluster")
    networks = [ipaddress.ip_network(n) for n in (f"{layout.prefix}.0.0/24", layout.services, layout.pods)]
    assert not any(a.overlaps(b) for a in networks for b in networks if a is not b)
    assert ipaddress.ip_address(layout.kubernetes_service) == networks[1][1]
    for node in (0, MAX_NODES - 1):
        assert ipaddress.ip_address(layout.node_address(node)) in networks[0]
        assert ipaddress.ip_network(layout.node_pods(node)).subnet_of(networks[2])  # type: ignore[arg-type]


def test_the_name_comes_from_the_environment_or_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_CLUSTER_NAME", "other")
    assert Layout.of_checkout().name == "other"
    assert Layout.of_checkout("third").name == "third"
    monkeypatch.delenv("LOCKSTEP_CLUSTER_NAME")
    assert Layout.of_checkout().name == Layout.of_checkout().name != "other"
    with pytest.raises(ClusterError, match="cluster name"):
        Layout.of_checkout("Not/A Name")


def test_racks_are_within_zones() -> None:
    zone_of_rack = {labels(i)["lockstep.dev/rack"]: labels(i)["topology.kubernetes.io/zone"] for i in range(8)}
    assert len(zone_of_rack) == 4
    assert all(
        labels(i)["topology.kubernetes.io/zone"] == zone_of_rack[labels(i)["lockstep.dev/rack"]] for i in range(8)
    )


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("go version go1.26.8 linux/amd64", (1, 26, 8)),
        ("v4.3.1+g1234567", (4, 3, 1)),
        ("etcd Version: 3.7.3\nGit SHA: 1", (3, 7, 3)),
        ("runc version 1.2", (1, 2, 0)),
        ("no such thing", ()),
    ],
)
def test_versions_are_read(output: str, version: tuple[int, ...]) -> None:
    assert build.version_of(output) == version


def test_every_module_is_pinned() -> None:
    for module in build.MODULES:
        text = (module.folder / "go.mod").read_text()
        assert text.startswith(f"module lockstep.dev/localcluster/{module.name}\n")
        for package in module.packages.values():
            assert package == "." or package in text, f"{package} is not a tool of {module.name}"
        assert module.name == "pause" or (module.folder / "go.sum").stat().st_size


def test_an_old_program_on_the_path_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    helm = next(m for m in build.MODULES if m.name == "helm")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program = tmp_path / "helm"
    program.write_text("#!/bin/sh\necho v3.9.0\n")
    program.chmod(0o755)
    assert build.missing([helm]) == [helm]
    program.write_text("#!/bin/sh\necho v3.14.2\n")
    assert build.missing([helm]) == []
    assert build.programs([helm]) == {"helm": program}


def test_what_a_dockerfile_copies_is_found(tmp_path: Path) -> None:
    text = "FROM a\nCOPY one two /there/\ncopy --chown=1:1 \\\n  three /x\nCOPY --from=b /no /no\nRUN COPY\n"
    assert copied(text) == ["one", "two", "three"]


def test_the_content_hash_sees_what_matters(tmp_path: Path) -> None:
    file = tmp_path / "folder/file"
    file.parent.mkdir()
    file.write_text("1")
    first = content_hash([tmp_path / "folder"])
    (tmp_path / "folder/__pycache__").mkdir()
    (tmp_path / "folder/__pycache__/file.pyc").write_text("x")
    assert content_hash([tmp_path / "folder"]) == first
    file.write_text("2")
    assert content_hash([tmp_path / "folder"]) != first


def test_manifests_go_where_they_belong() -> None:
    paths = {path_of(m) for m in yaml.safe_load((PACKAGE / "bootstrap.yaml").read_text())}
    assert "/api/v1/namespaces" in paths
    assert "/apis/rbac.authorization.k8s.io/v1/namespaces/team-a/rolebindings" in paths
    assert "/apis/discovery.k8s.io/v1/namespaces/local-services/endpointslices" in paths


def test_discovery_labels_ports_of_pods_with_an_address() -> None:
    container = {"name": "main", "ports": [{"containerPort": 8000, "name": "metrics"}]}
    metadata = {"name": "a-0", "namespace": "team-a", "labels": {"lockstep.dev/job-name": "a"}}
    pod = {
        "metadata": metadata,
        "spec": {"containers": [container], "nodeName": "node1"},
        "status": {"phase": "Running", "podIP": "10.1.2.3"},
    }
    (target,) = targets([pod, pod | {"status": {"phase": "Pending"}}])
    assert target["targets"] == ["10.1.2.3:8000"]
    assert target["labels"]["__meta_kubernetes_pod_label_lockstep_dev_job_name"] == "a"
    assert target["labels"]["__meta_kubernetes_pod_container_port_name"] == "metrics"


def test_ports_that_are_taken_are_passed_over() -> None:
    first = free_ports(28000, 3)[0]
    from localcluster.forwarder import listen

    with listen(first + 1):
        assert free_ports(first, 3)[0] >= first + 3


def test_a_process_is_known_by_its_start_too(tmp_path: Path) -> None:
    processes = Processes(tmp_path / "processes", tmp_path / "logs", tmp_path)
    process = processes.start("sleeper", ["sleep", "60"])
    assert processes.alive("sleeper")
    impostor = Process(process.pid, process.started - 1)
    assert not impostor.alive
    impostor.kill()
    assert processes.alive("sleeper"), "a process of the same number but another start was ended"
    processes.stop("sleeper")
    assert start_time(process.pid) is None
    assert processes.names() == []


def test_a_process_lives_until_its_last_thread_has_ended(tmp_path: Path) -> None:
    """A killed API server held its port while its first thread was a zombie already; the next one failed to bind."""
    code = (
        "import ctypes, platform, threading, time; threading.Thread(target=time.sleep, args=(60,)).start();"
        "ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[platform.machine()], 0)"  # exit, of this thread alone
    )
    processes = Processes(tmp_path / "processes", tmp_path / "logs", tmp_path)
    process = processes.start("threads", [sys.executable, "-c", code])
    stat = Path(f"/proc/{process.pid}/stat")
    wait_for("first thread ended", lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", 10, stat)
    assert process.alive
    processes.stop("threads")
    assert not process.alive


def test_stopping_waits_for_what_dies_with_it(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    processes = Processes(tmp_path / "processes", tmp_path / "logs", tmp_path)
    process = processes.start("parent", ["unshare", "--fork", "--kill-child", sys.executable, "-c", code])
    time.sleep(0.3)
    processes.stop("parent")
    assert not process.alive


def test_waiting_names_the_log(tmp_path: Path) -> None:
    log = tmp_path / "thing.log"
    log.write_text("first\nthe reason\n")
    with pytest.raises(ClusterError, match=r"(?s)thing: not within 0 s; see .*thing.log.*the reason"):
        wait_for("thing", lambda: False, 0, log)


def test_the_command_line_explains_itself() -> None:
    command = [sys.executable, "-m", "localcluster", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in ("up", "down", "status", "power-cut", "partition", "image-load", "gpu-fail", "s3-stop", "env"):
        assert f"\n    {name} " in shown or f"\n    {name}\n" in shown
