"""etcd, API server, controller manager and scheduler, in the control plane's namespace."""

from typing import Any

import yaml

from localcluster.api import Api
from localcluster.paths import PACKAGE, Layout
from localcluster.processes import Processes, in_network, wait_for

# Gang scheduling by the scheduler itself: PodGroup objects, and pods that name one.
FEATURE_GATES = "--feature-gates=GenericWorkload=true"
COMPONENTS = "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"


class ControlPlane:
    """Starts the control plane and fills in what every cluster starts with."""

    def __init__(self, layout: Layout, processes: Processes) -> None:
        self.layout, self.processes = layout, processes

    def _start(self, program: str, *options: str) -> None:
        argv = in_network(self.layout.control_plane, self.layout.programs / program, *options)
        self.processes.start(program, argv)

    def start_etcd(self) -> None:
        """Start etcd."""
        self._start(
            "etcd",
            f"--data-dir={self.layout.state / 'etcd'}",
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--log-level=warn",
            "--unsafe-no-fsync",  # the data does not outlive `down`, and the disk is shared with all nodes
        )

    def start_api(self) -> None:
        """Start the API server."""
        layout, pki = self.layout, self.layout.pki
        self._start(
            "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            f"--bind-address={layout.gateway}",
            f"--advertise-address={layout.gateway}",
            "--secure-port=6443",
            f"--client-ca-file={pki / 'ca.crt'}",
            f"--tls-cert-file={pki / 'apiserver.crt'}",
            f"--tls-private-key-file={pki / 'apiserver.key'}",
            f"--service-account-key-file={pki / 'service-accounts.pub'}",
            f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={layout.services}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement,NodeRestriction",
            "--allow-privileged=true",
            # Webhooks are dialled at their endpoints: no kube-proxy runs in this namespace.
            "--enable-aggregator-routing=true",
            f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
            f"--kubelet-client-key={pki / 'kubelet-client.key'}",
            f"--kubelet-certificate-authority={pki / 'ca.crt'}",
            "--kubelet-preferred-address-types=InternalIP",
            "--runtime-config=scheduling.k8s.io/v1beta1=true",
            f"--audit-policy-file={PACKAGE / 'audit-policy.yaml'}",
            f"--audit-log-path={layout.logs / 'audit.log'}",
            "--audit-log-maxsize=200",
            "--audit-log-maxbackup=2",
            FEATURE_GATES,
        )

    def kill_api(self) -> None:
        """Kill the API server; its connections break. etcd keeps what it has."""
        self.processes.stop("kube-apiserver")

    def start_controllers(self) -> None:
        """Start the controller manager and the scheduler."""
        layout = self.layout
        common = (
            "--kube-api-qps=1000",
            "--kube-api-burst=1000",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            FEATURE_GATES,
        )
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={layout.inner_kubeconfig('controller-manager')}",
            "--use-service-account-credentials",
            f"--service-account-private-key-file={layout.pki / 'service-accounts.key'}",
            f"--root-ca-file={layout.pki / 'ca.crt'}",
            *common,
        )
        self._start("kube-scheduler", f"--kubeconfig={layout.inner_kubeconfig('scheduler')}", *common)

    def wait_ready(self, api: Api) -> None:
        """Wait for the API server."""
        wait_for("API server", api.ready, 60, self.processes.log("kube-apiserver"), every=0.05)

    def bootstrap(self, api: Api) -> None:
        """Create the objects of bootstrap.yaml."""
        text = (PACKAGE / "bootstrap.yaml").read_text().replace("GATEWAY", self.layout.gateway)
        for manifest in yaml.safe_load(text):
            api.apply(path_of(manifest), manifest)


def path_of(manifest: dict[str, Any]) -> str:
    """The API path of the list that an object belongs in."""
    group = manifest["apiVersion"]
    root = f"/apis/{group}" if "/" in group else f"/api/{group}"
    namespace = manifest["metadata"].get("namespace")
    inside = f"/namespaces/{namespace}" if namespace else ""
    return f"{root}{inside}/{manifest['kind'].lower()}s"
