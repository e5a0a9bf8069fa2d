"""The pinned, hashed package lists in requirements/, resolved from pyproject.toml and requirements/trainer.in.

    python scripts/requirements.py            resolve the lists whose inputs have changed
    python scripts/requirements.py --upgrade  resolve all of them anew, to the newest versions
    python scripts/requirements.py --check    only say whether a list is out of date

The first line of each list names the hash of what it was made from, so that a check needs no network. The lists hold
for every platform and Python that Lockstep supports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import environment

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "requirements"
EXACT_TORCH = FOLDER / "trainer.in"


@dataclass(frozen=True, slots=True)
class PinnedList:
    """One file in requirements/ and what it is made from."""

    name: str
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    exact_torch: bool = False
    from_project: bool = True
    constrained: bool = True  # to the versions of dev.txt, so that tests and images run the same

    @property
    def path(self) -> Path:
        """The file."""
        return FOLDER / f"{self.name}.txt"

    def header(self) -> str:
        """First line of the file: says how it is made, and from what."""
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
        inputs = {
            "requires-python": project["project"]["requires-python"],
            "dependencies": project["project"]["dependencies"] if self.from_project else [],
            "extras": [project["project"]["optional-dependencies"][extra] for extra in self.extras],
            "groups": [project["dependency-groups"][group] for group in self.groups],
            "exact_torch": EXACT_TORCH.read_text() if self.exact_torch else "",
        }
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        return f"# Made by `make generate`. Inputs: {digest[:16]}\n"

    def current(self) -> bool:
        """Whether the file was made from what is there now."""
        return self.path.exists() and self.path.read_text().startswith(self.header())

    def resolve(self, *, upgrade: bool) -> None:
        """Write the file. Versions in it stay where they still fit, unless ``upgrade``."""
        command = [str(environment.find_uv()), "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
        command += ["--generate-hashes", "--no-header", "--no-emit-index-url", "--no-annotate"]
        command += ["pyproject.toml"] if self.from_project else []
        command += [str(EXACT_TORCH)] if self.exact_torch else []
        command += [flag for extra in self.extras for flag in ("--extra", extra)]
        command += [flag for group in self.groups for flag in ("--group", group)]
        command += ["--constraints", str(DEV.path)] if self.constrained else []
        command += ["--upgrade"] if upgrade else []
        subprocess.run([*command, "--output-file", str(self.path)], check=True, cwd=REPOSITORY)
        self.path.write_text(self.header() + self.path.read_text())


DEV = PinnedList(
    "dev", extras=("operator", "trainer", "trackers"), groups=("dev",), exact_torch=True, constrained=False
)
LISTS = (
    DEV,  # first: the others take its versions
    PinnedList("operator", extras=("operator",)),
    PinnedList("trainer", extras=("trainer",), exact_torch=True),
    PinnedList("torch", exact_torch=True, from_project=False),  # the trainer image's lowest, largest layer
)


def stale() -> list[Path]:
    """Lists that were made from other inputs than those that are there now."""
    return [pinned.path for pinned in LISTS if not pinned.current()]


def resolve(*, upgrade: bool = False) -> list[Path]:
    """Write every list that is out of date, or all; returns those written."""
    written = [pinned for pinned in LISTS if upgrade or not pinned.current()]
    for pinned in written:
        pinned.resolve(upgrade=upgrade)
    return [pinned.path for pinned in written]


def main() -> int:
    """Command line; 1 when ``--check`` finds a list out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--upgrade", action="store_true")
    options = parser.parse_args()
    if not options.check:
        for path in resolve(upgrade=options.upgrade):
            print(f"wrote {path.relative_to(REPOSITORY)}")
        return 0
    for path in stale():
        print(f"{path.relative_to(REPOSITORY)} was made from other inputs; run `make generate`", file=sys.stderr)
    return 1 if stale() else 0


if __name__ == "__main__":
    sys.exit(main())
