"""What runs beside the control plane: DNS, an S3 server, Prometheus, and the forwarder from the host."""

import http.client
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from localcluster import debian
from localcluster.forwarder import listen
from localcluster.paths import PACKAGE, Layout
from localcluster.processes import ClusterError, Processes, in_network, wait_for

S3_PORT, PROMETHEUS_PORT, API_PORT, DISCOVERY_PORT = 7070, 9090, 6443, 9099
COMPONENTS = "forwarder", "coredns", "s3", "prometheus"


@dataclass(frozen=True)
class S3:
    """How to reach the S3 server, from the host and from pods."""

    endpoint_host: str
    endpoint_pods: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the AWS tools and libraries read, for use on the host."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_host,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }


class Services:
    """Starts and stops the servers beside the control plane."""

    def __init__(self, layout: Layout, processes: Processes) -> None:
        self.layout, self.processes = layout, processes

    def _start(self, name: str, *argv: str | Path, env: dict[str, str] | None = None) -> None:
        self.processes.start(name, in_network(self.layout.control_plane, *argv), env)

    def start_forwarder(self, ports: dict[str, int]) -> None:
        """Open the ports on the host's loopback."""
        inside = {"api": API_PORT, "s3": S3_PORT, "prometheus": PROMETHEUS_PORT}
        routes = [f"{ports[name]}={self.layout.gateway}:{port}" for name, port in inside.items()]
        # As a plain file, without its folder on the path: it needs nothing of the package.
        argv = [sys.executable, "-P", str(PACKAGE / "forwarder.py"), self.layout.control_plane, *routes]
        self.processes.start("forwarder", argv)

    def start_dns(self) -> None:
        """Start CoreDNS. It knows the cluster's names and no others."""
        config = self.layout.state / "Corefile"
        config.write_text(
            f".:53 {{\n"
            f"    bind {self.layout.gateway}\n"
            f"    errors\n"
            f"    kubernetes cluster.local {{\n"
            f"        kubeconfig {self.layout.inner_kubeconfig('coredns')}\n"
            f"        ttl 1\n"  # pods are replaced by others of the same name within seconds
            f"    }}\n"
            f"}}\n"
        )
        self._start("coredns", self.layout.programs / "coredns", "-conf", config)

    @property
    def buckets(self) -> Path:
        """The folder with the S3 server's buckets, a folder for each."""
        return self.layout.state / "s3"

    def start_s3(self, s3: S3) -> None:
        """Start the S3 server on a folder."""
        self.buckets.mkdir(parents=True, exist_ok=True)
        self._start(
            "s3",
            self.layout.programs / "versitygw",
            f"--port={self.layout.gateway}:{S3_PORT}",
            "--quiet",
            "posix",
            self.buckets,
            env={"ROOT_ACCESS_KEY": s3.access_key, "ROOT_SECRET_KEY": s3.secret_key},
        )

    def stop_s3(self) -> None:
        """Kill the S3 server; its data stays."""
        self.processes.stop("s3")

    def start_prometheus(self) -> None:
        """Start Prometheus with the configuration of prometheus.yaml."""
        kubeconfig = self.layout.inner_kubeconfig("prometheus")
        discovery = (sys.executable, "-m", "localcluster.discovery", kubeconfig, str(DISCOVERY_PORT))
        self._start("discovery", *discovery, env=_python_path())
        self._start(
            "prometheus",
            debian.prometheus(),
            f"--config.file={PACKAGE / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self.layout.state / 'prometheus'}",
            f"--web.listen-address={self.layout.gateway}:{PROMETHEUS_PORT}",
            "--log.level=warn",
        )

    def wait_answering(self, name: str, port: int, path: str = "/") -> None:
        """Wait until a server answers at all, through the forwarder."""

        def answers() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            try:
                connection.request("GET", path)
                return connection.getresponse().status < 500
            except (OSError, http.client.HTTPException):
                return False
            finally:
                connection.close()

        wait_for(name, answers, 30, self.processes.log(name), every=0.05)


def _python_path() -> dict[str, str]:
    """Lets a new Python find this package, whether or not it is installed."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))}


def free_ports(first: int, count: int, attempts: int = 50) -> list[int]:
    """The first run of free ports on the loopback from a given one on."""
    for start in range(first, first + count * attempts, count):
        ports = list(range(start, start + count))
        try:
            for port in ports:
                listen(port).close()
        except OSError:
            continue
        return ports
    raise ClusterError(f"no {count} free ports from {first} on")
