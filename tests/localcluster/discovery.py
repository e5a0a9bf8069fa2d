"""Tells Prometheus which pods to scrape, by its HTTP service discovery.

Prometheus can ask the API server itself, but Debian's is built without that. The labels are the same as if it had.

    python -m localcluster.discovery KUBECONFIG PORT
"""

import json
import re
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from localcluster.api import Api


def targets(pods: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A target for each declared port of each container of each pod with an address."""
    for pod in pods:
        metadata, address = pod["metadata"], pod["status"].get("podIP")
        if not address:
            continue
        labels = {
            "__meta_kubernetes_namespace": metadata["namespace"],
            "__meta_kubernetes_pod_name": metadata["name"],
            "__meta_kubernetes_pod_node_name": pod["spec"].get("nodeName", ""),
            "__meta_kubernetes_pod_phase": pod["status"]["phase"],
        }
        for kind in ("labels", "annotations"):
            for key, value in metadata.get(kind, {}).items():
                labels[f"__meta_kubernetes_pod_{kind[:-1]}_{re.sub('[^a-zA-Z0-9_]', '_', key)}"] = value
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            for port in container.get("ports", ()):
                own = {
                    "__meta_kubernetes_pod_container_name": container["name"],
                    "__meta_kubernetes_pod_container_port_name": port.get("name", ""),
                }
                yield {"targets": [f"{address}:{port['containerPort']}"], "labels": labels | own}


def main(kubeconfig: str, port: str) -> None:
    """Serve until killed."""
    api = Api(Path(kubeconfig))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(list(targets(api.get("/api/v1/pods?resourceVersion=0")["items"]))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Write nothing down: there is a request every second."""

    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
