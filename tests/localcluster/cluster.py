"""The cluster as a whole: what tests and the demonstration use."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localcluster import build, cgroups, controlplane, debian, services
from localcluster.api import Api
from localcluster.controlplane import ControlPlane
from localcluster.imagestore import Template
from localcluster.network import Network
from localcluster.node import RESOURCE, Node
from localcluster.paths import MAX_NODES, Layout
from localcluster.pki import Pki
from localcluster.processes import ClusterError, Processes, run, wait_for
from localcluster.services import S3, Services

DEBIAN_PACKAGES = "iproute2", "nftables", "openssl", "procps", "util-linux"
_LARGE = 400 << 20


class Cluster:
    """A cluster, running or not. Nothing is held open: all that is known of it is in its state folder."""

    def __init__(self, name: str | None = None, say: Callable[[str], None] = debian.say) -> None:
        self.layout = Layout.of_checkout(name)
        self.say = say
        self.processes = Processes(self.layout.state / "processes", self.layout.logs, self.layout.programs)
        self.network = Network(self.layout)
        self.services = Services(self.layout, self.processes)
        self.control = ControlPlane(self.layout, self.processes)
        self.template = Template()

    # What was asked for and chosen

    @property
    def record(self) -> dict[str, Any]:
        """What `up` wrote down: nodes, GPUs, ports, S3 keys, images."""
        try:
            content: dict[str, Any] = json.loads(self.layout.record.read_text())
        except FileNotFoundError:
            raise ClusterError(f"cluster {self.layout.name} is not up") from None
        return content

    def _write(self, record: dict[str, Any]) -> None:
        temporary = self.layout.record.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(record, indent=1))
        temporary.replace(self.layout.record)

    @property
    def exists(self) -> bool:
        """Whether it was brought up and not taken down since."""
        return self.layout.record.exists()

    @property
    def ports(self) -> dict[str, int]:
        """The ports on the host's loopback: api, s3, prometheus."""
        ports: dict[str, int] = self.record["ports"]
        return ports

    @property
    def s3(self) -> S3:
        """How to reach the S3 server."""
        return S3(**self.record["s3"])

    @property
    def prometheus_url(self) -> str:
        """Prometheus, on the host."""
        return f"http://127.0.0.1:{self.ports['prometheus']}"

    @property
    def prometheus_url_pods(self) -> str:
        """Prometheus, in pods."""
        return "http://prometheus.local-services.svc:9090"

    @property
    def kubeconfig(self) -> Path:
        """An administrator's kubeconfig, for use on the host."""
        return self.layout.kubeconfig("admin")

    @property
    def tenant_kubeconfig(self) -> Path:
        """A plain user's kubeconfig: may edit what is in the namespace team-a, and nothing else."""
        return self.layout.kubeconfig("tenant")

    @property
    def nodes(self) -> list[Node]:
        """The nodes, powered or not."""
        return [self.node(i) for i in range(self.record["nodes"])]

    def node(self, number: int) -> Node:
        """One node."""
        if not 0 <= number < self.record["nodes"]:
            raise ClusterError(f"there is no node {number}: the cluster has {self.record['nodes']}")
        return Node(self.layout, self.processes, number)

    @property
    def api(self) -> Api:
        """A client of the API server, as administrator."""
        return Api(self.kubeconfig)

    @property
    def environment(self) -> dict[str, str]:
        """The variables for a user's shell."""
        path = f"{self.layout.bin}{os.pathsep}{os.environ['PATH']}"
        cache = str(self.layout.state / "kubectl-cache")  # for one cluster's life: the next may have other objects
        return {"KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": cache, "PATH": path, **self.s3.environment}

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl as administrator; what it printed."""
        env = {**os.environ, **self.environment}
        return run(self.layout.programs / "kubectl", *arguments, stdin=stdin, check=check, env=env)

    # Up and down

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        folder = self.layout.state.parent
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{self.layout.name}.lock", "w") as lock:  # beside the folder, which `down` can remove
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @classmethod
    def up(
        cls, nodes: int = 3, gpus: int = 2, name: str | None = None, say: Callable[[str], None] = debian.say
    ) -> "Cluster":
        """Bring the cluster up; what runs already stays, nodes that are missing are added."""
        if os.geteuid():
            raise ClusterError("the local cluster makes namespaces, mounts and cgroups: run it as root")
        if not 0 <= nodes <= MAX_NODES:
            raise ClusterError(f"at most {MAX_NODES} nodes")
        cluster = cls(name, say)
        debian.install(*DEBIAN_PACKAGES)
        wanted = [m.name for m in build.MODULES if nodes or m.name in build.CONTROL_PLANE]
        build.build(wanted)
        with cluster._lock():
            if cluster.healthy():
                if cluster.record["gpus"] != gpus and cluster.record["nodes"]:
                    raise ClusterError(f"it runs with {cluster.record['gpus']} GPUs a node; take it down first")
            else:
                cluster._clean()
                cluster._undo_on_failure(lambda: cluster._start_control_plane(gpus))
            if cluster.record["nodes"] < nodes:
                cluster._link_programs()
                cluster._undo_on_failure(lambda: cluster._add_nodes(nodes, gpus))
        return cluster

    def _undo_on_failure(self, start: Callable[[], None]) -> None:
        try:
            start()
        except BaseException as problem:
            if not isinstance(problem, ClusterError):
                self.say("cleaning up …")
            self._clean(keep_logs=True)
            raise

    def healthy(self) -> bool:
        """Whether the control plane is whole and answers. Nodes may be without power, and S3 stopped."""
        if not self.exists:
            return False
        needed = [*controlplane.COMPONENTS, "forwarder"]
        return all(map(self.processes.alive, needed)) and self.api.ready()

    def _link_programs(self) -> None:
        for folder in (self.layout.programs, self.layout.bin):
            folder.mkdir(parents=True, exist_ok=True)
        for name, path in build.programs().items():
            folders = [self.layout.programs, *([self.layout.bin] if name in {"kubectl", "helm"} else [])]
            for folder in folders:
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(path)

    def _start_control_plane(self, gpus: int) -> None:
        layout = self.layout
        layout.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._link_programs()
        numbers = services.free_ports(layout.first_port, 3)
        ports = dict(zip(("api", "s3", "prometheus"), numbers, strict=True))
        s3 = S3(
            endpoint_host=f"http://127.0.0.1:{ports['s3']}",
            endpoint_pods=f"http://s3.local-services.svc:{services.S3_PORT}",
            access_key=f"LS{secrets.token_hex(9).upper()}",
            secret_key=secrets.token_hex(20),
        )
        record = {"name": layout.name, "nodes": 0, "gpus": gpus, "ports": ports, "s3": asdict(s3), "owed": {}}
        self._write(record)
        self.network.add_control_plane()
        self.services.start_forwarder(ports)
        Pki(layout, ports["api"]).make()
        self.control.start_etcd()
        self.control.start_api()
        with_s3 = (layout.programs / "versitygw").exists()
        if with_s3:
            self.services.start_s3(s3)
        self.services.start_prometheus()
        api = self.api
        self.control.wait_ready(api)
        self.control.start_controllers()
        self.control.bootstrap(api)
        if (layout.programs / "coredns").exists():
            self.services.start_dns()
        if with_s3:
            self.services.wait_answering("s3", ports["s3"])
        self.services.wait_answering("prometheus", ports["prometheus"], "/-/ready")

    def _add_nodes(self, count: int, gpus: int) -> None:
        record = self.record
        first, pki = record["nodes"], Pki(self.layout, self.ports["api"])
        self._write(record | {"nodes": count, "gpus": gpus})
        for component, start in (("coredns", self.services.start_dns), ("s3", lambda: self.services.start_s3(self.s3))):
            if component not in self.processes.names():  # the control plane came up before these were built
                start()
        self.template.prepare()
        for number in range(first, count):
            self.network.add_node(number)
            self.node(number).create(pki, self.template, gpus)
            self.node(number).start()
        names = [f"node{i}" for i in range(first, count)]
        self.wait_nodes(names, gpus)

    def wait_nodes(self, names: list[str], gpus: int, seconds: float = 120) -> None:
        """Wait until nodes are Ready and offer their GPUs."""
        api = self.api

        def ready() -> bool:
            found = {n["metadata"]["name"]: n["status"] for n in api.get("/api/v1/nodes")["items"]}
            return all(
                name in found
                and _condition(found[name], "Ready") == "True"
                and int(found[name]["allocatable"].get(RESOURCE, 0)) == gpus
                for name in names
            )

        log = Node(self.layout, self.processes, int(names[0].removeprefix("node"))).log("kubelet")
        wait_for(f"nodes {', '.join(names)} Ready", ready, seconds, log)

    def down(self, purge: bool = False) -> None:
        """End all of it. The logs stay, unless the whole folder is to go."""
        with self._lock():
            self._clean(keep_logs=True)
            if purge:
                shutil.rmtree(self.layout.state, ignore_errors=True)

    def _clean(self, keep_logs: bool = False) -> None:
        """Remove what the record and the names say is this cluster's, whether or not the last run ended well."""
        layout, names = self.layout, self.processes.names()
        for name in sorted(names, key=lambda n: not n.startswith("node")):  # nodes first: they write to all else
            self.processes.stop(name)
        self.network.remove()
        cgroups.remove(layout.cgroup)
        layout.record.unlink(missing_ok=True)
        for entry in layout.state.glob("*"):
            if entry == layout.logs and keep_logs:
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    # Failures

    def power_cut(self, number: int) -> None:
        """Cut a node's power: silence first, then all its processes and mounts are gone at once.

        The cable goes first, because a kernel that is told to end processes closes their connections, and a machine
        without power doesn't.
        """
        with self._lock():
            node = self.node(number)
            self.network.link(number, up=False)
            node.stop()

    def power_on(self, number: int) -> None:
        """Switch a node on again. Its disk is as it was."""
        with self._lock():
            node = self.node(number)
            self.network.link(number, up=True)
            if not node.powered:
                node.start()
                # Only what was loaded while it was off: all clusters of this user share the files of images, and what
                # another checkout has built since must not get in.
                owed = dict(self.record["owed"])
                for path in map(Path, owed.pop(node.name, [])):
                    wait_for(f"{node.name}'s containerd", lambda: _up(node), 30, node.log("containerd"))
                    if path.exists():
                        node.containerd.load(path)
                self._write(self.record | {"owed": owed})

    def partition(self, number: int, other: int | None = None) -> None:
        """Cut a node off from all others and the control plane, or only from one other node."""
        with self._lock():
            node = self.node(number)
            if other is None:
                self.network.link(node.number, up=False)
            else:
                self.network.cut(node.number, self.node(other).number)

    def heal(self, number: int, other: int | None = None) -> None:
        """Undo `partition`."""
        with self._lock():
            if other is None and self.node(number).powered:
                self.network.link(number, up=True)
            self.network.mend(number, other)

    def s3_stop(self) -> None:
        """Kill the S3 server; its data stays."""
        with self._lock():
            self.services.stop_s3()

    def s3_start(self) -> None:
        """Start the S3 server again."""
        with self._lock():
            if not self.processes.alive("s3"):
                self.services.start_s3(self.s3)
            self.services.wait_answering("s3", self.ports["s3"])

    def apiserver_restart(self) -> None:
        """Kill the API server, start it again as it was, and wait until it answers."""
        with self._lock():
            self.control.kill_api()
            self.control.start_api()
            self.control.wait_ready(self.api)

    def gpu_fail(self, number: int, device: str = "0") -> None:
        """Make a node's device plugin report a GPU as unhealthy."""
        self.node(number).fail_gpu(device)

    def gpu_heal(self, number: int, device: str | None = None) -> None:
        """Make it report a GPU, or all of the node's, as healthy again."""
        self.node(number).heal_gpu(device)

    # Images and pods

    def load_image(self, *paths: str | Path) -> None:
        """Give images to all nodes, present and future: docker-archive files, or what `images.build_image` returned."""
        files = [Path(p).absolute() for p in paths]
        self.template.load(*files)
        if not self.exists:
            return
        with self._lock():
            powered, off = ([node for node in self.nodes if node.powered is on] for on in (True, False))
            owed = self.record["owed"]
            owed |= {node.name: sorted({*owed.get(node.name, []), *map(str, files)}) for node in off}
            self._write(self.record | {"owed": owed})
            large = [n for n in powered if sum(map(n.containerd.missing, files)) > _LARGE and not self._pods_on(n)]
            if large:
                self._exchange_disks(large)
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda node: [node.containerd.load(path) for path in files], powered))

    def _pods_on(self, node: Node) -> int:
        query = f"fieldSelector=spec.nodeName={node.name},status.phase!=Succeeded,status.phase!=Failed"
        return len(self.api.get(f"/api/v1/pods?{query}")["items"])

    def _exchange_disks(self, nodes: list[Node]) -> None:
        """Give idle nodes new disks made from the template: minutes sooner than importing gigabytes into each."""
        for node in nodes:
            node.stop()
            self.api.request("DELETE", f"/api/v1/nodes/{node.name}")  # what it says of itself is out of date
            shutil.rmtree(node.folder / "containerd")
            self.template.copy_to(node.folder / "containerd")
            node.start()
        self.wait_nodes([node.name for node in nodes], self.record["gpus"])

    def node_of(self, pod: str, namespace: str = "default") -> int:
        """The number of the node that a pod runs on."""
        name = self.api.get(f"/api/v1/namespaces/{namespace}/pods/{pod}")["spec"].get("nodeName")
        if not name:
            raise ClusterError(f"pod {namespace}/{pod} is on no node")
        return int(name.removeprefix("node"))


def _condition(status: dict[str, Any], kind: str) -> str:
    return next((str(c["status"]) for c in status.get("conditions", ()) if c["type"] == kind), "Unknown")


def _up(node: Node) -> bool:
    try:
        return node.containerd.answers()
    except (ClusterError, subprocess.SubprocessError):
        return False
