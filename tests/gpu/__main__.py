"""``python -m gpu``: every check on this machine's first GPU; exits 1 where one failed.

    PYTHONPATH=tests python -m gpu [--only numbers job …] [--out FOLDER]

A line for each check as it ends; what they measured goes to FOLDER/gpu.json as they go, so that a run that is cut off
leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CHECKS = {  # name: seconds that it may take
    "facts": 60,
    "numbers": 120,
    "repeats": 90,
    "groups": 90,
    "staging": 120,
    "layouts": 180,
    "job": 240,
}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        return _here(arguments.one, arguments.out)
    failed = 0
    found: dict[str, object] = {}
    for name in arguments.only:
        begun = time.monotonic()
        log = arguments.out / f"{name}.log"
        code = _apart(name, arguments.out, log)
        took = round(time.monotonic() - begun, 1)
        answer = arguments.out / f"{name}.json"
        found[name] = {"seconds": took, "code": code, **(json.loads(answer.read_text()) if answer.exists() else {})}
        answer.unlink(missing_ok=True)
        print(f"{name}: {'ok' if code == 0 else f'FAILED ({code})'}, {took} s", flush=True)
        if code:
            failed += 1
            print("\n".join(log.read_text(errors="replace").splitlines()[-30:]), flush=True)
        (arguments.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found), flush=True)
    return min(failed, 1)


def _apart(name: str, out: Path, log: Path) -> int:
    command = [sys.executable, "-m", "gpu", "--one", name, "--out", str(out)]
    with log.open("wb") as file:
        try:
            return subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=CHECKS[name], check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return 124


def _here(name: str, out: Path) -> int:
    from importlib import import_module

    found = import_module(f"gpu.{name}").run(out)
    (out / f"{name}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # destructors of process groups abort now and then


if __name__ == "__main__":
    sys.exit(main())
