"""`make setup`: the virtual environment `.venv`, exactly as pinned in requirements/dev.txt.

Runs on any Python from 3.11 on with nothing but the standard library. What it finds is used: uv on PATH, the machine's
own settings for package indexes and certificates. A stamp in the environment makes the next call return at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = REPOSITORY / ".venv"
STAMP = ENVIRONMENT / "lockstep.stamp"
OLDEST_PYTHON = (3, 11)
INPUTS = ("pyproject.toml", "requirements/dev.txt", "scripts/environment.py")


class SetupError(Exception):
    """The environment can't be made; the text says what to do about it."""


def fingerprint() -> str:
    """Stands for all that goes into the environment: the pins, the packaging and the Python that it is made with."""
    digest = hashlib.sha256(f"{sys.version} {sys.base_prefix}".encode())
    for name in INPUTS:
        digest.update((REPOSITORY / name).read_bytes())
    return digest.hexdigest()


def say(text: str) -> None:
    """One line about what is being done."""
    print(f"setup: {text}", flush=True)


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command with its output shown; raises SetupError when it fails."""
    try:
        subprocess.run(command, check=True, cwd=REPOSITORY, env=env, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"`{' '.join(map(str, command))}` failed: {error}") from None


def cache_folder() -> Path:
    """Where Lockstep keeps programs that are not in the repository; the same folder as the local cluster's."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"
    return Path(os.environ.get("LOCKSTEP_CACHE") or default).absolute()


def require_venv_module() -> None:
    """Debian's python3 comes without ensurepip; its package python3-venv brings it."""
    if subprocess.run([sys.executable, "-c", "import ensurepip"], check=False, capture_output=True).returncode == 0:
        return
    remedy = "install the package python3-venv (or another Python with pip) and try again"
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise SetupError(f"{sys.executable} can't make virtual environments; {remedy}")
    say("this Python can't make virtual environments: installing Debian's python3-venv")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", env=quiet)
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "python3-venv", env=quiet)


def find_uv() -> Path:
    """uv from PATH, or from a virtual environment of its own in the cache folder, made now if need be."""
    if on_path := shutil.which("uv"):
        return Path(on_path)
    folder = cache_folder() / "uv"
    uv = folder / "bin/uv"
    if not uv.exists():
        say(f"no uv on PATH: installing it from PyPI into {folder}")
        require_venv_module()
        run(sys.executable, "-m", "venv", "--clear", folder)
        run(folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "uv")
    return uv


def build(uv: Path) -> None:
    """Make the environment, or bring it up to date; packages that are not pinned are removed."""
    settings = {**os.environ, "UV_HTTP_TIMEOUT": os.environ.get("UV_HTTP_TIMEOUT", "300")}
    settings.setdefault("UV_SYSTEM_CERTS", "1")  # the certificates that the machine trusts, its own authority's too
    settings.pop("VIRTUAL_ENV", None)
    python = ENVIRONMENT / "bin/python"
    if not python.exists():
        run(uv, "venv", "--allow-existing", "--python", sys.executable, ENVIRONMENT, env=settings)
    install: Sequence[str | Path] = (uv, "pip")
    target = ("--python", python)
    # Compiled now, once: importing torch takes 3.6 seconds of CPU instead of 10.7, and each worker of each test does.
    compiled = (*target, "--compile-bytecode")
    run(*install, "sync", *compiled, "--require-hashes", "requirements/dev.txt", env=settings)
    run(*install, "install", *target, "--quiet", "--no-deps", "--editable", ".", env=settings)


def main() -> int:
    """Bring the environment up to date and say how long it took; 0 when it stands."""
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        print(
            f"setup: Lockstep needs Python {wanted} or newer; {sys.executable} is {sys.version.split()[0]}. "
            "Name another one with `make PYTHON=…`.",
            file=sys.stderr,
        )
        return 1
    wanted_stamp = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted_stamp:
        return 0
    started = time.monotonic()
    say(f"installing the pinned packages into {ENVIRONMENT} (torch alone takes 5 GB; minutes the first time)")
    try:
        STAMP.unlink(missing_ok=True)
        build(find_uv())
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    STAMP.write_text(wanted_stamp)
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
