"""``python -m gpu``: every check on this machine's first GPU; exits 1 where one failed.

    PYTHONPATH=tests python -m gpu [--only numbers job …] [--out FOLDER]

A line for each check as it ends; what they measured goes to FOLDER/gpu.json as they go, so that a run that is cut off
leaves what it had. A check may keep what it has in the midst (``gpu.notes``): that counts when it fails, too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.notes import keep

CHECKS = {  # name: seconds that it may take
    "facts": 60,
    "numbers": 120,
    "repeats": 75,
    "groups": 90,
    "staging": 120,
    "layouts": 180,
    "measures": 150,
    "job": 230,
}
_GRACE = 25
"""Seconds before that in which a check is told that it is late, and ends the processes that it has started."""


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

    signal.signal(signal.SIGALRM, _late)
    signal.alarm(CHECKS[name] - _GRACE)
    keep(out, name, import_module(f"gpu.{name}").run(out))
    sys.stdout.flush()
    os._exit(0)  # destructors of process groups abort now and then


def _late(*_: Any) -> None:
    raise TimeoutError("the check takes too long")


if __name__ == "__main__":
    sys.exit(main())
