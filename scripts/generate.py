"""`make generate` and `make verify`: every file in the repository that is made from another one.

    python scripts/generate.py           write what is out of date
    python scripts/generate.py --check   write nothing; say what is out of date and exit 1

Made here: the CRD and its reference (``lockstep_api.generate``), the pinned packages (``requirements.py``), the
reference of chart values, metrics and names (``reference.py``), the dashboards (``dashboard.py``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import dashboard
import reference
import requirements

REPOSITORY = Path(__file__).resolve().parents[1]


def models(*, check: bool) -> int:
    """CRD, the chart's copy and the API reference: the package that owns the models has its own command."""
    command = [sys.executable, "-m", "lockstep_api.generate", *(["--check"] if check else [])]
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode


def main() -> int:
    """Command line; 1 when ``--check`` finds a file out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check: bool = parser.parse_args().check
    status = models(check=check)
    stale = requirements.stale()
    for path, text in (reference.pages() | dashboard.files()).items():
        if not path.exists() or path.read_text() != text:
            stale.append(path)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    if not check:
        requirements.resolve()
    for path in stale:
        name = path.relative_to(REPOSITORY)
        print(f"{name} is out of date; run `make generate` and commit it" if check else f"wrote {name}")
    return 1 if status or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
