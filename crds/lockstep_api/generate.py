"""Writes what is generated from the models: ``python -m lockstep_api.generate [--check]``.

- ``crds/lockstep.dev_trainingjobs.yaml``, for ``kubectl apply``
- ``charts/lockstep/files/crd.yaml``, the chart's copy
- ``docs/reference/api.md``

``--check`` writes nothing and exits 1 if a file is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from lockstep_api import constants
from lockstep_api.crd import custom_resource_definition
from lockstep_api.reference import api_reference

_ROOT = Path(__file__).resolve().parents[2]
_HEADER = "# Generated from crds/lockstep_api/v1alpha1/ by `python -m lockstep_api.generate`; do not edit.\n"


def generated() -> dict[str, str]:
    """Path below the repository → content."""
    crd = custom_resource_definition()
    text = _HEADER + yaml.safe_dump(crd, sort_keys=False, width=110, allow_unicode=True)
    return {
        f"crds/{constants.GROUP}_{constants.PLURAL}.yaml": text,
        "charts/lockstep/files/crd.yaml": text,
        "docs/reference/api.md": api_reference(crd),
    }


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m lockstep_api.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check: bool = parser.parse_args(argv).check
    stale = [path for path, text in generated().items() if _read(_ROOT / path) != text]
    for path in stale:
        if check:
            print(f"{path} is out of date; run `python -m lockstep_api.generate`", file=sys.stderr)
        else:
            (_ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (_ROOT / path).write_text(generated()[path])
            print(f"wrote {path}")
    return 1 if check and stale else 0


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
