"""Container images as files."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from localcluster.archive import (
    Image,
    digest_of,
    full_name,
    open_image,
    write_docker_archive,
    write_layout,
    write_reference,
)
from localcluster.processes import ClusterError


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:bookworm-slim", "docker.io/library/debian:bookworm-slim"),
        ("someone/thing:1", "docker.io/someone/thing:1"),
        ("localhost/pause:1", "localhost/pause:1"),
        ("registry.example:5000/a/b", "registry.example:5000/a/b:latest"),
    ],
)
def test_names_are_completed_as_containerd_does(short: str, full: str) -> None:
    assert full_name(short) == full


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "image.tar"
    write_docker_archive(path, "tool:1", {"tool": b"program"}, ["/tool"])
    return path


def _layout(image: Image, present: set[str]) -> dict[str, bytes]:
    out = io.BytesIO()
    write_layout(image, present, out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        members = {m.name: tar.extractfile(m) for m in tar}
        return {name: file.read() for name, file in members.items() if file}


def test_a_docker_archive_becomes_a_complete_layout(archive: Path) -> None:
    with open_image(archive) as (image,):
        files = _layout(image, set())
    assert image.name == "docker.io/library/tool:1"
    index = json.loads(files["index.json"])
    manifest = json.loads(files["blobs/" + index["manifests"][0]["digest"].replace(":", "/")])
    for description in (manifest["config"], *manifest["layers"]):
        content = files["blobs/" + description["digest"].replace(":", "/")]
        assert digest_of(content) == description["digest"]
        assert len(content) == description["size"]


def test_layers_that_are_there_are_left_out(archive: Path) -> None:
    with open_image(archive) as (image,):
        (layer,) = image.layers
        assert f"blobs/{layer.digest.replace(':', '/')}" not in _layout(image, {layer.digest})


def test_compressed_layers_count_by_what_is_in_them(archive: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar"
    with tarfile.open(archive) as source, tarfile.open(packed, "w") as target:
        for member in source:
            file = source.extractfile(member)
            assert file
            content = gzip.compress(file.read()) if member.name.endswith(".tar") else file.read()
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    with open_image(archive) as (plain,), open_image(packed) as (unpacked,):
        assert plain.digest == unpacked.digest
        assert _layout(plain, set()) == _layout(unpacked, set())


def test_a_reference_into_a_layout_is_the_same_image(archive: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    with open_image(archive) as (image,):
        for name, content in _layout(image, set()).items():
            (layout / name).parent.mkdir(parents=True, exist_ok=True)
            (layout / name).write_bytes(content)
        write_reference(tmp_path / "image.json", layout, "tool:1", image.digest)
        with open_image(tmp_path / "image.json") as (again,):
            assert (again.name, again.digest, again.config) == (image.name, image.digest, image.config)
            assert _layout(again, set()) == _layout(image, set())
            assert all(layer.file for layer in again.layers)


def test_an_archive_without_a_named_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("manifest.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"[]"))
    with pytest.raises(ClusterError, match="no image with a name"), open_image(path):
        pass


def test_the_package_needs_no_cluster_to_be_imported() -> None:
    command = [sys.executable, "-c", "import localcluster, localcluster.images"]
    subprocess.run(command, check=True, env={"PATH": "", "HOME": "/nonexistent"}, cwd=Path(__file__).parents[1])
