"""The few calls to the API server that the tool makes itself: a kubectl process for each would cost most of `up`."""

import base64
import http.client
import json
import ssl
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from localcluster.processes import ClusterError


class Api:
    """A client with a kubeconfig's certificate."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        decode = {k: base64.b64decode(v).decode() for k, v in (cluster | user).items() if k.endswith("-data")}
        self.host = urlsplit(cluster["server"]).netloc
        self.context = ssl.create_default_context(cadata=decode["certificate-authority-data"])
        # Python loads a client certificate from files only.
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:
            pem.write(decode["client-certificate-data"] + decode["client-key-data"])
            pem.flush()
            self.context.load_cert_chain(pem.name)

    def request(self, method: str, path: str, body: object = None, timeout: float = 10) -> Any:
        """Make one request; the answer as JSON, or as text where it is not."""
        connection = http.client.HTTPSConnection(self.host, context=self.context, timeout=timeout)
        kind = "application/apply-patch+yaml" if method == "PATCH" else "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": kind})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status >= 300:
            raise ClusterError(f"{method} {path}: {response.status} {text.strip()}")
        return json.loads(text) if "json" in response.headers.get("Content-Type", "") else text

    def get(self, path: str) -> Any:
        """Read an object or a list."""
        return self.request("GET", path)

    def apply(self, path: str, manifest: dict[str, Any]) -> None:
        """Create the object, or change what of it this tool owns."""
        self.request("PATCH", f"{path}/{manifest['metadata']['name']}?fieldManager=localcluster&force=true", manifest)

    def ready(self) -> bool:
        """Whether the API server answers and says that it is ready."""
        try:
            return bool(self.request("GET", "/readyz", timeout=2) == "ok")
        except (OSError, http.client.HTTPException, ClusterError):
            return False
