"""Getting images into the nodes.

An image is imported once, into a template: the folder of a containerd that runs only for that. A new node's containerd
starts with a copy of it made of hard links, which takes under a second however large the images are. A node that runs
already is handed what it lacks.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from localcluster import build, debian
from localcluster.archive import Image, open_image, write_docker_archive, write_layout
from localcluster.paths import cache_folder
from localcluster.processes import ClusterError, Process, run, start_time

PAUSE = "localhost/pause:1"
# containerd's two databases: all other files are never changed once written, so that a hard link is a copy.
_DATABASES = "io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db"
_WORTH_SHARING = 16 << 20
_WITH_US = (
    "setpriv",
    "--pdeathsig",
    "KILL",
)  # what still works for a tool that was killed would be in the way of the next


class Containerd:
    """A running containerd's images, by way of `ctr`."""

    def __init__(self, ctr: Path, socket: Path) -> None:
        self.argv = [str(ctr), "--address", str(socket), "--namespace", "k8s.io"]

    def answers(self) -> bool:
        """Whether it is up."""
        return subprocess.run([*self.argv, "version"], capture_output=True, check=False).returncode == 0

    def images(self) -> dict[str, str]:
        """The digest of each image, by its name."""
        lines = run(*self.argv, "images", "list").splitlines()[1:]
        return {fields[0]: fields[2] for fields in map(str.split, lines) if len(fields) > 2}

    def _lacking(self, images: Iterable[Image]) -> tuple[list[Image], set[str]]:
        """Those of the images that are not there, and the layers that are."""
        there = self.images()
        todo = [image for image in images if there.get(image.name) != image.digest]
        return todo, set(run(*self.argv, "content", "list", "--quiet").split()) if todo else set()

    def missing(self, path: Path) -> int:
        """The bytes of layers that loading a file's images would take."""
        with open_image(path) as images:
            todo, present = self._lacking(images)
            return sum({la.digest: la.size for i in todo for la in i.layers if la.digest not in present}.values())

    def load(self, path: Path) -> None:
        """Import the images of a file, but what is there already."""
        with open_image(path) as images:
            todo, present = self._lacking(images)
            for image in todo:
                try:
                    self._import(image, present)
                except ClusterError:
                    # A layer that was there a moment ago belonged to an image that this name meant before: containerd
                    # collects it as garbage while the new one is unpacked. Now with everything.
                    self._import(image, set())

    def _import(self, image: Image, present: set[str]) -> None:
        with tempfile.TemporaryFile() as errors:
            argv = [*self.argv, "images", "import", "--local", "-"]
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=errors, stderr=errors)
            assert process.stdin is not None
            fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, 1 << 20)
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # its own message says why it hung up
                write_layout(image, present, pipe)
            if process.wait():
                errors.seek(0)
                raise ClusterError(f"importing {image.name} failed:\n{errors.read().decode()}".rstrip())


class Template:
    """The containerd folder that new nodes get a copy of; all clusters of this user share it."""

    def __init__(self) -> None:
        self.folder = cache_folder() / "images"
        self.root = self.folder / "containerd"

    @contextlib.contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, kind)
            yield

    @contextlib.contextmanager
    def _running(self) -> Iterator[Containerd]:
        """A containerd on the template's folder, in a mount namespace of its own, without the kubelet's interface."""
        programs = build.programs()
        with tempfile.TemporaryDirectory(prefix="lockstep-") as run_folder:
            socket, config, log = (Path(run_folder, name) for name in ("s", "config.toml", "log"))
            config.write_text(
                f'version = 3\nroot = "{self.root}"\nstate = "{run_folder}/state"\n'
                f'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", '
                f'"io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri"]\n'
                f'[grpc]\n  address = "{socket}"\n'
            )
            argv = [
                *_WITH_US,
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--propagation",
                "private",
            ]
            with open(log, "wb") as output:
                popen = subprocess.Popen(
                    [*argv, programs["containerd"], "--config", config], stdout=output, stderr=output
                )
            process = Process(popen.pid, start_time(popen.pid) or 0)
            try:
                containerd = Containerd(programs["ctr"], socket)
                end = time.monotonic() + 20
                while not containerd.answers():
                    if popen.poll() is not None or time.monotonic() > end:
                        raise ClusterError(f"containerd does not start:\n{log.read_text()[-2000:]}")
                    time.sleep(0.05)
                yield containerd
            finally:
                # Told to stop, it closes its databases; killed, it might lose the last writes.
                for child in map(int, run("pgrep", "-P", str(popen.pid), check=False).split()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, 15)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(10)
                process.kill()

    @property
    def images(self) -> dict[str, str]:
        """The digest of each image in it, by its name; written down, because asking containerd costs starting it."""
        try:
            content: dict[str, str] = json.loads((self.root / "images.json").read_text())
        except FileNotFoundError:
            return {}
        return content

    def _lacks(self, path: Path) -> bool:
        with open_image(path) as images:
            return any(self.images.get(image.name) != image.digest for image in images)

    def load(self, *paths: Path) -> None:
        """Import the images of files, unless they are in the template."""
        with self._lock(fcntl.LOCK_EX):
            todo = [p for p in paths if self._lacks(p)]
            if not todo:
                return
            with self._running() as containerd:
                for path in todo:
                    debian.say(f"importing {path.stem} …")
                    containerd.load(path)
                images = containerd.images()
            (self.root / "images.json").write_text(json.dumps(images, indent=1))
            for path in todo:
                self._share_layers(path)

    def _share_layers(self, path: Path) -> None:
        """Keep large layers once: the images' layout and containerd have the same files."""
        blobs = self.root / "io.containerd.content.v1.content/blobs"
        with open_image(path) as images:
            files = {layer.digest: layer.file for image in images for layer in image.layers if layer.file}
        for digest, file in files.items():
            own = blobs / digest.replace(":", "/")
            if file.stat().st_size < _WORTH_SHARING or not own.exists() or own.samefile(file):
                continue
            if own.stat().st_dev == file.stat().st_dev:
                link = own.with_name(f"{own.name}.link")
                link.unlink(missing_ok=True)
                link.hardlink_to(file)
                link.replace(own)

    def prepare(self) -> None:
        """Make sure that the template has the image that holds a pod's namespaces."""
        program = build.programs()["pause"]
        archive = self.folder / f"{program.parent.name}.tar"
        if not archive.exists():
            write_docker_archive(archive, PAUSE, {"pause": program.read_bytes()}, ["/pause"])
        self.load(archive)

    def copy_to(self, target: Path) -> None:
        """Make a node's containerd folder."""
        with self._lock(fcntl.LOCK_SH):
            target.parent.mkdir(parents=True, exist_ok=True)
            linked = os.stat(self.root).st_dev == os.stat(target.parent).st_dev
            run(*_WITH_US, "cp", "-al" if linked else "-a", self.root, target)
            for database in _DATABASES if linked else ():
                (target / database).unlink()
                shutil.copy(self.root / database, target / database)
