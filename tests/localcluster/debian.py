"""Programs that Debian's packages have."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from localcluster.paths import cache_folder
from localcluster.processes import ClusterError, run


def say(line: str) -> None:
    """Tell the user what happens to their machine."""
    print(line, file=sys.stderr, flush=True)


def _installed(package: str) -> bool:
    status = run("dpkg-query", "-W", "-f", "${db:Status-Status}", package, check=False)
    return status.strip() == "installed"


def _retry_updated(action: Callable[[], object]) -> None:
    """Do something with apt; when it fails, once more with fresh package lists."""
    try:
        action()
    except ClusterError:
        run("apt-get", "update", "-qq")
        action()


def install(*packages: str) -> None:
    """Install those of the packages that are missing."""
    if not shutil.which("dpkg-query"):
        say(f"not a Debian machine: make sure that these are there: {' '.join(packages)}")
        return
    absent = [p for p in packages if not _installed(p)]
    if not absent:
        return
    say(f"installing Debian packages: {' '.join(absent)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _retry_updated(lambda: run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *absent, env=env))


def prometheus() -> Path:
    """Prometheus, from PATH or unpacked from Debian's package; installing that would start a service."""
    on_path = shutil.which("prometheus")
    if on_path:
        return Path(on_path)
    folder = cache_folder() / "prometheus"
    program = folder / "usr/bin/prometheus"
    if not program.exists():
        say(f"unpacking Debian's prometheus into {folder}")
        with tempfile.TemporaryDirectory() as temporary:

            def download() -> None:
                result = subprocess.run(
                    ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "prometheus"],
                    cwd=temporary,
                    text=True,
                    capture_output=True,
                    check=False,
                )
                if result.returncode:
                    raise ClusterError(f"apt-get download prometheus:\n{result.stdout}{result.stderr}")

            _retry_updated(download)
            run("dpkg", "-x", next(Path(temporary).glob("*.deb")), folder)
    return program
