"""Names, folders and addresses of a cluster, derived from the checkout so that two clusters do not meet."""

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from localcluster.processes import ClusterError

PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parents[1]
MAX_NODES = 64


def cache_folder() -> Path:
    """Where built programs and images are kept, for all checkouts together."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"
    return Path(os.environ.get("LOCKSTEP_CACHE") or default).absolute()


def state_folder() -> Path:
    """Where the clusters' data is kept, a folder for each."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state").absolute() / "lockstep"


@dataclass(frozen=True)
class Layout:
    """Everything about a cluster that follows from its name."""

    name: str

    @classmethod
    def of_checkout(cls, name: str | None = None) -> "Layout":
        """The layout of the given name, or of $LOCKSTEP_CLUSTER_NAME, or of this checkout."""
        name = name or os.environ.get("LOCKSTEP_CLUSTER_NAME")
        if not name:
            name = f"ls-{hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:6]}"
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,29}", name):
            raise ClusterError(f"cluster name {name!r}: use small letters, digits and dashes, at most 30")
        return cls(name)

    @cached_property
    def _number(self) -> int:
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")

    # Folders and files

    @property
    def state(self) -> Path:
        """All that this cluster writes."""
        return state_folder() / self.name

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.state / "pki"

    @property
    def programs(self) -> Path:
        """Links to all the programs that the cluster runs."""
        return self.state / "programs"

    @property
    def bin(self) -> Path:
        """Links to kubectl and helm, for a user's PATH."""
        return self.state / "bin"

    @property
    def logs(self) -> Path:
        """The programs' output, a file for each."""
        return self.state / "logs"

    @property
    def record(self) -> Path:
        """What `up` was asked for and chose."""
        return self.state / "cluster.json"

    def kubeconfig(self, user: str) -> Path:
        """A user's kubeconfig, for use on the host."""
        return self.state / f"{user}.kubeconfig"

    def inner_kubeconfig(self, user: str) -> Path:
        """A component's kubeconfig, for use in the cluster's namespaces."""
        return self.pki / f"{user}.kubeconfig"

    def node_folder(self, node: int) -> Path:
        """A node's disk."""
        return self.state / f"node{node}"

    # Namespaces and cgroups

    @property
    def control_plane(self) -> str:
        """The control plane's network namespace."""
        return f"{self.name}-cp"

    def namespace(self, node: int) -> str:
        """A node's network namespace."""
        return f"{self.name}-node{node}"

    @property
    def cgroup(self) -> str:
        """The cgroup above the nodes'."""
        return f"lockstep-{self.name}"

    # Addresses: 10.X.0.0/24 nodes, 10.X.64.0/20 services, 10.X.(128+i).0/24 the pods of node i

    @property
    def prefix(self) -> str:
        """The first two numbers of all addresses."""
        return f"10.{64 + self._number % 64}"

    @property
    def gateway(self) -> str:
        """The control plane's address: API, DNS, S3 and Prometheus listen here."""
        return f"{self.prefix}.0.1"

    @property
    def services(self) -> str:
        """The services' network."""
        return f"{self.prefix}.64.0/20"

    @property
    def kubernetes_service(self) -> str:
        """The address of the service `kubernetes`, the first of its network."""
        return f"{self.prefix}.64.1"

    @property
    def pods(self) -> str:
        """The network of all pods."""
        return f"{self.prefix}.128.0/17"

    def node_address(self, node: int) -> str:
        """A node's address."""
        return f"{self.prefix}.0.{10 + node}"

    def node_pods(self, node: int) -> str:
        """The network of a node's pods."""
        return f"{self.prefix}.{128 + node}.0/24"

    @property
    def first_port(self) -> int:
        """The first of the ports on the host's loopback, below the range that outgoing connections take theirs from."""
        return 20000 + self._number % 1000 * 10
