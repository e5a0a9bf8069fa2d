"""Building the project's images from their Dockerfiles, without a container engine.

The base image is made by debootstrap and stands in, under the same name, for the one that the Dockerfiles name, which
has the same Debian in it. Built images lie in one OCI layout that shares their layers: a layer is written out once.

    python -m localcluster.images DOCKERFILE TAG [CONTEXT]
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from localcluster import debian
from localcluster.archive import write_reference
from localcluster.paths import REPOSITORY, cache_folder
from localcluster.processes import ClusterError, run

BASE = "docker.io/library/debian:bookworm-slim"
RELEASE = "bookworm"
PACKAGES = "buildah", "debootstrap", "skopeo"
_INCLUDE = "python3,python3-venv,ca-certificates"
_UNHASHED = {"__pycache__", ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


def _folder() -> Path:
    return cache_folder() / "images"


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    _folder().mkdir(parents=True, exist_ok=True)
    with open(_folder() / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _environment() -> dict[str, str]:
    """Configuration of our own, so that nothing depends on what else this machine has containers for."""
    folder = _folder()
    (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    (folder / "registries.conf").write_text('unqualified-search-registries = ["docker.io"]\n')
    return {**os.environ, "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf")}


def _buildah(*arguments: str | Path) -> list[str]:
    storage = ("--root", _folder() / "storage", "--runroot", _folder() / "run", "--storage-driver", "overlay")
    return ["buildah", *map(str, (*storage, *arguments))]


def _run(*arguments: str | Path, check: bool = True) -> str:
    return run(*_buildah(*arguments), check=check, env=_environment()).strip()


def _policy() -> tuple[str, Path]:
    return "--signature-policy", _folder() / "policy.json"


def _identifier(tag: str) -> str:
    return _run("images", "--quiet", "--no-trunc", tag, check=False)


# The base image


def _mirror() -> str:
    """Where this machine's apt gets Debian from."""
    lines = run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(LABEL)", "Created-By: Packages")
    targets = [line.split(" ", 2) for line in lines.splitlines()]
    fitting = [t[0] for t in targets if t[1] == RELEASE] or [t[0] for t in targets if t[2] == "Debian"]
    if fitting:
        return fitting[0]
    raise ClusterError("apt knows no Debian mirror: it is what the base image is made from")


def build_base() -> None:
    """Make the base image, unless it is there."""
    debian.install(*PACKAGES)
    with _lock():
        if _identifier(BASE):
            return
        debian.say(f"making the base image {BASE} with debootstrap …")
        container = _run("from", "scratch")
        try:
            root = Path(_run("mount", container))
            options = ("--variant=minbase", f"--include={_INCLUDE}")
            run("debootstrap", *options, RELEASE, root, _mirror())
            for rubbish in ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/doc", "usr/share/man"):
                for entry in (root / rubbish).iterdir():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            _run("unmount", container)
            _run("config", "--cmd", "bash", container)
            _run("commit", "--quiet", *_policy(), container, BASE)
        finally:
            _run("rm", container, check=False)


# Images on top


def copied(dockerfile: str) -> list[str]:
    """What of the context a Dockerfile copies."""
    joined = re.sub(r"\\\n", " ", dockerfile)
    sources: list[str] = []
    for line in joined.splitlines():
        words = line.split()
        if words and words[0].upper() in {"COPY", "ADD"} and not any(w.startswith("--from") for w in words):
            sources += [w for w in words[1:-1] if not w.startswith("--")]
    return sources


def content_hash(paths: Iterable[Path]) -> str:
    """A hash of files and of all files in folders: their names, modes and content."""
    digest = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        for file in files:
            if not _UNHASHED & set(file.parts):
                digest.update(f"{file} {file.stat().st_mode:o}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _mounts(folder: Path) -> Iterator[str]:
    """What a build sees of this machine: its certificates, and uv with its cache where it is there."""
    certificates = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    if certificates.is_file():
        yield f"{certificates}:/run/ca.crt:ro"  # over the image's own it would be in the way of its packages
    uv = _uv()
    if not uv:
        return
    # A script stands before it: the build's environment would stay in the image.
    names = "UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_HTTP_TIMEOUT"
    exports = [f"export {name}={shlex.quote(os.environ[name])}" for name in names if name in os.environ]
    lines = ["#!/bin/sh", "[ ! -s /run/ca.crt ] || export SSL_CERT_FILE=/run/ca.crt", *exports, 'exec /run/uv "$@"']
    script = folder / "uv"
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    cache = Path(run(uv, "cache", "dir").strip())
    cache.mkdir(parents=True, exist_ok=True)
    yield f"{uv}:/run/uv:ro"
    yield f"{script}:/usr/local/bin/uv:ro"
    yield f"{cache}:/root/.cache/uv"


def _uv() -> Path | None:
    """The uv program itself: what is on PATH can be a script that starts one of several."""
    on_path = shutil.which("uv")
    if not on_path:
        return None
    found = run(on_path, "run", "--no-project", "--quiet", "printenv", "UV", check=False).strip()
    path = Path(found or on_path).resolve()
    return path if path.is_file() and path.read_bytes()[:4] == b"\x7fELF" else None


def build_image(dockerfile: str | Path, tag: str, context: str | Path = REPOSITORY) -> Path:
    """Build an image, unless nothing it is made of has changed; the file that stands for it in `load_image`."""
    dockerfile, context = Path(dockerfile).absolute(), Path(context).absolute()
    build_base()
    reference = _folder() / f"{re.sub('[^A-Za-z0-9._-]', '_', tag)}.json"
    stamp = reference.with_suffix(".inputs")
    sources = [context / source for source in copied(dockerfile.read_text())]
    inputs = f"{_identifier(BASE)} {tag} {content_hash([dockerfile, *sources])}"
    with _lock():
        if reference.exists() and stamp.exists() and stamp.read_text() == inputs:
            return reference
        started = time.monotonic()
        debian.say(f"building {tag} from {dockerfile.name} …")
        work = _folder() / "work"
        work.mkdir(exist_ok=True)
        isolation = ("--isolation", "chroot", "--network", "host", "--layers", "--pull-never")
        volumes = [word for mount in _mounts(work) for word in ("--volume", mount)]
        argv = _buildah("bud", *isolation, *_policy(), *volumes, "--tag", tag, "--file", dockerfile, context)
        log = _folder() / f"{reference.stem}.log"
        with open(log, "wb") as output:
            code = subprocess.run(argv, env=_environment(), stdout=output, stderr=output, check=False).returncode
        if code:
            raise ClusterError(f"building {tag} failed; see {log}\n" + "\n".join(log.read_text().splitlines()[-15:]))
        _write_out(tag, reference)
        stamp.write_text(inputs)
        debian.say(f"built {tag} in {time.monotonic() - started:.0f} s")
    return reference


def _write_out(tag: str, reference: Path) -> None:
    """Put an image into the layout. Layers that are there already are not written again."""
    layout, name = _folder() / "layout", reference.stem
    # buildah's own push compresses the layers, which takes minutes, and every time anew.
    identifier = _identifier(tag).removeprefix("sha256:")
    storage = f"containers-storage:[overlay@{_folder() / 'storage'}+{_folder() / 'run'}]@{identifier}"
    options = ("--quiet", "--policy", _folder() / "policy.json", "--dest-oci-accept-uncompressed-layers")
    run("skopeo", "copy", *options, storage, f"oci:{layout}:{name}", env=_environment())
    index = json.loads((layout / "index.json").read_text())
    entries = {e.get("annotations", {}).get("org.opencontainers.image.ref.name"): e for e in index["manifests"]}
    write_reference(reference, layout, tag, entries[name]["digest"])
    _drop_unused(layout, [e["digest"] for e in index["manifests"]])
    _run("rmi", "--prune", check=False)


def _drop_unused(layout: Path, manifests: Iterable[str]) -> None:
    """Remove the layers of images that were built over."""
    blobs = layout / "blobs/sha256"
    used = set()
    for digest in manifests:
        manifest = json.loads((blobs / digest.removeprefix("sha256:")).read_text())
        used |= {digest, manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])}
    for blob in blobs.iterdir():
        if f"sha256:{blob.name}" not in used:
            blob.unlink()


if __name__ == "__main__":
    try:
        print(build_image(*sys.argv[1:]))
    except ClusterError as problem:
        raise SystemExit(f"images: {problem}") from None
