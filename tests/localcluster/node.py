"""A node: kubelet, containerd, kube-proxy and a device plugin in namespaces of their own.

The node is one tree of processes below `unshare`. Killing that one process takes all others and every mount with it at
once, as when a machine loses its power. Its folder is its disk and stays.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from localcluster import cgroups
from localcluster.imagestore import PAUSE, Containerd, Template
from localcluster.paths import Layout
from localcluster.pki import Pki
from localcluster.processes import ClusterError, Processes, children, in_network, run

NODES_PER_RACK, RACKS_PER_ZONE = 2, 2
RESOURCE = "nvidia.com/gpu"


def labels(node: int) -> dict[str, str]:
    """Where a node stands: two nodes to a rack, two racks to a zone."""
    rack = node // NODES_PER_RACK
    return {"lockstep.dev/rack": f"rack{rack}", "topology.kubernetes.io/zone": f"zone{rack // RACKS_PER_ZONE}"}


class Node:
    """One node of a cluster."""

    def __init__(self, layout: Layout, processes: Processes, number: int) -> None:
        self.layout, self.processes, self.number = layout, processes, number
        self.name = f"node{number}"
        self.folder = layout.node_folder(number)

    @property
    def powered(self) -> bool:
        """Whether it runs."""
        return self.processes.alive(self.name)

    @property
    def containerd(self) -> Containerd:
        """Its containerd, reached through its first process's view of the file system."""
        process = self.processes.get(self.name)
        first = children(process.pid) if process and process.alive else []
        if not first:
            raise ClusterError(f"{self.name} has no power")
        return Containerd(self.layout.programs / "ctr", Path(f"/proc/{first[0]}/root/run/containerd/containerd.sock"))

    def log(self, program: str) -> Path:
        """Where one of its programs writes."""
        return self.layout.logs / f"{self.name}-{program}.log"

    # Making it

    def create(self, pki: Pki, template: Template, gpus: int) -> None:
        """Make its disk, with all images that the template has, and its configuration."""
        for folder in ("kubelet", "cni", "log", "failed-gpus"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        if not (self.folder / "containerd").exists():
            template.copy_to(self.folder / "containerd")
        pki.make_node(self.number)
        self._write("cni/10-bridge.conflist", self._cni())
        self._write("kubelet.json", self._kubelet())
        self._write("kube-proxy.json", self._kube_proxy())
        self._write("containerd.toml", self._containerd())
        self._write("start.sh", self._script(gpus))

    def _write(self, file: str, content: str | dict[str, Any]) -> None:
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        (self.folder / file).write_text(text)

    def _cni(self) -> dict[str, Any]:
        addresses = {
            "type": "host-local",
            "ranges": [[{"subnet": self.layout.node_pods(self.number)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": "/run/cni",
        }
        bridge = {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": False,
            "hairpinMode": True,
            "ipam": addresses,
        }
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}

    def _containerd(self) -> str:
        programs = self.layout.programs
        return f"""\
version = 3
root = "{self.folder}/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true  # lowering it takes a capability that is missing on some machines
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{programs}"]
  conf_dir = "{self.folder}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  BinaryName = "{programs}/runc"
"""

    def _kubelet(self) -> dict[str, Any]:
        pki = self.layout.pki
        return {
            "kind": "KubeletConfiguration",
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "address": self.layout.node_address(self.number),
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": str(pki / "ca.crt")},
                "webhook": {"enabled": True},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(pki / f"{self.name}.crt"),
            "tlsPrivateKeyFile": str(pki / f"{self.name}.key"),
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "resolvConf": "",
            "clusterDNS": [self.layout.gateway],
            "clusterDomain": "cluster.local",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "cgroupRoot": f"/{self.layout.cgroup}/{self.name}",
            "enforceNodeAllocatable": ["pods"],
            "systemReserved": {"memory": "2Gi"},
            "failSwapOn": False,
            # Absolute, because the usual percentages trip on any disk that is rather full.
            "evictionHard": {"memory.available": "200Mi", "nodefs.available": "1Gi", "imagefs.available": "1Gi"},
            "imageGCHighThresholdPercent": 100,  # an image once removed could not be pulled again
            "maxPods": 250,
            "nodeStatusUpdateFrequency": "5s",
            "healthzPort": 0,
        }

    def _kube_proxy(self) -> dict[str, Any]:
        return {
            "kind": "KubeProxyConfiguration",
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(self.layout.inner_kubeconfig("kube-proxy"))},
            "clusterCIDR": self.layout.pods,
            "hostnameOverride": self.name,
            "bindAddress": self.layout.node_address(self.number),
            "healthzBindAddress": "",
            "metricsBindAddress": "",
            "conntrack": {"maxPerCore": 0},
        }

    def _script(self, gpus: int) -> str:
        programs, folder = self.layout.programs, self.folder
        labelled = ",".join(f"{k}={v}" for k, v in labels(self.number).items())
        kubeconfig = self.layout.inner_kubeconfig(self.name)
        plugin = f"{programs}/device-plugin -resource {RESOURCE} -count {gpus} -prefix GPU-{self.name}-"
        return f"""\
# The node's first process: it makes the node's own view of the file system, then keeps its programs running.
set -e
hostname {self.name}
mount -t tmpfs tmpfs /run
mkdir /run/containerd
mount --bind {folder}/kubelet /var/lib/kubelet
mount --bind {folder}/log /var/log
cd /

keep() {{
    name=$1
    shift
    (set +e; while :; do "$@"; sleep 0.5; done) >>{self.layout.logs}/{self.name}-$name.log 2>&1 &
}}

keep containerd {programs}/containerd --config {folder}/containerd.toml
until [ -S /run/containerd/containerd.sock ]; do sleep 0.05; done
keep kubelet {programs}/kubelet --config={folder}/kubelet.json --kubeconfig={kubeconfig} \\
    --hostname-override={self.name} --node-ip={self.layout.node_address(self.number)} --node-labels={labelled}
keep kube-proxy {programs}/kube-proxy --config={folder}/kube-proxy.json
{f"keep device-plugin {plugin} -failed {folder}/failed-gpus" if gpus else ""}
wait
"""

    # Running it

    def start(self) -> None:
        """Switch it on."""
        # Where each node mounts a folder of its own. It is never removed: that would undo the mounts of all nodes.
        Path("/var/lib/kubelet").mkdir(parents=True, exist_ok=True)
        # A machine starts without a bridge and without neighbours. Its pods get the first addresses again: where one is
        # not heard announcing its own, the entry of the pod before keeps it out of other nodes' reach for 8 s.
        run(*in_network(self.layout.namespace(self.number), "ip", "link", "del", "cni0"), check=False)
        # A machine starts without the cgroups of what ran before; left there, they keep the kubelet busy for 10 s.
        cgroups.remove(f"{self.layout.cgroup}/{self.name}")
        cgroups.make(self.layout.cgroup, self.number)
        namespaces = ["--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        argv = in_network(self.layout.namespace(self.number), "unshare", *namespaces, "bash", self.folder / "start.sh")
        self.processes.start(self.name, argv)

    def stop(self) -> None:
        """Switch it off without warning."""
        self.processes.stop(self.name)

    def remove(self) -> None:
        """Remove its disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # GPUs

    def device(self, device: str) -> str:
        """A device's full name, given its number or name."""
        return f"GPU-{self.name}-{device}" if device.isdigit() else device

    def fail_gpu(self, device: str) -> None:
        """Make the device plugin report a GPU as unhealthy."""
        (self.folder / "failed-gpus" / self.device(device)).touch()

    def heal_gpu(self, device: str | None = None) -> None:
        """Make it report a GPU, or all of the node's, as healthy again."""
        for file in (self.folder / "failed-gpus").glob(self.device(device) if device else "*"):
            file.unlink(missing_ok=True)

    def failed_gpus(self) -> list[str]:
        """The GPUs that are reported as unhealthy."""
        return sorted(file.name for file in (self.folder / "failed-gpus").glob("*"))
