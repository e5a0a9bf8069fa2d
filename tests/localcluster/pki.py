"""The cluster's certificate authority, its certificates and kubeconfigs.

All of it is made anew at each `up`; the keys never leave the state folder.
"""

import base64
import json
from pathlib import Path

from localcluster.paths import Layout
from localcluster.processes import run

DAYS = "365"
_CONFIG = """[req]
distinguished_name = name
[name]
"""
_COMPONENTS = {
    "kubelet-client": "/O=system:masters/CN=kube-apiserver-kubelet-client",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "kube-proxy": "/CN=system:kube-proxy",
    "coredns": "/CN=lockstep:coredns",
    "prometheus": "/CN=lockstep:prometheus",
    "admin": "/O=system:masters/CN=admin",
    "tenant": "/O=team-a/CN=tenant",
}
USERS = "admin", "tenant"


class Pki:
    """Makes keys, certificates and kubeconfigs in the state folder."""

    def __init__(self, layout: Layout, api_port: int) -> None:
        self.layout, self.folder, self.api_port = layout, layout.pki, api_port

    def _request(self, name: str, subject: str, *options: str) -> None:
        config = ("-config", self.folder / "openssl.cnf", "-x509", "-days", DAYS, "-subj", subject)
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")
        files = ("-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.crt")
        run("openssl", "req", *config, *key, *files, *options)

    def certificate(self, name: str, subject: str, names: str = "") -> None:
        """Make a key and a certificate of the cluster's authority, good for client and server."""
        usage = ("keyUsage=digitalSignature", "extendedKeyUsage=clientAuth,serverAuth")
        extensions = ["basicConstraints=CA:FALSE", *usage]
        extensions += [f"subjectAltName={names}"] if names else []
        authority = ("-CA", str(self.folder / "ca.crt"), "-CAkey", str(self.folder / "ca.key"))
        self._request(name, subject, *authority, *(word for e in extensions for word in ("-addext", e)))

    def make(self) -> None:
        """Make the authority, the components' certificates and all kubeconfigs but the nodes'."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.folder / "openssl.cnf").write_text(_CONFIG)
        usage = "keyUsage=keyCertSign,digitalSignature"
        authority = ("basicConstraints=critical,CA:TRUE", usage, "subjectKeyIdentifier=hash")
        self._request("ca", "/CN=lockstep-local", *(word for e in authority for word in ("-addext", e)))
        # Service account tokens are signed with a key of their own.
        keys = self.folder / "service-accounts.key", self.folder / "service-accounts.pub"
        run("openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", keys[0])
        run("openssl", "ec", "-in", keys[0], "-pubout", "-out", keys[1])
        addresses = self.layout.gateway, self.layout.kubernetes_service, "127.0.0.1"
        names = ["DNS:localhost", "DNS:kubernetes.default.svc", *(f"IP:{a}" for a in addresses)]
        self.certificate("apiserver", "/CN=kube-apiserver", ",".join(names))
        for name, subject in _COMPONENTS.items():
            self.certificate(name, subject)
            self._kubeconfig(self.layout.inner_kubeconfig(name), name, f"https://{self.layout.gateway}:6443")
        for user in USERS:
            namespace = "team-a" if user == "tenant" else "default"
            self._kubeconfig(self.layout.kubeconfig(user), user, f"https://127.0.0.1:{self.api_port}", namespace)

    def make_node(self, node: int) -> None:
        """Make a node's certificate, which its kubelet uses as client and as server, and its kubeconfig."""
        name = f"node{node}"
        self.certificate(name, f"/O=system:nodes/CN=system:node:{name}", f"IP:{self.layout.node_address(node)}")
        self._kubeconfig(self.layout.inner_kubeconfig(name), name, f"https://{self.layout.gateway}:6443")

    def _data(self, file: str) -> str:
        return base64.b64encode((self.folder / file).read_bytes()).decode()

    def _kubeconfig(self, path: Path, user: str, server: str, namespace: str = "default") -> None:
        cluster = {"server": server, "certificate-authority-data": self._data("ca.crt")}
        credentials = {
            "client-certificate-data": self._data(f"{user}.crt"),
            "client-key-data": self._data(f"{user}.key"),
        }
        name = self.layout.name
        context = {"cluster": name, "user": user, "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "contexts": [{"name": name, "context": context}],
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": user, "user": credentials}],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))
