"""The version before the present one, out of this checkout's history: what an upgrade begins from."""

from __future__ import annotations

import io
import subprocess
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

from demonstration import install
from demonstration.target import REPOSITORY, Target
from localcluster import ClusterError, images

PARTS = ("charts", "crds", "images", "operator", "requirements", "trainer")
"""What is installed is made of these."""
PACKAGES = ("images/install.sh", "images/trainer.Dockerfile", "requirements/torch.txt", "requirements/trainer.txt")
"""The layers below the trainer's own code. Where they differ its image would take minutes, and is the present one."""


class NoPrevious(Exception):
    """There is no version before this one that could be installed; says why."""


@dataclass(frozen=True, slots=True)
class Previous:
    """A version's files, and a target that names its images, which are on the nodes."""

    commit: str
    chart: Path
    target: Target

    def install(self, values: dict[str, str | int]) -> None:
        """Install it, in place of whatever is installed."""
        install.helm_install(self.target, values, self.chart)


def previous_commit() -> str:
    """The newest commit whose operator, chart or trainer are not those of this checkout: HEAD with changes that are
    not committed, else the parent of the newest commit that changed them. Raises NoPrevious."""
    if _git("status", "--porcelain", "--untracked-files=no", "--", *PARTS):
        return _git("rev-parse", "HEAD")
    newest = _git("rev-list", "--max-count=1", "HEAD", "--", *PARTS)
    return _git("rev-parse", "--verify", f"{newest}^")


def previous(target: Target, folder: Path) -> Previous:
    """Unpack that commit into ``folder``, build its images and give them to the nodes. Raises NoPrevious."""
    commit = previous_commit()
    archive = subprocess.run(["git", "archive", commit, *PARTS], cwd=REPOSITORY, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
        packed.extractall(folder, filter="data")
    before = replace(target, operator_image="lockstep-operator:before")
    tags = {"operator": before.operator_image}
    if all((folder / part).read_bytes() == (REPOSITORY / part).read_bytes() for part in PACKAGES):
        before = replace(before, trainer_image="lockstep-trainer:before")
        tags["trainer"] = before.trainer_image
    try:
        files = [images.build_image(folder / f"images/{n}.Dockerfile", tag, folder) for n, tag in tags.items()]
    except ClusterError as error:
        raise NoPrevious(f"{commit[:12]} does not build: {error}") from error
    install.load_images(before, files)
    return Previous(commit, folder / "charts/lockstep", before)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoPrevious(f"git {' '.join(words[:3])}: {done.stderr.strip()}; is this a clone with its history?")
    return done.stdout.strip()
