"""The cluster that the demonstration runs on: the local one, or one that is there already."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localcluster import Cluster
from localcluster.services import S3

REPOSITORY = Path(__file__).resolve().parents[2]


class DemoError(Exception):
    """A sentence for the person at the keyboard."""


@dataclass(frozen=True)
class Target:
    """kubectl, helm and an S3 server. ``cluster`` is None where the machines are somebody else's."""

    environment: dict[str, str]
    s3: S3
    operator_image: str = "lockstep-operator:dev"
    trainer_image: str = "lockstep-trainer:dev"
    cluster: Cluster | None = None

    @classmethod
    def local(cls, cluster: Cluster) -> Target:
        """The local cluster."""
        return cls({**os.environ, **cluster.environment}, cluster.s3, cluster=cluster)

    @classmethod
    def existing(cls) -> Target:
        """The cluster of $KUBECONFIG; raises DemoError naming each variable that is missing."""
        names = (
            "KUBECONFIG", "LOCKSTEP_DEMO_OPERATOR_IMAGE", "LOCKSTEP_DEMO_TRAINER_IMAGE", "LOCKSTEP_DEMO_S3_ENDPOINT",
            "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
        )  # fmt: skip
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise DemoError(f"LOCKSTEP_DEMO_CLUSTER=existing needs {', '.join(missing)} in the environment")
        endpoint = os.environ["LOCKSTEP_DEMO_S3_ENDPOINT"]
        s3 = S3(
            endpoint_host=os.environ.get("LOCKSTEP_DEMO_S3_ENDPOINT_HERE", endpoint),
            endpoint_pods=endpoint,
            access_key=os.environ["AWS_ACCESS_KEY_ID"],
            secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        )
        images = os.environ["LOCKSTEP_DEMO_OPERATOR_IMAGE"], os.environ["LOCKSTEP_DEMO_TRAINER_IMAGE"]
        return cls(dict(os.environ), s3, *images)

    def command(self, program: str, *arguments: str) -> list[str]:
        """A command line with the program that this target's PATH has."""
        found = shutil.which(program, path=self.environment["PATH"])
        if found is None:
            raise DemoError(f"{program} is not on PATH")
        return [found, *arguments]

    def run(self, program: str, *arguments: str, stdin: str | None = None) -> str:
        """Runs a program; what it printed. Raises DemoError with what it complained of."""
        done = subprocess.run(
            self.command(program, *arguments),
            env=self.environment, input=stdin, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise DemoError(f"{program} {' '.join(arguments[:6])}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """kubectl."""
        return self.run("kubectl", *arguments, stdin=stdin)

    def get(self, *arguments: str) -> Any:
        """``kubectl get … -o json``."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        """``kubectl apply`` of objects."""
        bundle = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", stdin=json.dumps(bundle))

    def exec(self, namespace: str, pod: str, command: Sequence[str]) -> str:
        """A command in a pod's trainer container."""
        return self.kubectl("exec", "-n", namespace, pod, "-c", "trainer", "--", *command)
