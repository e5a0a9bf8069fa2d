"""Rendering the chart with the real Helm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from localcluster import build

REPOSITORY = Path(__file__).resolve().parents[3]
CHART = REPOSITORY / "charts/lockstep"

Values = dict[str, Any]
Manifest = dict[str, Any]
Render = Callable[..., dict[tuple[str, str], Manifest]]


@pytest.fixture(scope="session")
def helm() -> Path:
    """The Helm of the local cluster, or the one on PATH. CI must have one; elsewhere its absence skips."""
    found = build.programs().get("helm") or shutil.which("helm")
    if found is None:
        reason = "no helm on PATH and none built; `python -m localcluster build helm` builds it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(found)


@pytest.fixture(scope="session")
def template(helm: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`helm template` of release ``ls`` in namespace ``lockstep-system``; values as keyword ``values``."""

    def run(*arguments: str, values: Values | None = None) -> subprocess.CompletedProcess[str]:
        command = [
            str(helm),
            "template",
            "ls",
            str(CHART),
            "--namespace",
            "lockstep-system",
            "--values",
            "-",
            *arguments,
        ]
        return subprocess.run(command, input=json.dumps(values or {}), capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def render(template: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    """The rendered objects as (kind, name) → manifest."""

    def run(values: Values | None = None) -> dict[tuple[str, str], Manifest]:
        result = template(values=values)
        assert result.returncode == 0, result.stderr
        manifests = [manifest for manifest in yaml.safe_load_all(result.stdout) if manifest]
        found = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
        assert len(found) == len(manifests), "two objects of one kind have the same name"
        return found

    return run
