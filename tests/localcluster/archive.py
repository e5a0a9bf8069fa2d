"""Container images as files: reading them, and writing what a node still lacks of one.

A node's containerd is handed an OCI image layout as a tar stream. Layers that it has already are left out, so that a
change of the project's code travels in a second, whatever lies below it.
"""

import gzip
import hashlib
import io
import json
import platform
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from localcluster.processes import ClusterError

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CHUNK = 1 << 20  # pipes and layers are copied in pieces of this size: tarfile's 10 KiB take most of an import's time


def digest_of(data: bytes) -> str:
    """The name of a blob."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True)
class Layer:
    """A layer: its digest, its size, and a way to read it."""

    digest: str
    size: int
    open: Callable[[], IO[bytes]]
    file: Path | None = None  # where it lies as a file of its own


@dataclass(frozen=True)
class Image:
    """An image: its full name, manifest, configuration and layers."""

    name: str
    manifest: bytes
    config: bytes
    layers: tuple[Layer, ...]

    @property
    def digest(self) -> str:
        """The manifest's digest, by which containerd knows the image."""
        return digest_of(self.manifest)


def full_name(name: str) -> str:
    """A short image name as containerd and the kubelet write it."""
    first, slash, _ = name.partition("/")
    if not slash:
        name = f"docker.io/library/{name}"
    elif "." not in first and ":" not in first and first != "localhost":
        name = f"docker.io/{name}"
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _encode(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _manifest(config: bytes, layers: Collection[Layer]) -> bytes:
    return _encode(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {"mediaType": _CONFIG, "digest": digest_of(config), "size": len(config)},
            "layers": [{"mediaType": _LAYER, "digest": layer.digest, "size": layer.size} for layer in layers],
        }
    )


@contextmanager
def open_image(path: Path) -> Iterator[list[Image]]:
    """Read the images of a docker-archive, or the one that a reference into an OCI layout names."""
    if path.suffix == ".json":
        yield [_from_layout(path)]
        return
    with tarfile.open(path) as tar:
        yield _from_docker_archive(tar, path)


def _from_docker_archive(tar: tarfile.TarFile, path: Path) -> list[Image]:
    def stream(member: str) -> IO[bytes]:
        found = tar.extractfile(member)  # follows the links that `docker save` makes for a layer used twice
        if found is None:
            raise ClusterError(f"{path}: {member} is not a file")
        return found

    def layer(member: str, digest: str) -> Layer:
        file = stream(member)
        if file.read(2) == b"\x1f\x8b":  # the configuration has the digests of what is inside
            return _unpacked(lambda: stream(member), digest)
        return Layer(digest, file.seek(0, io.SEEK_END), lambda: stream(member))

    images = []
    for entry in json.loads(stream("manifest.json").read()):
        config = stream(entry["Config"]).read()
        digests = json.loads(config)["rootfs"]["diff_ids"]
        layers = tuple(layer(m, d) for m, d in zip(entry["Layers"], digests, strict=True))
        for name in entry["RepoTags"] or []:
            images.append(Image(full_name(name), _manifest(config, layers), config, layers))
    if not images:
        raise ClusterError(f"{path} holds no image with a name")
    return images


def _unpacked(compressed: Callable[[], IO[bytes]], digest: str) -> Layer:
    def read() -> IO[bytes]:
        return cast("IO[bytes]", gzip.GzipFile(fileobj=compressed()))

    with read() as file:
        size = sum(len(chunk) for chunk in iter(lambda: file.read(_CHUNK), b""))
    return Layer(digest, size, read)


def write_reference(path: Path, layout: Path, name: str, manifest: str) -> None:
    """Write the small file that stands for an image in an OCI layout."""
    path.write_text(json.dumps({"layout": str(layout), "name": name, "manifest": manifest}, indent=1))


def _from_layout(path: Path) -> Image:
    reference = json.loads(path.read_text())
    layout = Path(reference["layout"])

    def blob(digest: str) -> Path:
        return layout / "blobs" / digest.replace(":", "/")

    def layer(description: dict[str, Any]) -> Layer:
        file = blob(description["digest"])
        return Layer(description["digest"], description["size"], lambda: open(file, "rb"), file)

    data = blob(reference["manifest"]).read_bytes()
    manifest = json.loads(data)
    config = blob(manifest["config"]["digest"]).read_bytes()
    return Image(full_name(reference["name"]), data, config, tuple(map(layer, manifest["layers"])))


def write_layout(image: Image, present: Collection[str], out: IO[bytes]) -> None:
    """Write an image as a tar of an OCI layout, without the layers that are present."""
    index = {
        "schemaVersion": 2,
        "manifests": [
            {
                "mediaType": json.loads(image.manifest).get("mediaType", _MANIFEST),
                "digest": image.digest,
                "size": len(image.manifest),
                "annotations": {"io.containerd.image.name": image.name},
            }
        ],
    }

    def add(name: str, size: int, content: IO[bytes]) -> None:
        member = tarfile.TarInfo(name)
        member.size = size
        out.write(member.tobuf(tarfile.GNU_FORMAT))
        shutil.copyfileobj(content, out, _CHUNK)
        out.write(bytes(-size % tarfile.BLOCKSIZE))

    def add_blob(digest: str, size: int, content: IO[bytes]) -> None:
        add(f"blobs/{digest.replace(':', '/')}", size, content)

    for name, data in (("oci-layout", _encode({"imageLayoutVersion": "1.0.0"})), ("index.json", _encode(index))):
        add(name, len(data), io.BytesIO(data))
    for data in (image.manifest, image.config):
        add_blob(digest_of(data), len(data), io.BytesIO(data))
    for layer in {layer.digest: layer for layer in image.layers}.values():
        if layer.digest not in present:
            with layer.open() as file:
                add_blob(layer.digest, layer.size, file)
    out.write(bytes(2 * tarfile.BLOCKSIZE))


def write_docker_archive(path: Path, name: str, files: dict[str, bytes], command: list[str]) -> None:
    """Write an image of a few files as a docker-archive, without any tool."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(file)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    config = _encode(
        {
            "architecture": _architecture(),
            "os": "linux",
            "config": {"Entrypoint": command, "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer.getvalue())]},
        }
    )
    names = f"{hashlib.sha256(config).hexdigest()}.json", f"{hashlib.sha256(layer.getvalue()).hexdigest()}.tar"
    manifest = _encode([{"Config": names[0], "RepoTags": [name], "Layers": [names[1]]}])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        members = {"manifest.json": manifest, names[0]: config, names[1]: layer.getvalue()}
        for file, content in members.items():
            member = tarfile.TarInfo(file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
